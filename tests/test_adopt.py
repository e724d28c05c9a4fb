"""Adoption: HDF5 files and Zarr arrays that h5py and zarr-python wrote are read, verified and staged where they lie."""

import contextlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from stagein.formats import Dataset, Manifest, verify
from stagein.formats.errors import ChecksumError, NoSpaceError, SourceError, StageinError, UsageError
from stagein.formats.foreign.adoption import adopt, scan_foreign

CUBES = np.random.default_rng(0).poisson(2, (13, 3, 20, 20)).astype(np.int16)
LABELS = np.arange(13, dtype=np.float32)

HDF5_LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunks, no filter": {"chunks": (1, 3, 20, 20)},
    "blosc": {"chunks": (1, 3, 20, 20), **hdf5plugin.Blosc(cname="lz4", shuffle=hdf5plugin.Blosc.SHUFFLE)},
    "blosc of zstd": {"chunks": (1, 3, 20, 20), **hdf5plugin.Blosc(cname="zstd", shuffle=hdf5plugin.Blosc.BITSHUFFLE)},
    "zstd": {"chunks": (1, 3, 20, 20), **hdf5plugin.Zstd()},
    "lz4": {"chunks": (1, 3, 20, 20), **hdf5plugin.LZ4(nbytes=1024)},
}


def _write_hdf5(path: Path, rows: slice = slice(None), **layout: Any) -> Path:
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("group/x", data=CUBES[rows], **layout)
        file["label"] = LABELS[rows]
    return path


def _check(adopted: Path, labels: bool = True) -> None:
    dataset = Dataset(adopted)
    order = [12, 0, 7, 7]
    name = dataset.schema.primary
    assert np.array_equal(dataset.reader.read_tensors(order, threads=2), CUBES[order])
    assert np.array_equal(dataset[5][name], CUBES[5])
    if labels:
        assert np.array_equal(dataset.columns["label"], LABELS)
    report = verify(adopted)
    assert not report.problems
    assert report.sums > len(dataset)


@pytest.mark.parametrize("layout", HDF5_LAYOUTS)
def test_an_hdf5_file(tmp_path: Path, layout: str) -> None:
    source = _write_hdf5(tmp_path / "x.h5", **HDF5_LAYOUTS[layout])
    before = source.read_bytes()
    adopt(scan_foreign(source), tmp_path / "x.st")
    _check(tmp_path / "x.st")
    assert source.samefile(tmp_path / "x.st/shards/00000.h5")
    source.unlink()
    assert (tmp_path / "x.st/shards/00000.h5").read_bytes() == before
    _check(tmp_path / "x.st")


def test_lz4_blocks_that_others_store_raw(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (3, 5000), np.uint8)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=noise, chunks=(1, 5000), **hdf5plugin.LZ4(nbytes=2048))
    adopt(scan_foreign(tmp_path / "x.h5"), tmp_path / "x.st")
    dataset = Dataset(tmp_path / "x.st")
    assert np.array_equal(dataset.read_tensors([2, 0, 1]), noise[[2, 0, 1]])
    assert np.array_equal(dataset[1]["x"], noise[1])


def test_a_folder_of_hdf5_files(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number, rows in enumerate((slice(5), slice(5, 6), slice(6, 13))):
        _write_hdf5(tmp_path / f"files/{number}.hdf5", rows)
    adopt(scan_foreign(tmp_path / "files", {"cube": "group/x", "label": "label"}, "cube"), tmp_path / "x.st")
    _check(tmp_path / "x.st")


ZARR_LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"compressors": None},
    "zstd, as by default": {},
    "blosc": {"compressors": BloscCodec(cname="lz4", shuffle="bitshuffle")},
    "shards": {"compressors": None, "shards": (5, 3, 20, 20)},
    "shards of zstd": {"compressors": ZstdCodec(level=3, checksum=True), "shards": (5, 3, 20, 20)},
    "shards of blosc": {"compressors": BloscCodec(cname="lz4"), "shards": (13, 3, 20, 20)},
    "v2 keys": {"chunk_key_encoding": {"name": "v2", "separator": "."}},
}


def _write_zarr(folder: Path, **layout: Any) -> Path:
    options = {"chunks": (1, 3, 20, 20)} | layout
    array = zarr.create_array(folder, shape=CUBES.shape, dtype=CUBES.dtype, **options)
    array[:] = CUBES
    return folder


