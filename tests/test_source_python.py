"""Python functions as sources: what they may return, what is refused, and that nothing but names reaches a worker."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lookalikes import ODD_NAN, assert_all_same, assert_same_bits, deepcam_samples, read_source, refusals

from stagein.formats import Dataset, convert
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.sources.python import scan_python

HEADER = """
import sys
import numpy as np
import torch
sys.path.append({tests!r})
from lookalikes import deepcam_samples

class Items:
    def __init__(self, count, make):
        self.count, self.make = count, make
    def __len__(self):
        return self.count
    def __getitem__(self, number):
        if not 0 <= number < self.count:
            raise IndexError(number)
        return self.make(number)

def records():
"""

Define = Callable[[str], str]


@pytest.fixture
def define(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Define:
    """Writes a module whose function has this body into the current folder; returns MODULE:FUNCTION."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    tests = str(Path(__file__).parent)
    made = []

    def write(body: str) -> str:
        module = f"given_{abs(hash(request.node.nodeid))}_{len(made)}"
        made.append(module)
        (tmp_path / f"{module}.py").write_text(HEADER.format(tests=tests) + "    " + body.replace("\n", "\n    "))
        importlib.invalidate_caches()
        return f"{module}:records"

    return write


def test_dicts_of_arrays(define: Define) -> None:
    source = scan_python(define("return deepcam_samples()"))
    assert source.schema.primary == "data"
    assert_all_same(source, deepcam_samples())


def test_a_torch_dataset_of_pairs(define: Define) -> None:
    body = (
        "data = torch.arange(7 * 12, dtype=torch.float32).reshape(7, 3, 4).requires_grad_()\n"
        "return torch.utils.data.TensorDataset(data, torch.arange(7))"
    )
    data = np.arange(7 * 12, dtype=np.float32).reshape(7, 3, 4)
    expected = [{"data": row, "label": np.array(number)} for number, row in enumerate(data)]
    assert_all_same(scan_python(define(body)), expected)


def test_python_numbers_become_scalar_columns(define: Define) -> None:
    body = "return Items(5, lambda i: {'small': i, 'real': i / 2, 'flag': i > 2, 'x': np.full(3, i, '>i2')})"
    source = scan_python(define(body))
    assert source.schema.primary == "x"
    assert_all_same(
        source,
        [
            {"x": np.full(3, i, np.int16), "small": np.array(i), "real": np.array(i / 2), "flag": np.array(i > 2)}
            for i in range(5)
        ],
    )


def test_bits_survive_strides_byte_order_and_nan(define: Define) -> None:
    body = (
        "plain = np.arange(12, dtype=np.uint32).reshape(3, 4)\n"
        f"plain[1, 2] = {int(ODD_NAN)}\n"
        "swapped = plain.byteswap().view('>f4')\n"
        "backwards = np.ascontiguousarray(plain.view('f4')[::-1])[::-1]\n"
        "return [{'data': array} for array in (plain.view('f4'), swapped, np.asfortranarray(swapped), backwards)]"
    )
    source = scan_python(define(body))
    plain = np.arange(12, dtype=np.uint32).reshape(3, 4)
    plain[1, 2] = ODD_NAN
    assert_all_same(source, [{"data": plain.view(np.float32)}] * 4)


def test_bytes_are_an_encoded_field(define: Define) -> None:
    source = scan_python(define("return Items(5, lambda i: (b'abc' * (i + 1), i))"))
    assert source.schema.fields["data"].kind == "encoded"
    assert source.nbytes.tolist() == [3, 6, 9, 12, 15]
    records = read_source(source, 1, 3)
    assert [record["data"].tobytes() for record in records] == [b"abc" * 2, b"abc" * 3, b"abc" * 4]
    assert [int(record["label"]) for record in records] == [1, 2, 3]


def test_images_get_their_size_as_a_column(define: Define, jpeg_folder: Path) -> None:
    body = (
        f"import pathlib\npaths = sorted(pathlib.Path({str(jpeg_folder)!r}).glob('*/*.jpg'))[:5]\n"
        "return [(path.read_bytes() if i != 3 else b'no image', i) for i, path in enumerate(paths)]"
    )
    source = scan_python(define(body))
    assert source.schema.fields["data"].encoding == "image"
    records = read_source(source)
    assert [record["hw"].tolist() for record in records[:3]] == [[48, 72]] * 3
    assert refusals(source) == {"record 3": "not an image: it starts like neither JPEG nor PNG"}


