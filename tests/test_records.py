"""Records of every kind of field, written and read back alike by us and by other people's libraries."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from readers import assert_read_alike

from stagein import formats
from stagein.formats import Dataset, Field, Schema, Writer, verify
from stagein.formats.codecs import Codec
from stagein.formats.errors import NoSpaceError, UsageError
from stagein.formats.manifest import Container
from stagein.formats.schema import BFLOAT16
from stagein.formats.shards import DEFAULT_SHARD_BYTES
from stagein.formats.values import quick_storing, to_rows

CONTAINERS = [container for container in get_args(Container) if container != "foreign"]
CODECS = [
    None,
    Codec(name="blosc-lz4", shuffle="byte"),
    Codec(name="blosc-lz4", shuffle="bit"),
    Codec(name="zstd"),
    Codec(name="lz4"),
]
DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES += ["float16", "float32", "float64", "complex64", "complex128", BFLOAT16]
SHARD_BYTES = 40_000


def random_array(dtype: str, shape: tuple[int, ...], seed: int) -> NDArray[np.generic]:
    """Any bits but those of no bool; few different ones, so that codecs have something to do."""
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return generator.random(shape) < 0.5
    numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == BFLOAT16 else dtype)
    count = int(np.prod(shape)) * numpy_dtype.itemsize
    content = generator.integers(0, 256, min(count, 64), dtype=np.uint8) if count else np.zeros(0, np.uint8)
    return np.resize(content, count).view(numpy_dtype).reshape(shape)


def assert_same(field: Field, read: Any, written: Any) -> None:
    """The very bits, type and shape that were written."""
    if isinstance(written, str):
        assert read == written
    elif isinstance(written, bytes):
        assert read.tobytes() == written
    else:
        assert (read.dtype, read.shape) == (field.array_dtype, written.shape)
        assert read.tobytes() == written.tobytes()


def assert_round_trip(dataset: Dataset, records: list[dict[str, Any]]) -> None:
    assert len(dataset) == len(records)
    for read, written in zip(dataset[:], records, strict=True):
        assert list(read) == list(dataset.fields)
        for name, field in dataset.fields.items():
            assert_same(field, read[name], written[name])
    assert verify(dataset.path).problems == []
    assert_read_alike(dataset)


@st.composite
def fields(draw: st.DrawFn) -> Field:
    kind = draw(st.sampled_from(["encoded", "ragged", "tensor", "tensor", "text"]))
    if kind in ("encoded", "text"):
        return Field(kind=kind, encoding="bytes" if kind == "encoded" else None)
    dtype = draw(st.sampled_from(DTYPES))
    tail = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    if kind == "ragged":
        before = draw(st.sampled_from([(), (), (None,), (2, None), (None, 3)]))
        return Field(kind="ragged", dtype=dtype, shape=(*before, None, *tail))
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 7, 31, 64]), max_size=3)))
    codec = draw(st.sampled_from(CODECS))
    storage = draw(st.sampled_from([None, "shards"]))
    return Field(kind="tensor", dtype=dtype, shape=shape, codec=codec, storage=storage)


def any_value(draw: st.DrawFn, field: Field) -> Any:
    if field.kind == "text":
        return draw(st.text(max_size=20)) * draw(st.sampled_from([0, 1, 40, 900]))
    seed = draw(st.integers(0, 9))
    if field.kind == "encoded":
        size = draw(st.sampled_from([0, 1, 300, 5000, SHARD_BYTES, 70_000, 200_000]))
        return random_array("uint8", (size,), seed).tobytes()
    if field.kind == "tensor":
        return random_array(field.dtype, field.fixed_shape, seed)
    if field.has_shapes:
        shape = (draw(st.sampled_from([0, 1, 5, 17])) if extent is None else extent for extent in field.shape)
        return random_array(field.dtype, tuple(shape), seed)
    rows = draw(st.sampled_from([0, 1, 5, 100, 3 * SHARD_BYTES // field.row_bytes]))
    return random_array(field.dtype, (rows, *field.row_shape), seed)


@given(data=st.data(), container=st.sampled_from(CONTAINERS), count=st.sampled_from([0, 1, 13]))
@settings(max_examples=60)
def test_any_records_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, container: Container, count: int
) -> None:
    drawn = data.draw(st.lists(fields(), min_size=1, max_size=4))
    if container != "hdf5":  # Zarr has no codec lz4
        plain = [field.codec is None or field.codec.name != "lz4" for field in drawn]
        drawn = [
            field if good else field.model_copy(update={"codec": None})
            for field, good in zip(drawn, plain, strict=True)
        ]
    schema = Schema(fields={f"field{number}": field for number, field in enumerate(drawn)})
    draw = data.draw
    records = [
        {name: any_value(lambda strategy: draw(strategy), field) for name, field in schema.fields.items()}
        for _ in range(count)
    ]
    target = tmp_path_factory.mktemp("records") / "x.st"
    with Writer(target, schema, container=container, shard_bytes=SHARD_BYTES, chunk_bytes=16 << 10) as writer:
        for record in records:
            writer.write(record)
    assert_round_trip(Dataset(target), records)


COMBINATIONS = [
    (container, codec)
    for container in CONTAINERS
    for codec in CODECS
    if container == "hdf5" or codec is None or codec.name != "lz4"  # which Zarr has not
]


@pytest.mark.parametrize(("container", "codec"), COMBINATIONS, ids=str)
def test_every_kind_and_type_in_every_container_with_every_codec(
    tmp_path: Path, container: Container, codec: Codec | None
) -> None:
    """Two shards of every field that is large, and every other as a column; codecs are for tensors alone."""
    fields: dict[str, Field] = {}
    for dtype in DTYPES:
        fields[f"large_{dtype}"] = Field(kind="tensor", dtype=dtype, shape=(2, 3, 7), codec=codec, storage="shards")
        if codec is None:
            fields[f"ragged_{dtype}"] = Field(kind="ragged", dtype=dtype, shape=(None, 5), storage="shards")
            fields[f"small_ragged_{dtype}"] = Field(kind="ragged", dtype=dtype, shape=(None, 5), storage="column")
            fields[f"small_{dtype}"] = Field(kind="tensor", dtype=dtype, shape=(7,))
            fields[f"scalar_{dtype}"] = Field(kind="tensor", dtype=dtype)
    for storage in ("shards", "column"):
        fields[f"text_{storage}"] = Field(kind="text", storage=storage)  # type: ignore[arg-type]
        fields[f"file_{storage}"] = Field(kind="encoded", encoding="bytes", storage=storage)  # type: ignore[arg-type]

    def value(field: Field, number: int) -> Any:
        if field.kind == "text":
            return "größe ☃ " * number
        shape = field.fixed_shape if field.kind == "tensor" else (number, *field.row_shape)
        array = random_array(field.dtype, shape, number)
        return array.tobytes() if field.kind == "encoded" else array

    schema = Schema(fields=fields, primary=f"large_{DTYPES[0]}")
    records = [{name: value(field, number) for name, field in fields.items()} for number in range(5)]
    each = sum(field.record_bytes for field in schema.large_fields.values() if not field.is_variable)
    with Writer(tmp_path / "x.st", schema, container=container, shard_bytes=4 * each) as writer:
        for record in records:
            writer.write(record)
    dataset = Dataset(tmp_path / "x.st")
    assert dataset.manifest.num_shards == 2
    assert_round_trip(dataset, records)


def test_big_endian_input_is_stored_little_endian(tmp_path: Path) -> None:
    values = np.arange(3 * 2000).reshape(3, 2000) * 1.5
    records = [{"x": row.astype(">f8"), "y": row[:3].astype(">f4"), "z": row[: number + 1].astype(">c16")}
               for number, row in enumerate(values)]  # fmt: skip
    with Writer(tmp_path / "x.st") as writer:
        for record in records:
            writer.write(record)
    dataset = Dataset(tmp_path / "x.st")
    assert [field.dtype for field in dataset.fields.values()] == ["float64", "float32", "complex128"]
    for read, written in zip(dataset, records, strict=True):
        assert all(np.array_equal(read[name], written[name]) for name in written)
    with h5py.File(dataset.path / dataset.manifest.shards[0].file) as file:
        assert file["x/data"].dtype == "<f8"
        assert file["y"].dtype == "<f4"
    assert_read_alike(dataset)


def test_bfloat16_is_named_where_its_bits_are_stored(tmp_path: Path) -> None:
    exact = np.array([1.5, -2.0, np.inf, 2.0**120], np.float32)
    bits = exact.view(np.uint32) >> 16
    schema = Schema(fields={"x": Field(kind="tensor", dtype=BFLOAT16, shape=(4,))})
    given: list[Any] = [
        exact.astype(ml_dtypes.bfloat16),
        bits.astype(np.uint16),
        torch.tensor([1.5, -2.0, torch.inf, 2.0**120], dtype=torch.bfloat16),
        [1.5, -2.0, np.inf, 2.0**120],
    ]
    with Writer(tmp_path / "x.st", schema) as writer:
        for value in given:
            writer.write({"x": value})
        with pytest.raises(UsageError, match="does not fit into bfloat16"):
            writer.write({"x": np.array([1.5, -2.0, 1.001, 0], np.float32)})
    dataset = Dataset(tmp_path / "x.st")
    assert [record["x"].dtype for record in dataset] == [np.dtype(ml_dtypes.bfloat16)] * 4
    for value in (1.001, 1.00390625, 1.01171875, -3.3e38, 3.3895314e38, 1e-41, float("nan")):
        rows = to_rows(schema.fields["x"], [value] * 4)
        assert rows.tobytes() == np.full(4, value, np.float32).astype(ml_dtypes.bfloat16).tobytes()
    odd_nan = np.array([0x7FFFFFFF] * 4, np.uint32).view(np.float32)
    assert np.isnan(to_rows(schema.fields["x"], odd_nan.tolist()).view(ml_dtypes.bfloat16)).all()
    rounded = exact.astype(ml_dtypes.bfloat16)
    assert all(record["x"].tobytes() == rounded.tobytes() for record in dataset)
    with h5py.File(dataset.path / dataset.manifest.shards[0].file) as file:
        assert file["x/data"].attrs["dtype"] == BFLOAT16
    import zarr

    assert zarr.open_group(dataset.path, mode="r")["x"].attrs["dtype"] == BFLOAT16


TORCH_DTYPES = [name for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)]


@pytest.mark.parametrize(("dtype", "has_ml_dtypes"), [*((dtype, True) for dtype in TORCH_DTYPES), (BFLOAT16, False)])
def test_torch_tensors_keep_their_type_without_a_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, has_ml_dtypes: bool
) -> None:
    arrays = [random_array(dtype, (number + 1, 3000), number) for number in range(3)]
    tensors = [
        torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) if dtype == BFLOAT16 else torch.from_numpy(array)
        for array in arrays
    ]
    if not has_ml_dtypes:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with Writer(tmp_path / "x.st") as writer:
        for tensor in tensors:
            tensor = tensor.clone()
            writer.write({"large": tensor[0], "scalar": tensor[0, 0], "ragged": tensor, "turned": tensor[:1, :5].T})
            tensor.zero_()  # what was written is a copy
    monkeypatch.undo()
    dataset = Dataset(tmp_path / "x.st")
    assert {field.dtype for field in dataset.fields.values()} == {dtype}
    for read, array in zip(dataset, arrays, strict=True):
        expected = {"large": array[0], "scalar": array[0, 0], "ragged": array, "turned": array[:1, :5].T}
        assert all(read[name].tobytes() == value.tobytes() for name, value in expected.items())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_torch_tensors_of_types_that_no_field_has_are_refused(tmp_path: Path, dtype: str) -> None:
    tensor = torch.zeros(3).to(getattr(torch, dtype))
    with pytest.raises(UsageError, match="a Tensor that is no array"), Writer(tmp_path / "x.st") as writer:
        writer.write({"x": tensor})


def test_bfloat16_tensors_are_numbers_to_fields_of_other_types(tmp_path: Path) -> None:
    """Not their bits."""
    tensor = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    fields = {name: Field(kind="tensor", dtype=name, shape=(2,)) for name in ("float32", "int16", "uint16")}
    assert to_rows(fields["float32"], tensor).tolist() == [[1.5, -2.0]]
    assert to_rows(fields["int16"], 2 * tensor).tolist() == [[3, -4]]
    with pytest.raises(ValueError, match="does not fit into uint16"):
        to_rows(fields["uint16"], tensor)
    with Writer(tmp_path / "x.st") as writer:
        for value in (tensor, tensor.to(torch.float32), tensor):
            writer.write({"x": value})
    assert Dataset(tmp_path / "x.st").fields["x"].dtype == "float32"


def test_a_record_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    records = [{"x": bytes([number]) * size} for number, size in enumerate([10, 90_000, 0, 1_000_000, 5, 300_000])]
    schema = Schema(fields={"x": Field(kind="encoded", encoding="bytes")})
    for container in CONTAINERS:
        target = tmp_path / f"{container}.st"
        with Writer(target, schema, container=container, shard_bytes=70_000) as writer:
            for record in records:
                writer.write(record)
        dataset = Dataset(target)
        assert [shard.records for shard in dataset.manifest.shards] == [1, 1, 1, 1, 1, 1]
        assert_round_trip(dataset, records)


# What people have


def write(target: Path, records: list[dict[str, Any]], **options: Any) -> Dataset:
    with Writer(target, shard_bytes=200_000, **options) as writer:
        for record in records:
            writer.write(record)
    return Dataset(target)


def picture(generator: np.random.Generator, suffix: str = ".jpg", channels: int = 3) -> bytes:
    import cv2

    shape = (*generator.integers(40, 90, 2), channels)
    return bytes(cv2.imencode(suffix, generator.integers(0, 3, shape, dtype=np.uint8))[1])


def test_detection(tmp_path: Path) -> None:
    """Images with any number of boxes: the boxes are small, so that they are kept whole."""
    generator = np.random.default_rng(0)
    records = [
        {
            "image": picture(generator),
            "boxes": generator.random((int(generator.integers(0, 6)), 4), np.float32),
            "name": f"größe {number}.jpg",
        }
        for number in range(53)
    ]
    for record in records:
        record["classes"] = np.arange(len(record["boxes"]), dtype=np.int32)
    dataset = write(tmp_path / "x.st", records)
    assert {name: field.kind for name, field in dataset.fields.items()} == {
        "image": "encoded", "boxes": "ragged", "name": "text", "classes": "ragged",
    }  # fmt: skip
    assert {name: field.storage for name, field in dataset.fields.items()} == {
        "image": "shards", "boxes": "column", "name": "column", "classes": "column",
    }  # fmt: skip
    assert dataset.fields["image"].encoding == "jpeg"
    assert_round_trip(dataset, records)


def test_tokens(tmp_path: Path) -> None:
    """Documents of any length, and the same packed to one."""
    generator = np.random.default_rng(0)
    documents = [{"tokens": generator.integers(0, 50_000, int(size), dtype=np.uint16)}
                 for size in generator.integers(0, 9000, 101)]  # fmt: skip
    dataset = write(tmp_path / "ragged.st", documents)
    assert str(dataset.fields["tokens"]) == "uint16 [?]"
    assert_round_trip(dataset, documents)
    whole = np.concatenate([document["tokens"] for document in documents])
    packed = [{"tokens": row} for row in whole[: len(whole) // 2049 * 2049].reshape(-1, 2049)]
    dataset = write(tmp_path / "packed.st", packed)
    assert_round_trip(dataset, packed)
    assert np.array_equal(dataset.read_tensors([5, 0]), [packed[5]["tokens"], packed[0]["tokens"]])


def test_audio(tmp_path: Path) -> None:
    """Encoded sound with what is said in it."""
    import io
    import wave

    def sound(number: int) -> bytes:
        content = io.BytesIO()
        with wave.open(content, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(np.arange(4000 + 31 * number, dtype=np.int16).tobytes())
        return content.getvalue()

    records = [{"audio": sound(number), "text": "Wie spät ist es? 何時ですか" * (number % 3)} for number in range(53)]
    dataset = write(tmp_path / "x.st", records)
    assert dataset.fields["audio"].encoding == "wav"
    assert_round_trip(dataset, records)


def test_segmentation(tmp_path: Path) -> None:
    """Two files a record: both are large, so each has shards of its own."""
    generator = np.random.default_rng(0)
    records = [{"image": picture(generator), "mask": picture(generator, ".png", 1) + bytes(5000)} for _ in range(53)]
    dataset = write(tmp_path / "x.st", records)
    assert [name for name, field in dataset.fields.items() if field.storage == "shards"] == ["image", "mask"]
    assert (dataset.path / "shards/mask/00000.h5").is_file()
    assert_round_trip(dataset, records)


@pytest.mark.parametrize("codec", [None, "auto", {"label": Codec(name="zstd")}], ids=["none", "auto", "label"])
def test_volumes(tmp_path: Path, codec: Any) -> None:
    """A volume and the label of every voxel of it."""
    generator = np.random.default_rng(0)
    records = [
        {
            "volume": generator.poisson(1, (16, 17, 18)).astype(np.int16),
            "label": (generator.random((16, 17, 18)) < 0.01).astype(np.uint8),
            "spacing": np.array([0.5, 0.5, 2.0]),
        }
        for number in range(53)
    ]
    dataset = write(tmp_path / "x.st", records, codec=codec)
    codecs = {name: field.codec and field.codec.name for name, field in dataset.fields.items()}
    assert codecs == {
        "volume": "blosc-lz4" if codec == "auto" else None,
        "label": {"auto": "blosc-lz4"}.get(codec) if not isinstance(codec, dict) else "zstd",
        "spacing": None,
    }
    assert_round_trip(dataset, records)


def test_codecs_by_name(tmp_path: Path) -> None:
    records = [{"volume": np.full((40, 50), number, np.float32)} for number in range(3)]
    stored = {
        name: write(tmp_path / f"{number}.st", records, codec=name).fields["volume"].codec
        for number, name in enumerate(["none", "zstd", "blosc-lz4:bit"])
    }
    assert stored == {"none": None, "zstd": Codec(name="zstd"), "blosc-lz4:bit": Codec(name="blosc-lz4", shuffle="bit")}
    with pytest.raises(UsageError, match="the codec 'gzip' is not known: take one of auto, none, zstd"):
        Writer(tmp_path / "x.st", codec={"volume": "gzip"})


@pytest.mark.parametrize("codec", ["blosc-lz4", "zstd"])
@pytest.mark.parametrize("shard_bytes", [DEFAULT_SHARD_BYTES, 1 << 14])
def test_tiny_records_that_grow_when_compressed(tmp_path: Path, codec: str, shard_bytes: int) -> None:
    """A shard has room for what its records are, not for the most that each may become: that were 183 GB."""
    records = np.random.default_rng(0).integers(0, 256, (6_000, 6), np.uint8)
    with formats.Writer(tmp_path / "tiny.st", codec=codec, shard_bytes=shard_bytes) as writer:
        for record in records:
            writer.write({"x": record})
    dataset = formats.open(tmp_path / "tiny.st")
    assert np.array_equal(np.stack([record["x"] for record in dataset]), records)


# The writer and the reader as a user meets them


def test_a_data_set_is_a_sequence(tmp_path: Path) -> None:
    write(tmp_path / "x.st", [{"x": np.full(2000, number), "n": number} for number in range(29)])
    with formats.open(tmp_path / "x.st") as dataset:
        assert len(dataset) == 29
        assert list(dataset.fields) == ["x", "n"]
        assert "29 records of x: int64 [2000], n: int64" in repr(dataset)
        assert dataset[-1]["n"] == dataset[np.int32(28)]["n"] == 28
        assert [record["n"] for record in dataset[3:20:7]] == [3, 10, 17]
        assert [record["n"] for record in dataset[[5, 5, -1]]] == [5, 5, 28]
        assert [record["n"] for record in dataset[np.array([2, 0])]] == [2, 0]
        assert [int(record["x"][7]) for record in dataset] == list(range(29))
        assert dataset[9:9] == []
        for wrong in (29, -30, [3, 29]):
            with pytest.raises(IndexError):
                dataset[wrong]


def test_what_the_writer_is_given_may_change_afterwards(tmp_path: Path) -> None:
    array, content, listed = np.zeros(3000), bytearray(b"abc"), [0, 0]
    with Writer(tmp_path / "x.st") as writer:
        for number in range(50):
            array[:], content[0], listed[1] = number, number, number
            writer.write({"x": array, "y": content, "z": listed})
    for number, record in enumerate(Dataset(tmp_path / "x.st")):
        assert (record["x"] == number).all()
        assert record["y"].tobytes() == bytes([number]) + b"bc"
        assert record["z"].tolist() == [0, number]


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_large_bytes_are_stored_from_where_they_are_as_copies_are(tmp_path: Path, codec: str | None) -> None:
    random = np.random.default_rng(0)
    sizes = (20_000, 5, 0, 16 << 10, (16 << 10) - 1, 100_000, 30_000, 1)
    records = [{"image": random.bytes(size), "x": random.normal(size=(64, 64))} for size in sizes * 10]
    for name, kind in (("kept", bytes), ("copied", bytearray)):
        with Writer(tmp_path / name, codec=codec, shard_bytes=200_000) as writer:
            for record in records:
                writer.write({"image": kind(record["image"]), "x": record["x"]})
    assert not verify(tmp_path / "kept").problems
    dataset = Dataset(tmp_path / "kept")
    assert dataset.manifest.id == Dataset(tmp_path / "copied").manifest.id
    assert len(dataset.manifest.shards) > 4
    for number, record in enumerate(records):
        assert bytes(dataset[number]["image"]) == record["image"]
        np.testing.assert_array_equal(dataset[number]["x"], record["x"])


def test_threads_may_share_a_writer(tmp_path: Path) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with Writer(tmp_path / "x.st", shard_bytes=SHARD_BYTES) as writer, ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda n: writer.write({"x": np.full(50, n), "y": n, "text": str(n)}), range(8000)))
    finally:
        sys.setswitchinterval(before)
    records = list(Dataset(tmp_path / "x.st"))
    assert sorted(int(record["y"]) for record in records) == list(range(8000))
    for record in records:
        assert record["text"] == str(record["y"])
        assert (record["x"] == record["y"]).all()
    assert not list(verify(tmp_path / "x.st").problems)


def test_a_writer_lets_go_of_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_durable = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda descriptor: is_durable.wait())
    records = [bytes([number]) * 20_000 for number in range(90)]
    alone = sys.getrefcount(records[0])
    with Writer(
        tmp_path / "x.st", Schema(fields={"x": Field(kind="encoded", encoding="bytes")}), shard_bytes=400_000
    ) as writer:
        for record in records:
            writer.write({"x": record})
        until, held = time.monotonic() + 60, [0]
        while held[0] < 60 and time.monotonic() < until:  # another thread may be at one of them still
            held = [number for number in range(90) if sys.getrefcount(records[number]) > alone]
        is_durable.set()
    assert held == list(range(held[0], 90)), held
    assert held[0] >= 60, "three shards of 20 records are written, if not yet on the disk"


def test_python_floats_take_the_precision_of_their_field(tmp_path: Path) -> None:
    schema = Schema(fields={"x": Field(kind="tensor", dtype="float32", shape=(2,))})
    with Writer(tmp_path / "x.st", schema) as writer:
        writer.write({"x": [0.1, 0.2]})
        with pytest.raises(UsageError, match="float64 does not fit into float32"):
            writer.write({"x": np.array([0.1, 0.2])})
        with pytest.raises(UsageError, match="does not fit into float32"):
            writer.write({"x": [1e39, 0]})
    assert Dataset(tmp_path / "x.st")[0]["x"].tolist() == np.array([0.1, 0.2], np.float32).tolist()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"x": b"a", "n": 1}, r"has the fields \['n', 'x'\], the schema"),
        ({"x": "text", "n": 1, "b": [], "t": ""}, "field 'x': it is encoded: give its bytes, not str"),
        ({"x": b"", "n": 1, "b": [], "t": b"text"}, "field 't': it is text: give a string, not bytes"),
        ({"x": b"", "n": 1, "b": [], "t": "\ud800"}, "field 't': it is no text that UTF-8 has"),
        ({"x": b"", "n": 1.5, "b": [], "t": ""}, "field 'n': a value of type float64 does not fit into int8"),
        ({"x": b"", "n": 300, "b": [], "t": ""}, "field 'n': a value of type int64 does not fit into int8"),
        ({"x": b"", "n": [1], "b": [], "t": ""}, r"field 'n': its shape is \(1,\), not \(\)"),
        ({"x": b"", "n": None, "b": [], "t": ""}, "field 'n': a NoneType is no array of numbers"),
        ({"x": b"", "n": 1, "b": [[1, 2, 3]], "t": ""}, r"field 'b': its shape is \(1, 3\), not \(any, 4\)"),
        ({"x": b"", "n": 1, "b": [[1], [1, 2]], "t": ""}, "field 'b': a list that is no array"),
    ],
)
@pytest.mark.parametrize("written", [0, 40], ids=["first", "later"])
def test_records_that_do_not_fit_are_refused_and_leave_nothing(
    tmp_path: Path, record: dict[str, Any], message: str, written: int
) -> None:
    schema = Schema(
        fields={
            "x": Field(kind="encoded", encoding="bytes"),
            "n": Field(kind="tensor", dtype="int8"),
            "b": Field(kind="ragged", dtype="float32", shape=(None, 4)),
            "t": Field(kind="text"),
        }
    )
    good = {"x": b"abc", "n": -5, "b": [[1, 2, 3, 4]], "t": "ä"}
    with Writer(tmp_path / "x.st", schema) as writer:
        for _ in range(written):
            writer.write(good)
        with pytest.raises(UsageError, match=message):
            writer.write(record)
        writer.write(good)
    dataset = Dataset(tmp_path / "x.st")
    assert len(dataset) == written + 1
    assert {record["t"] for record in dataset} == {"ä"}
    assert {record["x"].tobytes() for record in dataset} == {b"abc"}
    assert verify(dataset.path).problems == []


@pytest.mark.parametrize("count", [0, 40])
@pytest.mark.parametrize("record", [[1], None, 7, "x"])
def test_what_is_no_record_is_a_sentence(tmp_path: Path, count: int, record: Any) -> None:
    with (
        pytest.raises(UsageError, match=f"is a {type(record).__name__}: make it a dict"),
        Writer(tmp_path / "x") as writer,
    ):
        for number in range(count):
            writer.write({"x": number})
        writer.write(record)
    assert not list(tmp_path.iterdir())


def test_lists_that_make_no_array_are_a_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="record 0: field 'x': a list that is no array"),
        Writer(tmp_path / "x") as writer,
    ):
        writer.write({"x": [[1, 2], [3]]})


@pytest.mark.parametrize("count", [1, 40])
def test_a_closed_writer_takes_no_more(tmp_path: Path, count: int) -> None:
    with Writer(tmp_path / "x") as writer:
        for number in range(count):
            writer.write({"x": number})
        manifest = writer.close()
        assert writer.close() is manifest
        with pytest.raises(UsageError, match="closed"):
            writer.write({"x": count})
    assert len(Dataset(tmp_path / "x")) == count


def test_schemas_that_cannot_be_guessed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing was written, so there is no schema"), Writer(tmp_path / "x.st"):
        pass
    with (
        pytest.raises(
            UsageError, match=r"field 'x': its shapes .* have other numbers of extents: no field takes all of them"
        ),
        Writer(tmp_path / "x.st") as writer,
    ):
        writer.write({"x": np.zeros((2, 3))})
        writer.write({"x": np.zeros((2, 3, 4))})
    with (
        pytest.raises(UsageError, match="field 'x': a dict is no array of numbers"),
        Writer(tmp_path / "x.st") as writer,
    ):
        writer.write({"x": {}})
    with (
        pytest.raises(UsageError, match=r"field 'x': its shape is \(4,\), not \(3,\); the first records said so"),
        Writer(tmp_path / "x.st") as writer,
    ):
        for number in range(100):
            writer.write({"x": np.zeros(3 if number < 70 else 4)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "tensor", "dtype": ">f4"}, "is not a little-endian number type"),
        ({"kind": "tensor", "dtype": "object"}, "is not a little-endian number type"),
        ({"kind": "tensor", "dtype": "float128"}, "is not"),
        ({"kind": "tensor", "dtype": "wrong"}, "dtype 'wrong' is not known"),
        ({"kind": "tensor", "shape": (None,)}, "its kind is ragged"),
        ({"kind": "tensor", "shape": (-1,)}, "negative extent"),
        ({"kind": "tensor", "shape": (1 << 40,)}, "above the limit"),
        ({"kind": "ragged", "shape": (4,)}, "a ragged field has a free extent"),
        ({"kind": "ragged", "shape": (None, None, 0)}, "rows of no bytes"),
        ({"kind": "ragged", "shape": (None, 0)}, "rows of no bytes"),
        ({"kind": "ragged", "shape": (None,), "codec": {"name": "zstd"}}, "it has no codec"),
        ({"kind": "encoded", "encoding": "jpeg", "codec": {"name": "zstd"}}, "is compressed already"),
        ({"kind": "encoded"}, "names its encoding"),
        ({"kind": "text", "dtype": "float32"}, "it has no dtype"),
        ({"kind": "tensor", "encoding": "jpeg"}, "has no encoding"),
        ({"kind": "tensor", "shape": (2, 3), "dims": ("a",)}, "name 1 extents, the shape has 2"),
    ],
)
def test_fields_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Field(**arguments)


SMALL = Field(kind="tensor", dtype="int64")
LARGE = Field(kind="tensor", dtype="int64", shape=(1000,))


@pytest.mark.parametrize(
    ("fields", "primary", "message"),
    [
        ({}, "", "a record without fields"),
        ({"a": SMALL}, "b", "is not among the fields"),
        ({"a b": SMALL}, "", "cannot be the name of a field"),
        ({"index": SMALL}, "", "cannot be the name of a field"),
        ({"a": SMALL, "b": Field(kind="ragged", shape=(None,), rows_of="c")}, "", "lists the rows of 'c'"),
        ({"a": SMALL, "A": SMALL}, "", "differ only in case"),
        ({"a": Field(kind="tensor", shape=(0,))}, "a", "records of no bytes"),
        ({"a": SMALL.model_copy(update={"storage": "column"})}, "a", "cannot be a column"),
        ({"a": LARGE, "b": LARGE.model_copy(update={"storage": "column"})}, "a", "a column at most 4096"),
    ],
)
def test_schemas_that_cannot_be(fields: dict[str, Field], primary: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schema(fields=fields, primary=primary)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "'' cannot be the name of a field: take letters"),
        ("a/b", "'a/b' cannot be the name of a field: take letters"),
        ("..", "'..' cannot be the name of a field: take letters"),
        ("index", "data sets use it themselves"),
        ("a" * 10_000, "the name 'aaaaaaaaaaaaaaaaaaaa…' of a field is too long"),
        ("漢" * 90, "of a field is too long"),
        (3, "3 cannot be the name of a field: take a string"),
    ],
    ids=["empty", "a path", "the folder above", "reserved", "long", "long in bytes", "a number"],
)
def test_a_name_that_cannot_be_is_told_in_a_sentence(tmp_path: Path, name: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as raised, Writer(tmp_path / "x.st") as writer:
        writer.write({name: b"abc"})
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "value"), [("shard_bytes", 0), ("chunk_bytes", 1000)])
def test_sizes_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"of {value} bytes"):
        Writer(tmp_path / "x.st", **{name: value})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_small_fields_are_columns_unless_there_is_too_much_of_them() -> None:
    schema = Schema(
        fields={
            "x": LARGE,
            "embedding": SMALL.model_copy(update={"shape": (384,)}),
            "label": SMALL,
            "text": Field(kind="text"),
            "boxes": Field(kind="ragged", dtype="float32", shape=(None, 4)),
        }
    )

    def columns(num_records: int | None, text_bytes: float = 200.0) -> set[str]:
        resolved = schema.resolved({"text": text_bytes, "boxes": 60.0}, num_records)
        return {name for name, field in resolved.fields.items() if field.storage == "column"}

    assert columns(None) == columns(1000) == {"embedding", "label", "text", "boxes"}
    assert columns(1_000_000) == {"label", "text", "boxes"}
    assert columns(10**9) == {"label", "boxes"}
    assert columns(1000, text_bytes=5000) == {"embedding", "label", "boxes"}


def test_the_primary_field_is_the_first_that_is_not_small() -> None:
    text = Field(kind="text")
    assert Schema(fields={"n": SMALL, "x": LARGE, "t": text}).primary == "x"
    assert Schema(fields={"n": SMALL, "t": text, "x": LARGE}).primary == "t"
    assert Schema(fields={"n": SMALL, "m": SMALL.model_copy(update={"shape": (3,)})}).primary == "m"


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored_quickly_is_what_is_stored_slowly(dtype: str) -> None:
    tensor = Field(kind="tensor", dtype=dtype, shape=(2, 3))
    ragged, scalar = Field(kind="ragged", dtype=dtype, shape=(None, 3)), Field(kind="tensor", dtype=dtype)
    array = random_array(dtype, (4, 3), 1)
    numbers: list[Any] = [
        0,
        1,
        -1,
        1.5,
        -0.0,
        1e300,
        float("nan"),
        float("inf"),
        2**31,
        2**63,
        2**64,
        10**400,
        True,
        1j,
    ]
    values: list[tuple[Field, Any]] = [(scalar, number) for number in [*numbers, *array[0]]]
    values += [(field, each) for field in (tensor, ragged) for each in (array, array[:2], array[:2, ::-1], array.T)]
    values += [(field, each.astype(each.dtype.newbyteorder(">"))) for field, each in values[-8:] if dtype != BFLOAT16]
    quick = 0
    for field, value in values:
        stored = quick_storing(field)(value)
        if stored is not None:
            quick += 1
            assert stored == to_rows(field, value).tobytes()
    assert quick >= 6 or dtype == BFLOAT16


def test_text_and_files_are_stored_quickly() -> None:
    assert quick_storing(Field(kind="text"))("plain") == b"plain"
    assert quick_storing(Field(kind="text"))(b"bytes") is None
    assert quick_storing(Field(kind="encoded", encoding="bytes"))(b"file") == b"file"
    assert quick_storing(Field(kind="encoded", encoding="bytes"))("text") is None


@pytest.mark.parametrize("disk_bytes", [100_000, 1_500_000])
def test_a_disk_that_gets_full_while_shards_are_written_is_a_sentence(tmp_path: Path, disk_bytes: int) -> None:
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", disk_bytes):
        with (
            pytest.raises(NoSpaceError, match="no space left while writing"),
            Writer(tmp_path / "disk/x.st", shard_bytes=400_000) as writer,
        ):
            for number in range(2000):
                writer.write({"x": number.to_bytes(2, "big") * 1000})
        assert list((tmp_path / "disk").iterdir()) == []