@pytest.mark.parametrize("layout", ZARR_LAYOUTS)
def test_a_zarr_array(tmp_path: Path, layout: str) -> None:
    adopt(scan_foreign(_write_zarr(tmp_path / "x.zarr", **ZARR_LAYOUTS[layout]), primary="cube"), tmp_path / "x.st")
    assert Dataset(tmp_path / "x.st").schema.primary == "cube"
    _check(tmp_path / "x.st", labels=False)


# Every type, as every library writes it

DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES += ["float16", "float32", "float64", "complex64", "complex128"]
SHAPE = (11, 3, 20, 7)
CHUNK = (1, *SHAPE[1:])


def _rows(dtype: Any) -> NDArray[np.generic]:
    counts = np.random.default_rng(0).poisson(3, SHAPE)
    return (counts > 2) if dtype == "bool" else counts.astype(dtype)


def _by_h5py(path: Path, rows: NDArray[np.generic], **layout: Any) -> None:
    with h5py.File(path, "w", libver=layout.pop("libver", None)) as file:
        file.create_dataset("x", data=rows, **layout)


def _by_zarr(path: Path, rows: NDArray[np.generic], **layout: Any) -> None:
    zarr.create_array(path, shape=rows.shape, dtype=rows.dtype, chunks=CHUNK, **layout)[:] = rows


