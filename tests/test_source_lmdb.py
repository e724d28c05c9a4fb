"""LMDB databases as others lay them out, converted and compared; pickles and damaged files, refused."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import lmdb
import numpy as np
import pytest
from pictures import jpeg, png

from stagein.formats import Dataset, convert, verify
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.sources.lmdb import scan_lmdb

COUNT = 13


def write(path: Path, content: Mapping[str, bytes], *, subdir: bool = False) -> Path:
    with (
        lmdb.open(str(path), map_size=1 << 24, subdir=subdir) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in content.items():
            transaction.put(key.encode(), value)
    return path


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.mark.parametrize("subdir", [False, True])
def test_images_by_number(tmp_path: Path, subdir: bool) -> None:
    content = {str(n): png(n) if n == 5 else jpeg(n) for n in range(COUNT)} | {"length": pickle.dumps(COUNT)}
    source = scan_lmdb(write(tmp_path / "träin 1.lmdb", content, subdir=subdir))
    assert source.schema.primary == "image"
    convert(source, tmp_path / "x.st", shard_bytes=4096, workers=2)
    assert not list(verify(tmp_path / "x.st").problems)
    dataset = Dataset(tmp_path / "x.st")
    assert [record["image"].tobytes() for record in dataset] == [content[str(n)] for n in range(COUNT)]
    assert {tuple(record["hw"]) for record in dataset} == {(8, 12)}


def test_several_databases_in_a_folder(tmp_path: Path) -> None:
    for part in range(3):
        write(tmp_path / f"data.000{part}.lmdb", {f"n{n} ö": jpeg(100 * part + n) for n in range(5)})
    convert(scan_lmdb(tmp_path), tmp_path / "x.st")
    expected = [jpeg(100 * part + n) for part in range(3) for n in range(5)]
    assert [record["image"].tobytes() for record in Dataset(tmp_path / "x.st")] == expected


def test_text_recognition(tmp_path: Path) -> None:
    content = {f"image-{n:09d}": jpeg(n) for n in range(1, COUNT)} | {"num-samples": b"12"}
    content |= {f"label-{n:09d}": f"wört {n}".encode() for n in range(1, COUNT)}
    content |= {f"count-{n:09d}": str(-n).encode() for n in range(1, COUNT)}
    path = write(tmp_path / "a.lmdb", content)
    fields = {"image": "image-*", "label": "label-*", "count": "count-*"}
    convert(scan_lmdb(path, fields=fields), tmp_path / "x.st")
    for n, record in enumerate(Dataset(tmp_path / "x.st"), 1):
        assert record["image"].tobytes() == jpeg(n)
        assert record["label"] == f"wört {n}"
        assert record["count"] == -n


def test_arrays_of_one_shape_and_of_several(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    content = {f"x{n}": npy(np.asfortranarray(generator.random((3, 4)))) for n in range(COUNT)}
    positions = [generator.random((n, 3), dtype=np.float32) for n in range(COUNT)]
    positions[4][2, 1] = np.nan
    content |= {f"pos{n}": npy(array) for n, array in enumerate(positions)}
    source = scan_lmdb(write(tmp_path / "a.lmdb", content), fields={"x": "x*", "pos": "pos*"})
    assert source.schema.fields["pos"].kind == "ragged"
    convert(source, tmp_path / "x.st")
    for n, record in enumerate(Dataset(tmp_path / "x.st")):
        assert np.array_equal(record["x"], np.load(io.BytesIO(content[f"x{n}"])))
        assert np.array_equal(record["pos"], positions[n], equal_nan=True)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_unopened(tmp_path: Path, protocol: int) -> None:
    path = write(tmp_path / "a.lmdb", {str(n): pickle.dumps(Bomb(), protocol) for n in range(3)})
    with pytest.raises(SourceError, match=r"its values are pickles, which run code .* convert python MODULE:FUNCTION"):
        scan_lmdb(path)
    path = write(tmp_path / "b.lmdb", {"0": jpeg(0), "1": pickle.dumps(Bomb(), protocol)})
    with pytest.raises(SourceError, match=r"b.lmdb: 1: its values are pickles"):
        convert(scan_lmdb(path), tmp_path / "x.st")


def test_records_that_are_none_are_refused(tmp_path: Path) -> None:
    content = {str(n): jpeg(n) for n in range(7)} | {"2": jpeg(2)[:-40], "4": b""}
    source = scan_lmdb(write(tmp_path / "a.lmdb", content))
    with pytest.raises(SourceError, match="2 things in it are no records"):
        convert(source, tmp_path / "x.st")
    assert [refused.name for refused in convert(source, tmp_path / "x.st", skip_bad=True).skipped] == [
        f"{tmp_path}/a.lmdb: {n}" for n in (2, 4)
    ]
    content = {f"image-{n}": jpeg(n) for n in range(3)} | {"label-0": b"1", "label-1": b"x"}
    source = scan_lmdb(write(tmp_path / "b.lmdb", content), fields={"image": "image-*", "label": "label-*"})
    (refused,) = source.refused
    assert refused.reason == "there is no key label-2"


def test_a_damaged_database_is_a_sentence(tmp_path: Path) -> None:
    """Cut anywhere, with its pages zeroed: an error, not the end of the process."""
    path = write(tmp_path / "a.lmdb", {str(n): jpeg(n) * 10 for n in range(50)})
    content = path.read_bytes()
    for end in range(0, len(content), len(content) // 7 + 1):
        path.write_bytes(content[:end])
        with pytest.raises(SourceError, match=r"opened as LMDB|truncated"):
            scan_lmdb(path)
    path.write_bytes(content)
    assert len(scan_lmdb(path).stems) == 50


def test_what_cannot_be_scanned(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no LMDB databases"):
        scan_lmdb(tmp_path)
    path = write(tmp_path / "a.lmdb", {"0": jpeg(0)})
    with pytest.raises(UsageError, match=r"are no pattern: write one \*"):
        scan_lmdb(path, fields={"x": "image"})
    with pytest.raises(SourceError, match=r"no key fits image-\*"):
        scan_lmdb(path, fields={"x": "image-*"})
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "empty.lmdb", {})
    with pytest.raises(SourceError, match="nothing to convert"):
        scan_lmdb(tmp_path / "b")
