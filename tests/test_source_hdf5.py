"""HDF5 files as sources: look-alikes of DeepCAM, ways to store an array, and files that are no records."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from lookalikes import (
    DEEPCAM_SHAPE,
    NUM_SAMPLES,
    assert_all_same,
    assert_same_bits,
    read_source,
    refusals,
    write_deepcam_hdf5,
    write_deepcam_single,
)

from stagein.formats import Dataset, convert
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.source import RefusedRecord
from stagein.formats.sources.hdf5 import scan_hdf5

STORAGE = {
    "contiguous": {},
    "gzip": {"compression": "gzip", "chunks": (2, 8, 12, 4), "shuffle": True},
    "chunked": {"chunks": (3, 24, 36, 16), "fletcher32": True},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A look-alike of DeepCAM, one file a sample."""
    write_deepcam_hdf5(tmp_path / "deep cam")
    return tmp_path / "deep cam"


def test_a_file_a_sample(tmp_path: Path) -> None:
    samples = write_deepcam_hdf5(tmp_path / "train")
    source = scan_hdf5(tmp_path / "train")
    assert source.schema.primary == "data"
    assert source.schema.fields["data"].shape == DEEPCAM_SHAPE
    assert source.nbytes.tolist() == [samples[0]["data"].nbytes] * NUM_SAMPLES
    assert_all_same(source, samples)


def test_fields_and_primary_are_chosen_by_path(tmp_path: Path) -> None:
    samples = write_deepcam_hdf5(tmp_path / "train")
    source = scan_hdf5(tmp_path / "train", fields={"mask": "climate/labels_0"})
    assert_all_same(source, [{"mask": sample["label"]} for sample in samples])


@pytest.mark.parametrize("storage", STORAGE)
def test_rows_of_one_file(tmp_path: Path, storage: str) -> None:
    samples = write_deepcam_single(tmp_path / "train.h5", **STORAGE[storage])
    assert_all_same(scan_hdf5(tmp_path / "train.h5"), samples)


def test_a_row_may_be_a_single_number(tmp_path: Path) -> None:
    data, label = np.arange(35, dtype=np.float32).reshape(7, 5), np.arange(7) ** 2
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["data"], file["labels"] = data, label
        file.create_dataset("deflated", data=label, compression="gzip", chunks=(3,))
    expected = [{"data": row, "label": np.int64(number)} for row, number in zip(data, label, strict=True)]
    assert_all_same(scan_hdf5(tmp_path / "x.h5"), expected)
    assert_all_same(scan_hdf5(tmp_path / "x.h5", fields={"data": "data", "label": "deflated"}), expected)


SMALL = np.linspace(-3, 3, 24).reshape(2, 3, 4)
ARRAYS = {
    "big-endian floats": SMALL.astype(">f4"),
    "big-endian integers": SMALL.astype(">i2"),
    "half": SMALL.astype("<f2"),
    "double": SMALL,
    "complex": (SMALL + 1j).astype(np.complex64),
    "big-endian complex": (SMALL + 1j).astype(">c16"),
    "bool": SMALL > 0,
    "scalar": np.float32(2.5),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("way", ["contiguous", "compressed", "compact", "user block"])
def test_every_type_and_way_to_store_it(tmp_path: Path, name: str, way: str) -> None:
    array = np.asarray(ARRAYS[name])
    if array.dtype.kind == "f" and array.ndim:
        array.reshape(-1)[5] = np.nan
    (tmp_path / "x").mkdir()
    with h5py.File(tmp_path / "x/0.h5", "w", userblock_size=512 if way == "user block" else None) as file:
        if way == "compressed" and array.ndim:
            file.create_dataset("values", data=array, compression="gzip")
        elif way == "compact":
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_layout(h5py.h5d.COMPACT)
            space, kind = h5py.h5s.create_simple(array.shape), h5py.h5t.py_create(array.dtype, logical=True)
            h5py.Dataset(h5py.h5d.create(file.id, b"values", kind, space, plist))[...] = array
        else:
            file["values"] = array
    (record,) = read_source(scan_hdf5(tmp_path / "x"))
    assert_same_bits(record, {"data": array})


def test_a_signalling_nan_keeps_its_bits_when_turned_round(tmp_path: Path) -> None:
    bits = np.array([0x7FA12345, 0xFFA54321, 0x7FC00001], np.uint32)
    for name, options in (("contiguous", {}), ("deflated", {"compression": "gzip"})):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            values = file.create_dataset("data", (1, 3), ">f4", **options)
            values[...] = bits.byteswap().view(">f4").reshape(1, 3)
        (record,) = read_source(scan_hdf5(tmp_path / f"{name}.h5"))
        assert record["data"].view(np.uint32).tolist() == bits.tolist()


def test_a_type_that_numpy_has_not_is_read_as_what_the_library_makes_of_it(tmp_path: Path) -> None:
    bfloat16 = h5py.h5t.IEEE_F32LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)
    bfloat16.set_size(2)
    bfloat16.set_ebias(127)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        values = h5py.h5d.create(file.id, b"data", bfloat16, h5py.h5s.create_simple((3, 2)))
        h5py.Dataset(values)[...] = np.array([[1, 2], [-3, 0.5], [256, 0]], np.float32)
    records = read_source(scan_hdf5(tmp_path / "x.h5"))
    assert [record["data"].tolist() for record in records] == [[1, 2], [-3, 0.5], [256, 0]]