def _by_tensorstore(
    path: Path,
    rows: NDArray[np.generic],
    chunk: tuple[int, ...] = CHUNK,
    inner: tuple[int, ...] = CHUNK,
    codecs: Any = None,
    **sharding: Any,
) -> None:
    metadata: dict[str, Any] = {"shape": rows.shape, "data_type": rows.dtype.name}
    metadata["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    if sharding:
        codecs = [{"name": "sharding_indexed", "configuration": {"chunk_shape": inner, "codecs": codecs, **sharding}}]
    spec = {
        "driver": "zarr3",
        "kvstore": f"file://{path}/",
        "metadata": metadata | ({"codecs": codecs} if codecs else {}),
    }
    tensorstore.open(spec, create=True).result()[...] = rows


LITTLE = [{"name": "bytes", "configuration": {"endian": "little"}}]
ZSTD = [*LITTLE, {"name": "zstd", "configuration": {"level": 1}}]
BLOSC = [*LITTLE, {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 3, "shuffle": "bitshuffle"}}]
SHARDS = (4, *SHAPE[1:])
WRITERS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "h5py, contiguous": (_by_h5py, {}),
    "h5py, chunks, of the oldest format": (_by_h5py, {"chunks": CHUNK, "libver": "earliest"}),
    "h5py, chunks that may grow, of the latest format": (
        _by_h5py, {"chunks": CHUNK, "maxshape": (None, *SHAPE[1:]), "libver": "latest"},
    ),
    "h5py, blosc": (_by_h5py, {"chunks": CHUNK, **hdf5plugin.Blosc()}),
    "h5py, blosc of zlib": (_by_h5py, {"chunks": CHUNK, "libver": "v110", **hdf5plugin.Blosc(cname="zlib", shuffle=2)}),
    "h5py, zstd": (_by_h5py, {"chunks": CHUNK, **hdf5plugin.Zstd(clevel=19)}),
    "h5py, lz4": (_by_h5py, {"chunks": CHUNK, **hdf5plugin.LZ4()}),
    "zarr-python, as by default": (_by_zarr, {}),
    "zarr-python, shards as by default": (_by_zarr, {"shards": SHARDS}),
    "zarr-python, blosc": (_by_zarr, {"compressors": BloscCodec(cname="lz4hc")}),
    "zarr-python, index first": (_by_zarr, {"shards": {"shape": SHARDS, "index_location": "start"}, "compressors": None}),
    "tensorstore, as by default": (_by_tensorstore, {}),
    "tensorstore, zstd": (_by_tensorstore, {"codecs": ZSTD}),
    "tensorstore, blosc": (_by_tensorstore, {"codecs": BLOSC}),
    "tensorstore, shards without a sum": (
        _by_tensorstore, {"chunk": SHARDS, "codecs": ZSTD, "index_codecs": LITTLE, "index_location": "start"},
    ),
    "tensorstore, shards of blosc": (
        _by_tensorstore, {"chunk": SHARDS, "codecs": BLOSC, "index_codecs": [*LITTLE, {"name": "crc32c"}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_every_type(tmp_path: Path, writer: str) -> None:
    write, layout = WRITERS[writer]
    for dtype in [*DTYPES, *([ml_dtypes.bfloat16] if write is _by_tensorstore else [])]:
        rows = _rows(dtype)
        source = tmp_path / f"ä {rows.dtype.name}.h5"
        write(source, rows, **layout)
        target = tmp_path / f"{rows.dtype.name}.st"
        adopt(scan_foreign(source, primary="x"), target)
        dataset = Dataset(target)
        assert dataset.fields["x"].dtype == rows.dtype.name
        read = dataset.reader.read_tensors([10, 0, 5, 5], threads=2)
        assert read.tobytes() == rows[[10, 0, 5, 5]].tobytes(), rows.dtype
        assert dataset[7]["x"].tobytes() == rows[7].tobytes()
        assert not verify(target).problems


def test_chunks_that_did_not_get_smaller_are_read_as_they_are(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (5, 600), np.uint8)
    _by_h5py(tmp_path / "x.h5", noise, chunks=(1, 600), **hdf5plugin.Blosc())
    adopt(scan_foreign(tmp_path / "x.h5"), tmp_path / "x.st")
    assert Dataset(tmp_path / "x.st").fields["x"].codec is None
    assert np.array_equal(Dataset(tmp_path / "x.st").read_tensors([4, 0]), noise[[4, 0]])
    noise[3] = 7
    _by_h5py(tmp_path / "y.h5", noise, chunks=(1, 600), **hdf5plugin.Blosc())
    with pytest.raises(
        UsageError, match=r"has some chunks without its filter, of record 0 the first.*use `stagein convert`"
    ):
        scan_foreign(tmp_path / "y.h5")


# Several large fields


def _check_pairs(adopted: Path, samples: Sequence[Mapping[str, NDArray[np.generic]]]) -> Dataset:
    dataset = Dataset(adopted)
    assert [name for name, field in dataset.fields.items() if field.storage == "shards"] == ["data", "label"]
    assert len(dataset) == len(samples)
    for record, sample in zip(dataset, samples, strict=True):
        for name, array in sample.items():
            assert (record[name].dtype, record[name].shape) == (array.dtype, array.shape)
            assert record[name].tobytes() == array.tobytes()
    report = verify(adopted, workers=2)
    assert not report.problems
    assert report.sums >= 2 * len(samples)
    return dataset


def _deepcam(count: int) -> list[dict[str, NDArray[np.generic]]]:
    generator = np.random.default_rng(3)
    return [
        {
            "data": generator.random((24, 36, 4), np.float32),
            "label": generator.integers(0, 3, (36, 50)).astype(np.float32),
        }
        for _ in range(count)
    ]


def test_deepcam_in_one_file_whose_fields_share_it(tmp_path: Path) -> None:
    samples = _deepcam(7)
    with h5py.File(tmp_path / "träin.h5", "w") as file:
        file["data"] = np.stack([sample["data"] for sample in samples])
        chunks = (1, 36, 50)
        labels = np.stack([sample["label"] for sample in samples])
        file.create_dataset("labels", data=labels, chunks=chunks, **hdf5plugin.Zstd())
    adopt(scan_foreign(tmp_path / "träin.h5", {"data": "data", "label": "labels"}), tmp_path / "x.st")
    dataset = _check_pairs(tmp_path / "x.st", samples)
    assert [shard.file for shard in dataset.manifest.shards] == ["shards/00000.h5"] * 2
    assert [entry.file for entry in dataset.manifest.all_files()].count("shards/00000.h5") == 1
    offset = int(dataset.readers["label"].index.offset[4])
    content = bytearray((tmp_path / "träin.h5").read_bytes())
    content[offset + 9] ^= 1
    with open(tmp_path / "träin.h5", "r+b") as edited:
        edited.write(content)
    with pytest.raises(ChecksumError, match=r"record 4 in .* is damaged"):
        Dataset(tmp_path / "x.st")[4]
    damaged = [problem.text for problem in verify(tmp_path / "x.st").problems]
    assert [text for text in damaged if "record" in text] == ["record 4 is damaged (crc32c)"]


@pytest.mark.parametrize("storage", [{}, {"chunks": True, **hdf5plugin.Blosc()}], ids=["contiguous", "one chunk"])
def test_deepcam_a_file_a_record(tmp_path: Path, storage: dict[str, Any]) -> None:
    samples = _deepcam(5)
    (tmp_path / "in").mkdir()
    for number, sample in enumerate(samples):
        with h5py.File(tmp_path / f"in/data-1996 ü {number}.h5", "w") as file:
            for name, place in (("data", "climate/data"), ("label", "climate/labels_0")):
                options = storage | ({"chunks": sample[name].shape} if storage else {})
                values = np.round(sample[name], 1) if storage else sample[name]
                sample[name] = values
                file.create_dataset(place, data=values, **options)
            file["climate/day"] = np.int64(number)
    fields = {"data": "climate/data", "label": "climate/labels_0", "day": "climate/day"}
    adopt(scan_foreign(tmp_path / "in", fields, file_per_record=True), tmp_path / "x.st")
    dataset = _check_pairs(tmp_path / "x.st", samples)
    assert [record["day"] for record in dataset] == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="of one row a record"):
        scan_foreign(tmp_path / "in", fields)


@pytest.mark.parametrize("shards", [None, 3], ids=["a file a record", "shards"])
def test_a_group_of_zarr_arrays(tmp_path: Path, shards: int | None) -> None:
    samples = _deepcam(7)
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    for name in ("data", "label"):
        rows = np.stack([sample[name] for sample in samples])
        options: dict[str, Any] = {"shards": (shards, *rows.shape[1:])} if shards else {}
        group.create_array(name, shape=rows.shape, dtype=rows.dtype, chunks=(1, *rows.shape[1:]), **options)[:] = rows
    group.create_array("number", data=np.arange(7), compressors=GzipCodec(), chunks=(3,))
    adopt(scan_foreign(tmp_path / "x.zarr", primary="data"), tmp_path / "x.st")
    dataset = _check_pairs(tmp_path / "x.st", samples)
    assert [int(record["number"]) for record in dataset] == list(range(7))
    assert dataset.manifest.num_shards == (3 if shards else 7)
    adopt(scan_foreign(tmp_path / "x.zarr", {"data": "label"}), tmp_path / "y.st")
    assert list(Dataset(tmp_path / "y.st").fields) == ["data"]
    group.create_array("short", data=np.arange(6))
    with pytest.raises(UsageError, match=r"has arrays of different lengths.*'short': 6"):
        scan_foreign(tmp_path / "x.zarr")
    rows = np.zeros((7, 2000)) + 1
    group.create_array("other", shape=rows.shape, dtype="f8", chunks=(1, 2000), shards=(5, 2000))[:] = rows
    with pytest.raises(UsageError, match=r"has 5 records a file, .* has [13]"):
        scan_foreign(tmp_path / "x.zarr", {"data": "data", "other": "other"}, "data")


def test_only_files_of_others_may_be_shared_by_fields(tmp_path: Path) -> None:
    samples = _deepcam(3)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name in ("data", "label"):
            file[name] = np.stack([sample[name] for sample in samples])
    content = adopt(scan_foreign(tmp_path / "x.h5"), tmp_path / "x.st").model_dump(mode="json", by_alias=True) | {
        "id": ""
    }

    def refused(change: Callable[[dict[str, Any]], None]) -> str:
        changed = json.loads(json.dumps(content))
        change(changed)
        with pytest.raises(ValueError, match="listed twice") as refusal:
            Manifest.model_validate(changed)
        return str(refusal.value)

    assert "in two ways" not in refused(lambda manifest: manifest.update(container="hdf5"))
    assert "in two ways" in refused(
        lambda manifest: manifest["shards"][1].update(nbytes=content["shards"][1]["nbytes"] - 1)
    )
    assert "in two ways" in refused(lambda manifest: manifest["shards"][1].update(xxh3_128="0" * 32))


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"chunks": (2, 3, 20, 20)}, "not of one record each"),
        ({"chunks": (1, 3, 10, 20)}, "not of one record each"),
        ({"chunks": (1, 3, 20, 20), "compression": "gzip"}, "filtered by deflate"),
        ({"chunks": (1, 3, 20, 20), "shuffle": True, **hdf5plugin.Zstd()}, "filtered by shuffle and"),
        ({"dtype": ">i2"}, "is big-endian"),
        ({"external": [("payload", 0, 31200)]}, "lies in other files"),
        ({"chunks": (1, 3, 20, 20), **hdf5plugin.Blosc(cname="snappy", shuffle=0)}, "by snappy within blosc"),
        ({"chunks": (1, 3, 20, 20), **hdf5plugin.Blosc2()}, "filtered by blosc2"),
    ],
    ids=str,
)
def test_hdf5_that_cannot_be_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"{reason}.* use `stagein convert`"):
        scan_foreign(_write_hdf5(tmp_path / "x.h5", **layout))