def test_bfloat16_of_torch(define: Define, tmp_path: Path) -> None:
    body = (
        "def make(n):\n"
        "    whole, length = torch.full((2, 3), n + 0.5, dtype=torch.bfloat16), torch.full((n,), n, dtype=torch.bfloat16)\n"
        "    return {'x': whole, 'ragged': length, 'one': n / 2 if given else whole[0, 0]}\n"
        "items = Items(5, make)\n"
        "if given:\n"
        "    from stagein.formats import Field, Schema\n"
        "    kinds = {'x': ('tensor', (2, 3)), 'ragged': ('ragged', (None,)), 'one': ('tensor', ())}\n"
        "    fields = {name: Field(kind=k, dtype='bfloat16', shape=s) for name, (k, s) in kinds.items()}\n"
        "    items.schema = Schema(fields=fields, primary='x')\n"
        "return items"
    )
    for given in (0, 1):
        convert(scan_python(define(f"given = {given}\n{body}")), tmp_path / f"{given}.st")
        dataset = Dataset(tmp_path / f"{given}.st")
        assert {field.dtype for field in dataset.schema.fields.values()} == {"bfloat16"}
        for number, record in enumerate(dataset):
            assert record["x"].astype(np.float32).tolist() == [[number + 0.5] * 3] * 2
            assert record["ragged"].astype(np.float32).tolist() == [number] * number
            assert float(record["one"]) == (number / 2 if given else number + 0.5)


def test_a_schema_may_be_given(define: Define) -> None:
    body = (
        "from stagein.formats import Field, Schema\n"
        "items = Items(5, lambda i: {'t': np.zeros(2, 'f4'), 'label': i * 70})\n"
        "items.schema = Schema(primary='t', fields={'t': Field(kind='tensor', dtype='float32', shape=(2,)),\n"
        "    'label': Field(kind='tensor', dtype='uint8', meta={'classes': ['a', 'b']})})\n"
        "return items"
    )
    source = scan_python(define(body))
    assert source.schema.fields["label"].meta == {"classes": ["a", "b"]}
    assert_same_bits(read_source(source)[3], {"t": np.zeros(2, np.float32), "label": np.array(210, np.uint8)})
    assert refusals(source) == {"record 4": "field 'label': its value 280 is none of uint8"}


def test_primary_may_be_chosen(define: Define) -> None:
    source = scan_python(define("return [{'a': np.zeros(2), 'b': np.zeros(9)}] * 3"), primary="a")
    assert source.nbytes.tolist() == [16] * 3