def test_data_outside_the_file_and_data_never_written(tmp_path: Path) -> None:
    outside = np.arange(6, dtype=np.int32)
    (tmp_path / "outside.raw").write_bytes(outside.tobytes())
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("never", (3, 2), np.int32, fillvalue=7)
        raw = [(str(tmp_path / "outside.raw"), 0, outside.nbytes)]
        file.create_dataset("outside", (3, 2), np.int32, external=raw)
    records = read_source(scan_hdf5(tmp_path / "x.h5", fields={"data": "never", "other": "outside"}))
    assert [record["data"].tolist() for record in records] == [[7, 7]] * 3
    assert [record["other"].tolist() for record in records] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("storage", [{}, {"chunks": (2, 3)}], ids=["contiguous", "chunked"])
def test_data_that_are_links_into_another_file(tmp_path: Path, storage: dict[str, tuple[int, int]]) -> None:
    data = np.arange(12, dtype=np.int32).reshape(4, 3)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file.create_dataset("values", data=data, **storage)
    (tmp_path / "samples").mkdir()
    for path in (tmp_path / "rows.h5", tmp_path / "samples" / "0.h5"):
        with h5py.File(path, "w") as file:
            file["values"] = np.full((4, 3), -1, np.int32)
            file["data"] = h5py.ExternalLink(str(tmp_path / "data.h5"), "values")
    rows = read_source(scan_hdf5(tmp_path / "rows.h5", fields={"data": "data"}))
    assert [record["data"].tolist() for record in rows] == data.tolist()
    (record,) = read_source(scan_hdf5(tmp_path / "samples", fields={"data": "data"}))
    assert record["data"].tolist() == data.tolist()


def replace(path: Path, **arrays: object) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name.replace("__", "/")] = array


def test_files_that_are_no_records_are_refused_by_name(folder: Path) -> None:
    good = sorted(folder.iterdir())
    data, label = np.zeros(DEEPCAM_SHAPE, np.float32), np.zeros(DEEPCAM_SHAPE[:2], np.float32)
    good[0].write_bytes(good[0].read_bytes()[:-2000])
    good[1].write_bytes(b"no HDF5\n" * 100)
    replace(good[3], climate__data=data[0], climate__labels_0=label)
    replace(good[4], climate__data=data)
    replace(good[5], climate__data=data.astype(np.float64), climate__labels_0=label)
    good[6].write_bytes(b"")
    source = scan_hdf5(folder)
    assert source.refused == (RefusedRecord(good[6].name, "the file is empty"),)
    reasons = refusals(source)
    assert list(reasons) == [good[number].name for number in (0, 1, 3, 4, 5)]
    assert "cannot be opened as HDF5" in reasons[good[0].name]
    assert "truncated" in reasons[good[0].name]
    assert "cannot be opened as HDF5" in reasons[good[1].name]
    assert "float32 of shape (36, 16), expected float32 of shape (24, 36, 16)" in reasons[good[3].name]
    assert "it has no data set climate/labels_0: it has climate/data" in reasons[good[4].name]
    assert "float64 of shape (24, 36, 16), expected float32" in reasons[good[5].name]
    assert isinstance(read_source(source)[2], dict)


def test_a_damaged_chunk_refuses_its_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        values = np.arange(28).reshape(7, 4)
        chunk = file.create_dataset("data", data=values, chunks=(2, 4), fletcher32=True).id.get_chunk_info(1)
    with open(path, "r+b") as file:
        file.seek(chunk.byte_offset + 3)
        file.write(b"\xff")
    records = read_source(scan_hdf5(path))
    assert [isinstance(record, RefusedRecord) for record in records] == [False, False, True, True, False, False, False]
    assert records[2].name == "x.h5 row 2"
    assert "its data set data cannot be read" in records[2].reason


def test_a_chunk_of_several_rows_is_decompressed_once(tmp_path: Path) -> None:
    values = np.arange(4.0)[:, None, None] * np.ones((600, 1000))  # chunks larger than any cache of the library's own
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("data", data=values, chunks=(2, 600, 1000), compression="gzip")
        chunks = [data.id.get_chunk_info(number) for number in range(2)]
    source = scan_hdf5(tmp_path / "x.h5")
    room = bytearray(values[0].nbytes)
    records = source.part(np.arange(0, 4)).read(lambda name, nbytes: memoryview(room))
    next(records)
    with open(tmp_path / "x.h5", "r+b") as file:  # from now on, only what is in memory already is good
        for chunk in chunks:
            file.seek(chunk.byte_offset)
            file.write(bytes(chunk.size))
    next(records)
    assert bytes(room) == values[1].tobytes()
    assert isinstance(next(records), RefusedRecord)