def test_hdf5_records_in_another_file_are_not_sought_in_this_one(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file, h5py.File(tmp_path / "y.h5", "w") as other:
        file["x"], other["y"] = np.zeros((5, 3000), "f4"), np.ones((5, 2000), "f4")
        file["y"] = h5py.ExternalLink("y.h5", "y")
    with pytest.raises(UsageError, match=r"x.h5:y is a link into another file, .* use `stagein convert`"):
        scan_foreign(tmp_path / "x.h5", fields={"x": "x", "y": "y"})


def test_hdf5_records_that_were_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", (5, 100), "f4", chunks=(1, 100))
        for row in (0, 1, 3, 4):
            dataset[row] = 1
    with pytest.raises(UsageError, match="has no chunk for record 2, only its fill value"):
        scan_foreign(tmp_path / "x.h5")
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file.create_dataset("x", (5, 100), "f4")
    with pytest.raises(UsageError, match="not written at all"):
        scan_foreign(tmp_path / "y.h5")


def test_hdf5_files_that_do_not_fit_together(tmp_path: Path) -> None:
    _write_hdf5(tmp_path / "a.h5")
    _write_hdf5(tmp_path / "b.h5", **HDF5_LAYOUTS["zstd"])
    with pytest.raises(UsageError, match=r"b.h5 has other fields than .*a.h5"):
        scan_foreign(tmp_path)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["short"] = [1, 2]
    with pytest.raises(UsageError, match="data sets of different lengths"):
        scan_foreign(tmp_path / "a.h5")
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    with pytest.raises(SourceError, match="cannot be read as HDF5"):
        scan_foreign(tmp_path)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"chunks": (2, 3, 20, 20)}, "not of one record each"),
        ({"chunks": (1, 3, 20, 10), "shards": (1, 3, 20, 20)}, "not of one record each"),
        ({"compressors": GzipCodec()}, "the codecs bytes and gzip"),
        ({"serializer": BytesCodec(endian="big")}, "of which only little-endian bytes"),
        ({"compressors": [ZstdCodec(), Crc32cCodec()]}, "the codecs bytes and zstd and crc32c"),
        ({"filters": [TransposeCodec(order=(0, 3, 2, 1))]}, "the codecs transpose and bytes and zstd"),
        ({"zarr_format": 2}, "is of Zarr v2"),
    ],
    ids=str,
)
def test_zarr_that_cannot_be_adopted(tmp_path: Path, layout: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=f"{reason}.* use `stagein convert python MODULE:FUNCTION`"):
        scan_foreign(_write_zarr(tmp_path / "x.zarr", **layout))