def test_records_that_differ_are_refused_by_number(define: Define) -> None:
    body = (
        "good = {'x': np.zeros((2, 3), 'f4'), 'n': 1}\n"
        "return [good, {**good, 'x': np.zeros((2, 4), 'f4')}, {**good, 'x': np.zeros((2, 3))}, {'x': good['x']},\n"
        "    {**good, 'more': 1}, {**good, 'n': [1]}, {**good, 'n': None}, {**good, 'x': 'text'}, good, good]"
    )
    source = scan_python(define(body))
    assert refusals(source) == {
        "record 1": "field 'x': float32 of shape (2, 4), expected float32 of shape (2, 3)",
        "record 2": "field 'x': float64 of shape (2, 3), expected float32 of shape (2, 3)",
        "record 3": "its fields are x, not x, n",
        "record 4": "its fields are x, n, more, not x, n",
        "record 5": "field 'n': int64 of shape (1,), expected int64 of shape ()",
        "record 6": "field 'n': a NoneType is no array of numbers",
        "record 7": "field 'x': a str is no array of numbers",
    }


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("return 7", UsageError, r"returns a int, .*stagein\.formats\.Writer"),
        ("return {'x': np.zeros(3)}", UsageError, "returns a dict"),
        ("return []", SourceError, "gives no records"),
        ("raise OSError('no such disk')", SourceError, "failed: OSError: no such disk"),
        ("return Items(3, lambda i: 1 / 0)", SourceError, "record 0 of .* failed: ZeroDivisionError"),
        ("return [np.zeros(3)]", SourceError, "record 0 of .* is a ndarray: make it a dict of fields, or a pair"),
        ("return [{}]", UsageError, "have no fields"),
        (
            "return [{'x': object()}]",
            UsageError,
            r"field 'x': a object is no array of numbers \(a field is an array, a number, bytes or a string\)",
        ),
        ("return [{'x': torch.zeros(3, dtype=torch.float8_e5m2)}]", UsageError, "field 'x': a Tensor that is no array"),
        ("return [{'x': np.zeros(3, np.longdouble)}]", UsageError, "field 'x': dtype 'float128' is not .* take one of"),
        ("return [{'x': np.zeros((0, 3))}]", UsageError, "the primary field 'x' has records of no bytes"),
        ("return [{'x': [[1], [1, 2]]}]", UsageError, "field 'x': a list that is no array"),
        ("return [{'not a name': np.zeros(3)}]", UsageError, "cannot be the name of a field"),
        ("items = Items(3, int)\nitems.schema = 7\nreturn items", UsageError, "its attribute schema is a int"),
    ],
)
def test_what_cannot_be_records_is_a_sentence(define: Define, body: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scan_python(define(body))


def test_functions_that_are_not_there_are_sentences(define: Define, tmp_path: Path) -> None:
    module = define("return []").partition(":")[0]
    with pytest.raises(UsageError, match="has no function missing"):
        scan_python(f"{module}:missing")
    with pytest.raises(UsageError, match="cannot be imported: ModuleNotFoundError"):
        scan_python("no_such_module_here:records")
    for target in ("module", "module:", ":function", "a/b.py:function", "module:a.b"):
        with pytest.raises(UsageError, match="names no function: write MODULE:FUNCTION"):
            scan_python(target)


def test_a_record_of_another_size_the_second_time_is_an_error(define: Define) -> None:
    body = "import random\nreturn Items(9, lambda i: (bytes(random.randrange(1000)), i))"
    source = scan_python(define(body))
    with pytest.raises(SourceError, match=r"bytes and now has .*: let the function give the same record each time"):
        read_source(source)


def test_a_record_that_fails_later_is_named(define: Define) -> None:
    source = scan_python(define("return Items(99, lambda i: {'x': np.zeros(3) if i != 3 else [][0]})"))
    with pytest.raises(SourceError, match=r"record 3 of .* failed: IndexError"):
        read_source(source)


def test_texts_lists_of_differing_lengths_and_several_files(define: Define, tmp_path: Path, jpeg_folder: Path) -> None:
    body = (
        f"files = sorted(__import__('pathlib').Path({str(jpeg_folder)!r}).glob('*/*.jpg'))[:13]\n"
        "return Items(13, lambda i: {'image': files[i].read_bytes(), 'boxes': np.full((i % 3, 4), i, 'f4'),\n"
        "    'caption': 'größe ' * i, 'mask': files[-1 - i].read_bytes(), 'weight': 1 if i % 2 else 0.5})"
    )
    source = scan_python(define(body))
    assert source.secondary_nbytes["boxes"].tolist() == [16 * (i % 3) for i in range(13)]
    convert(source, tmp_path / "x.st", workers=2)
    files = sorted(jpeg_folder.glob("*/*.jpg"))[:13]
    for i, record in enumerate(Dataset(tmp_path / "x.st")):
        assert record["image"].tobytes() == files[i].read_bytes()
        assert record["mask"].tobytes() == files[-1 - i].read_bytes()
        assert record["boxes"].tolist() == [[i] * 4] * (i % 3)
        assert record["caption"] == "größe " * i
        assert record["weight"] == (1 if i % 2 else 0.5)


def test_a_new_scan_asks_the_function_anew(define: Define, tmp_path: Path) -> None:
    target = define("import pathlib\nreturn [{'x': np.zeros(3)}] * int(pathlib.Path('count.txt').read_text())")
    for count in (3, 5):
        (tmp_path / "count.txt").write_text(str(count))
        assert len(scan_python(target).nbytes) == count


def test_marks_follow_the_code_of_the_module(define: Define) -> None:
    one, two, three = (scan_python(define(f"return [{{'x': np.zeros(3)}}] * 5  # {text}")) for text in ("a", "a", "b"))
    assert one.module_sha256 == two.module_sha256 != three.module_sha256
    assert one.part(np.arange(0, 2)).mark() != one.part(np.arange(2, 4)).mark()


@pytest.mark.parametrize("workers", [1, 2])
def test_converted_records_are_the_items(define: Define, tmp_path: Path, workers: int) -> None:
    source = scan_python(define("return deepcam_samples()"))
    convert(source, tmp_path / "x.st", shard_bytes=128 << 10, workers=workers)
    dataset = Dataset(tmp_path / "x.st")
    assert len(dataset.manifest.shards) > 1
    for record, sample in zip(dataset, deepcam_samples(), strict=True):
        assert record["data"].tobytes() == sample["data"].tobytes()
        assert np.array_equal(record["label"], sample["label"])