def test_a_file_of_rows_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_deepcam_single(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(SourceError, match=r"x\.h5: it cannot be opened as HDF5: .*truncated"):
        scan_hdf5(path)
    replace(path, data=np.zeros((7, 3)), labels=np.zeros(6))
    with pytest.raises(SourceError, match="data has 7 rows, labels has 6 rows"):
        scan_hdf5(path)
    replace(path, data=3.0)
    with pytest.raises(SourceError, match="single value where there should be rows"):
        scan_hdf5(path)
    replace(path, data=h5py.Empty("f4"))
    with pytest.raises(SourceError, match="its data set data is empty: it has no shape"):
        scan_hdf5(path)
    replace(path, data=["text", "more"])
    with pytest.raises(SourceError, match="the data set data holds Python objects or text"):
        scan_hdf5(path)
    replace(path, data=np.zeros(3, [("x", "f4"), ("y", "i4")]))
    with pytest.raises(SourceError, match="no plain numbers"):
        scan_hdf5(path)


def test_fields_that_cannot_be_guessed_are_listed(tmp_path: Path) -> None:
    replace(tmp_path / "x.h5", density=np.zeros((7, 3)), group__velocity=np.zeros((7, 2)))
    with pytest.raises(
        UsageError, match=r"density \(7, 3\), group/velocity \(7, 2\): say by --field NAME=DATASET which"
    ):
        scan_hdf5(tmp_path / "x.h5")
    with pytest.raises(UsageError, match="primary field 'nothing' is not among"):
        scan_hdf5(tmp_path / "x.h5", fields={"a": "density"}, primary="nothing")
    with pytest.raises(SourceError, match="no data set energy: it has density, group/velocity"):
        scan_hdf5(tmp_path / "x.h5", fields={"data": "energy"})


def test_folders_without_anything_to_read_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        scan_hdf5(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"holds no files \*\.h5"):
        scan_hdf5(tmp_path)
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(SourceError, match="every record has an empty file"):
        scan_hdf5(tmp_path)
    (tmp_path / "b.h5").write_bytes(b"no HDF5")
    with pytest.raises(SourceError, match=r"none of the 1 records .* can be read, the first of them: .*b\.h5"):
        scan_hdf5(tmp_path)


def test_a_pattern_leaves_out_statistics_beside_the_samples(folder: Path) -> None:
    replace(folder / "stats.h5", climate__count=7)
    assert "no data set climate/data" in refusals(scan_hdf5(folder))["stats.h5"]
    assert refusals(scan_hdf5(folder, pattern="data-*.h5")) == {}


def test_a_file_that_changes_after_the_scan_is_noticed(folder: Path) -> None:
    source = scan_hdf5(folder)
    changed = sorted(folder.iterdir())[3]
    content = changed.read_bytes()
    changed.write_bytes(content + b"x")
    with pytest.raises(SourceError, match="changed while it was converted"):
        read_source(source)
    changed.unlink()
    with pytest.raises(SourceError, match="No such file"):
        read_source(source)


def test_marks_tell_versions_apart_and_identity_is_the_same_elsewhere(folder: Path, tmp_path: Path) -> None:
    source = scan_hdf5(folder)
    moved = scan_hdf5(folder.rename(tmp_path / "elsewhere"))
    assert moved.identity() == source.identity()
    assert moved.part(np.arange(0, 2)).mark() != source.part(np.arange(0, 2)).mark()
    assert moved.part(np.arange(0, 2)).mark() != moved.part(np.arange(1, 3)).mark()
    other = scan_hdf5(tmp_path / "elsewhere", fields={"data": "climate/data"})
    assert other.identity() != moved.identity()


@pytest.mark.parametrize("workers", [1, 2])
def test_converted_records_are_the_samples(tmp_path: Path, workers: int) -> None:
    samples = write_deepcam_hdf5(tmp_path / "train")
    convert(scan_hdf5(tmp_path / "train"), tmp_path / "x.st", shard_bytes=128 << 10, workers=workers)
    dataset = Dataset(tmp_path / "x.st")
    assert len(dataset.manifest.shards) > 1
    for record, sample in zip(dataset, samples, strict=True):
        assert record["data"].tobytes() == sample["data"].tobytes()
        assert np.array_equal(record["label"], sample["label"])


def test_the_odd_one_is_refused_even_if_it_is_the_first(tmp_path: Path) -> None:
    expected = write_deepcam_hdf5(tmp_path / "x")
    with h5py.File(tmp_path / "x" / "data-0 odd.h5", "w") as file:
        file["climate/data"], file["climate/labels_0"] = np.zeros((2, 2)), np.zeros(2)
    with h5py.File(tmp_path / "x" / "data-1 other.h5", "w") as file:
        file["a"], file["b"] = 1, 2
    source = scan_hdf5(tmp_path / "x")
    refused = refusals(source)
    assert refused.keys() == {"data-0 odd.h5", "data-1 other.h5"}
    for record, sample in zip(read_source(source)[2:], expected, strict=True):
        assert_same_bits(record, sample)