def test_zarr_that_is_incomplete_or_damaged(tmp_path: Path) -> None:
    folder = _write_zarr(tmp_path / "x.zarr", shards=(5, 3, 20, 20), compressors=None)
    shard = folder / "c/1/0/0/0"
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ChecksumError, match=r"the index of the shard .*c/1/0/0/0 is damaged"):
        scan_foreign(folder)
    shard.write_bytes(content[:20])
    with pytest.raises(SourceError, match="shorter than the index"):
        scan_foreign(folder)
    shard.unlink()
    with pytest.raises(UsageError, match="c/1/0/0/0 is not there"):
        scan_foreign(folder)


@given(data=st.data())
@settings(max_examples=150)
def test_any_description_of_an_array_is_adopted_or_refused_in_a_sentence(
    damaged_zarr: Path, data: st.DataObject
) -> None:
    """Any value of any kind anywhere in zarr.json."""
    path = damaged_zarr / "zarr.json"
    good = path.read_bytes()
    content = json.loads(good)
    place: Any = content
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    values = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=9))
    if data.draw(st.booleans()):
        place[key] = data.draw(
            st.one_of(values, st.lists(values, max_size=3), st.dictionaries(st.text(max_size=9), values))
        )
    else:
        del place[key]
    try:
        path.write_text(json.dumps(content))
        with contextlib.suppress(StageinError):
            adopt(scan_foreign(damaged_zarr), damaged_zarr.parent / "x.st", overwrite=True)
    finally:
        path.write_bytes(good)


