"""Adoption: HDF5 files and Zarr arrays that h5py and zarr-python wrote are read, verified and staged where they lie."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import zarr
from disks import small_disk
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, ZstdCodec

from stagein.formats import Dataset, verify
from stagein.formats.errors import ChecksumError, SourceError, UsageError
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
    array = zarr.create_array(folder, shape=CUBES.shape, dtype=CUBES.dtype, zarr_format=3, **options)
    array[:] = CUBES
    return folder


@pytest.mark.parametrize("layout", ZARR_LAYOUTS)
def test_a_zarr_array(tmp_path: Path, layout: str) -> None:
    adopt(scan_foreign(_write_zarr(tmp_path / "x.zarr", **ZARR_LAYOUTS[layout]), primary="cube"), tmp_path / "x.st")
    assert Dataset(tmp_path / "x.st").schema.primary == "cube"
    _check(tmp_path / "x.st", labels=False)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"chunks": (2, 3, 20, 20)}, "not of one record each"),
        ({"chunks": (1, 3, 10, 20)}, "not of one record each"),
        ({"chunks": (1, 3, 20, 20), "compression": "gzip"}, "filtered by deflate"),
        ({"chunks": (1, 3, 20, 20), "shuffle": True, **hdf5plugin.Zstd()}, "filtered by shuffle and"),
        ({"dtype": ">i2"}, "is big-endian"),
        ({"external": [("payload", 0, 31200)]}, "lies in other files"),
    ],
    ids=str,
)
def test_hdf5_that_cannot_be_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"{reason}.* use `stagein convert`"):
        scan_foreign(_write_hdf5(tmp_path / "x.h5", **layout))


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
    ],
    ids=str,
)
def test_zarr_that_cannot_be_adopted(tmp_path: Path, layout: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=f"{reason}.* use `stagein convert`"):
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


def test_a_record_that_does_not_decode_and_an_edit_afterwards(tmp_path: Path) -> None:
    source = _write_hdf5(tmp_path / "x.h5", **HDF5_LAYOUTS["blosc"])
    records = scan_foreign(source)
    first, later = (int(records.files[0].offset[number]) for number in (0, 7))
    content = bytearray(source.read_bytes())
    content[first + 4] ^= 1  # the size in the Blosc header
    source.write_bytes(content)
    with pytest.raises(ChecksumError, match=r"the first record of .*x.h5 cannot be decoded"):
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


def test_the_commands(tmp_path: Path) -> None:
    """adopt, verify and stage, one after the other."""
    _write_hdf5(tmp_path / "x.h5", **HDF5_LAYOUTS["blosc"])

    def run(*arguments: object) -> dict[str, Any]:
        command = [sys.executable, "-m", "stagein.tools.cli", *map(str, arguments), "--json"]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
        result: dict[str, Any] = json.loads(output)
        return result

    options = ("--field", "cube=group/x", "--field", "label=label")
    assert run("adopt", tmp_path / "x.h5", tmp_path / "x.st", *options)["records"] == 13
    run("verify", tmp_path / "x.st")
    (tmp_path / "node").mkdir()
    with small_disk(tmp_path / "node", 4 << 20):
        run("stage", tmp_path / "x.st", "--to", tmp_path / "node")
        (copy,) = (path.parent for path in (tmp_path / "node").rglob("manifest.json"))
        _check(copy)