@pytest.fixture(scope="module")
def damaged_zarr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_zarr(tmp_path_factory.mktemp("zarr") / "x.zarr", shards=(5, 3, 20, 20))


@pytest.mark.parametrize("entry", [(2**64 - 100, 2400), (0, 2**40), (2**40, 2400), (5 * 2400, 2400), (0, 2399)])
def test_an_index_without_a_sum_that_leads_out_of_its_file(tmp_path: Path, entry: tuple[int, int]) -> None:
    _by_tensorstore(
        tmp_path / "x", CUBES, chunk=(5, 3, 20, 20), inner=(1, 3, 20, 20), codecs=LITTLE, index_codecs=LITTLE
    )
    with open(tmp_path / "x/c/1/0/0/0", "r+b") as file:
        file.seek(-16, 2)
        file.write(struct.pack("<QQ", *entry))
    with pytest.raises(SourceError, match=r"c/1/0/0/0 has .*restore it from a good copy"):
        scan_foreign(tmp_path / "x")


def test_a_record_that_does_not_decode_and_an_edit_afterwards(tmp_path: Path) -> None:
    source = _write_hdf5(tmp_path / "x.h5", **HDF5_LAYOUTS["blosc"])
    records = scan_foreign(source)
    first, later = (int(records.shards[0].parts["x"].offset[number]) for number in (0, 7))
    content = bytearray(source.read_bytes())
    content[first + 4] ^= 1  # the size in the Blosc header
    source.write_bytes(content)
    with pytest.raises(ChecksumError, match=r"the first record of 'x' in .*x.h5 cannot be decoded"):
        adopt(records, tmp_path / "x.st")
    assert not list(tmp_path.glob("x.st*"))
    content[first + 4] ^= 1
    source.write_bytes(content)
    adopt(records, tmp_path / "x.st")
    content[later + 20] ^= 1
    with open(source, "r+b") as file:
        file.write(content)
    with pytest.raises(ChecksumError, match=r"record 7 in .* is damaged"):
        Dataset(tmp_path / "x.st").read_tensors([6, 7])
    assert any("record 7" in problem.text for problem in verify(tmp_path / "x.st").problems)


def test_no_room_and_nowhere_to_write(tmp_path: Path) -> None:
    for folder, size, option, error in (
        ("full", 16 << 10, "rw", NoSpaceError),
        ("read-only", 1 << 20, "ro", StageinError),
    ):
        disk = tmp_path / folder
        disk.mkdir()
        with small_disk(disk, size):
            with h5py.File(disk / "x.h5", "w") as file:
                file["x"] = np.zeros((5, 100))
            if option == "ro":
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            with pytest.raises(error, match=r"x.st"):
                adopt(scan_foreign(disk / "x.h5"), disk / "x.st")
            assert [path.name for path in disk.iterdir()] == ["x.h5"]


def test_the_commands(tmp_path: Path) -> None:
    """adopt, verify and stage, one after the other, of two large fields in one file."""
    _write_hdf5(tmp_path / "x.h5", **HDF5_LAYOUTS["blosc"])
    masks = np.arange(13 * 5000).reshape(13, 5000)
    with h5py.File(tmp_path / "x.h5", "a") as file:
        file["mask"] = masks

    def run(*arguments: object) -> dict[str, Any]:
        command = [sys.executable, "-m", "stagein.tools.cli", *map(str, arguments), "--json"]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
        result: dict[str, Any] = json.loads(output)
        return result

    options = ("--field", "cube=group/x", "--field", "label=label", "--field", "mask=mask", "--primary", "cube")
    assert run("adopt", tmp_path / "x.h5", tmp_path / "x.st", *options)["records"] == 13
    run("verify", tmp_path / "x.st")
    (tmp_path / "node").mkdir()
    assert (tmp_path / "x.h5").stat().st_size > 1 << 19
    with small_disk(tmp_path / "node", 1 << 20):  # room for the file once
        run("stage", tmp_path / "x.st", "--to", tmp_path / "node")
        (copy,) = (path.parent for path in (tmp_path / "node").rglob("manifest.json"))
        _check(copy)
        assert [record["mask"].tolist() for record in Dataset(copy)[[12, 3]]] == masks[[12, 3]].tolist()
