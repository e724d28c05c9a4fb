"""Arrays of which several extents differ from record to record: packed from files and by hand, and read back in their shapes."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import run
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from lookalikes import assert_all_same, assert_same_bits, read_source, refusals
from mpi import run_ranks
from numpy.typing import NDArray
from readers import assert_read_alike

from stagein import formats
from stagein.formats import Dataset, Field, Schema, Writer, convert, verify
from stagein.formats.assembly import file_sums
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.manifest import Manifest
from stagein.formats.sources.hdf5 import scan_hdf5
from stagein.formats.sources.npy import scan_npy
from stagein.formats.values import fits_shapes
from stagein.loaders import DataLoader, PerSample, RecordDataset

CLI = (sys.executable, "-m", "stagein.tools.cli")
NUM_SAMPLES = 11
Arrays = dict[str, NDArray[np.generic]]


def volumes() -> list[Arrays]:
    """Scans and their labels as in kits19: one channel, and every extent of its own; one of them has no slices."""
    generator = np.random.default_rng(5)
    samples = []
    for number in range(NUM_SAMPLES):
        depth, height, width = generator.integers(9, 31, 3).tolist()
        scan = generator.standard_normal((1, depth * (number != 4), height, width)).astype(np.float32)
        samples.append({"x": scan, "y": (scan > 1).astype(np.uint8)})
    return samples


def write_npz(root: Path, samples: Sequence[Arrays]) -> Path:
    root.mkdir()
    for number, sample in enumerate(samples):
        np.savez(root / f"case_{number:05d}.npz", **sample)
    return root


def assert_holds(path: Path, samples: Sequence[Arrays]) -> None:
    """The data set has these records, however it is asked, and is well."""
    with formats.open(path) as dataset:
        assert len(dataset) == len(samples)
        for number, (read, sample) in enumerate(zip(dataset, samples, strict=True)):
            assert_same_bits(read, sample)
            assert_same_bits(dataset[number - len(samples)], sample)
        for read, sample in zip(dataset[1::2], samples[1::2], strict=True):
            assert_same_bits(read, sample)
        assert_read_alike(dataset)
    assert verify(path).problems == []


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of such scans."""
    root = tmp_path_factory.mktemp("scans")
    convert(scan_npy(write_npz(root / "npz", volumes())), root / "x.st", shard_bytes=200_000)
    return root / "x.st"


def test_the_command_packs_scans_and_gives_them_back(tmp_path: Path) -> None:
    samples = volumes()
    source, target = write_npz(tmp_path / "npz", samples), tmp_path / "x.st"
    options = ("--shard-bytes", "200kB", "--json")
    shown = run([*CLI, "convert", "npy", source, target, *options], check=True, capture_output=True, text=True)
    assert json.loads(shown.stdout)["records"] == NUM_SAMPLES
    assert_holds(target, samples)
    assert Dataset(target).manifest.num_shards > 1
    described = run([*CLI, "info", target], check=True, capture_output=True, text=True).stdout
    assert "float32 [1, ?, ?, ?]" in described
    assert f"0: x float32 {list(samples[0]['x'].shape)}, y uint8" in described
    run([*CLI, "extract", target, "7", "--to", tmp_path / "files"], check=True, capture_output=True)
    assert_same_bits({name: np.load(tmp_path / f"files/{name}-00000007.npy") for name in "xy"}, samples[7])


@pytest.mark.mpi
def test_workers_and_ranks_make_the_same_bytes(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "npz", volumes())
    command = (*CLI, "convert", "npy", source)
    run([*command, tmp_path / "one.st", "--shard-bytes", "100kB", "--workers", "1"], check=True, capture_output=True)
    run([*command, tmp_path / "two.st", "--shard-bytes", "100kB", "--workers", "2"], check=True, capture_output=True)
    result = run_ranks(2, *command, tmp_path / "ranks.st", "--shard-bytes", "100kB", "--workers", "1", nodes=["a", "b"])
    assert result.returncode == 0, result.stderr
    ids = {Dataset(tmp_path / name).manifest.id for name in ("one.st", "two.st", "ranks.st")}
    assert len(ids) == 1


def test_what_was_finished_is_kept_and_the_rest_comes_out_the_same(tmp_path: Path) -> None:
    samples = volumes()
    source = write_npz(tmp_path / "npz", samples)
    convert(scan_npy(source), tmp_path / "whole.st", shard_bytes=100_000)
    last = source / f"case_{NUM_SAMPLES - 1:05d}.npz"
    content = bytearray(last.read_bytes())
    damaged = content.copy()
    damaged[500] ^= 1
    last.write_bytes(damaged)
    with pytest.raises(SourceError, match="Bad CRC-32"):
        convert(scan_npy(source), tmp_path / "x.st", shard_bytes=100_000)
    last.write_bytes(content)
    converted = convert(scan_npy(source), tmp_path / "x.st", shard_bytes=100_000)
    assert converted.reused_shards == converted.manifest.num_shards - 1
    assert converted.manifest.id == Manifest.load(tmp_path / "whole.st").id
    assert_holds(tmp_path / "x.st", samples)


def test_files_of_one_array_keep_what_they_have_in_common(tmp_path: Path) -> None:
    arrays = [np.asfortranarray(np.arange(4.0 * n * m).reshape(2, n, m, 2).astype(">f8")) for n, m in [(3, 4), (5, 2)]]
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
    source = scan_npy(tmp_path)
    assert source.schema.fields["data"].shape == (2, None, None, 2)
    assert source.schema.fields["data"].row_shape == (2,)
    assert_all_same(source, [{"data": array.astype("<f8", order="C")} for array in arrays])


def test_where_the_first_extent_alone_differs_there_is_no_column_for_shapes(tmp_path: Path) -> None:
    samples = [{"data": np.full((n, 5), n, np.int16)} for n in (3, 0, 8)]
    for number, sample in enumerate(samples):
        np.save(tmp_path / f"{number}.npy", sample["data"])
    convert(scan_npy(tmp_path), tmp_path / "x.st")
    assert list(Dataset(tmp_path / "x.st").schema.fields) == ["data"]
    assert Dataset(tmp_path / "x.st").manifest.version == (1, 0)
    assert_holds(tmp_path / "x.st", samples)


@pytest.mark.parametrize("storage", [{}, {"chunks": True, "compression": "gzip"}], ids=["contiguous", "gzip"])
def test_hdf5_files_of_one_scan_each(tmp_path: Path, storage: dict[str, Any]) -> None:
    samples = [sample for number, sample in enumerate(volumes()) if number != 4]  # HDF5 has no chunks of no elements
    for number, sample in enumerate(samples):
        with h5py.File(tmp_path / f"{number:03d}.h5", "w") as file:
            for name, array in sample.items():
                file.create_dataset(name, data=array, **storage)
    source = scan_hdf5(tmp_path, fields={"x": "x", "y": "y"})
    assert source.schema.fields["x"].shape == (1, None, None, None)
    assert_all_same(source, samples)
    convert(source, tmp_path / "x.st", shard_bytes=150_000)
    assert_holds(tmp_path / "x.st", samples)


def test_few_of_another_shape_are_refused_unless_any_may_come(tmp_path: Path) -> None:
    samples = [{"data": np.full((4, 6 + (number == 5), 3), number, np.float32)} for number in range(NUM_SAMPLES)]
    root = write_npz(tmp_path / "npz", samples)
    source = scan_npy(root)
    assert source.schema.fields["data"].kind == "tensor"
    assert refusals(source) == {
        "case_00005.npz": "its array data is float32 of shape (4, 7, 3), expected float32 of shape (4, 6, 3): "
        "where records may differ in shape, pass --any-shape"
    }
    convert_any = ("convert", "npy", root, tmp_path / "x.st", "--any-shape")
    run([*CLI, *convert_any], check=True, capture_output=True)
    assert Dataset(tmp_path / "x.st").fields["data"].shape == (4, None, 3)
    assert_holds(tmp_path / "x.st", samples)


def test_rows_have_one_shape_and_that_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((4, 3)))
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["data"] = np.zeros((4, 3))
    for scan in (
        lambda: scan_npy(tmp_path / "rows.npy", any_shape=True),
        lambda: scan_npy(tmp_path, fields={"data": "rows.npy"}, any_shape=True),
        lambda: scan_hdf5(tmp_path / "rows.h5", any_shape=True),
    ):
        with pytest.raises(UsageError, match="its records are rows of arrays, all of one shape: leave out --any-shape"):
            scan()


def test_what_differs_in_more_than_extents_is_refused_by_name(tmp_path: Path) -> None:
    root = write_npz(tmp_path / "npz", volumes())
    others = {
        0: {"x": np.zeros((3, 4), np.float32), "y": np.zeros((1, 3, 4, 5), np.uint8)},
        3: {"x": np.zeros((1, 3, 4, 5), np.float64), "y": np.zeros((1, 3, 4, 5), np.uint8)},
        7: {"x": np.zeros((1, 3, 4, 5), np.float32)},
    }
    for number, arrays in others.items():
        np.savez(root / f"case_{number:05d}.npz", **arrays)
    source = scan_npy(root, fields={"x": "x", "y": "y"})
    assert refusals(source) == {
        "case_00000.npz": "its array x is float32 of shape (3, 4), expected float32 of shape (1, any, any, any)",
        "case_00003.npz": "its array x is float64 of shape (1, 3, 4, 5), expected float32 of shape (1, any, any, any)",
        "case_00007.npz": "it has no array y: it has x",
    }
    good = [sample for number, sample in enumerate(volumes()) if number not in others]
    converted = convert(source, tmp_path / "x.st", skip_bad=True, shard_bytes=100_000)
    assert len(converted.skipped) == len(others)
    assert_holds(tmp_path / "x.st", good)


def test_a_writer_sees_from_the_first_records_what_differs(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    records: list[dict[str, Any]] = [
        {
            "volume": generator.random((2, number % 5, number % 3 + 1, 4)).astype(np.float16),
            "grid": generator.integers(0, 9, (number % 4 + 1, number % 7 + 2)).tolist(),
            "label": number,
        }
        for number in range(150)
    ]
    records[2]["volume"] = torch.from_numpy(records[2]["volume"])
    records[3]["grid"] = np.zeros(0, int)
    records[100]["volume"] = torch.from_numpy(records[100]["volume"])
    records[101]["grid"] = []
    with Writer(tmp_path / "x.st", shard_bytes=4000) as writer:
        for record in records:
            writer.write(record)
    dataset = Dataset(tmp_path / "x.st")
    assert {name: field.shape for name, field in dataset.fields.items()} == {
        "volume": (2, None, None, 4),
        "grid": (None, None),
        "label": (),
    }
    expected = [
        {
            "volume": np.asarray(record["volume"]),
            "grid": np.array(record["grid"] if len(record["grid"]) else np.zeros((0, 0)), np.int64),
            "label": np.int64(record["label"]),
        }
        for record in records
    ]
    assert_holds(tmp_path / "x.st", expected)
    with Writer(tmp_path / "again.st", dataset.schema) as writer:
        for record in dataset:
            writer.write(record)
    assert_holds(tmp_path / "again.st", expected)


def test_two_records_are_compared_however_large_they_are(tmp_path: Path) -> None:
    records = [np.full((number + 1, 65, 1 << 20), number, np.uint8) for number in range(2)]
    with Writer(tmp_path / "x.st", container="hdf5") as writer:
        for record in records:
            writer.write({"x": record[:, : 65 - len(record)]})
    dataset = Dataset(tmp_path / "x.st")
    assert dataset.fields["x"].shape == (None, None, 1 << 20)
    for read, record in zip(dataset, records, strict=True):
        assert np.array_equal(read["x"], record[:, : 65 - len(record)])


def test_what_a_writer_is_not_given(tmp_path: Path) -> None:
    schema = Schema(fields={"x": Field(kind="ragged", dtype="int64", shape=(2, None, None))})
    with Writer(tmp_path / "x.st", schema) as writer:
        writer.write({"x": np.zeros((2, 3, 4), int)})
        with pytest.raises(UsageError, match=r"field 'x': its shape is \(3, 3, 4\), not \(2, any, any\)"):
            writer.write({"x": np.zeros((3, 3, 4), int)})
        with pytest.raises(UsageError, match=r"the fields \['x', 'x_shape'\], the schema \['x'\]"):
            writer.write({"x": np.zeros((2, 3, 4), int), "x_shape": [2, 3, 4]})
    with (
        pytest.raises(UsageError, match="'X_shape' cannot be the name of a field: the shapes of 'x' are kept there"),
        Writer(tmp_path / "y.st") as writer,
    ):
        for number in range(3):
            writer.write({"x": np.zeros((number, number)), "X_shape": number})
    with (
        pytest.raises(UsageError, match=r"field 'x': its shapes .* have other numbers of extents"),
        Writer(tmp_path / "y.st") as writer,
    ):
        writer.write({"x": np.zeros((2, 3))})
        writer.write({"x": np.zeros((2, 3, 4))})


SHAPE_COLUMN = Field(kind="tensor", dtype="int64", shape=(2,), dims=("extent",), storage="column", shape_of="x")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"x": Field(kind="tensor", shape=(9999,)), "x_shape": SHAPE_COLUMN}, "claims to have the shapes of 'x'"),
        ({"x": Field(kind="ragged", shape=(None, None)), "y_shape": SHAPE_COLUMN}, "claims to have the shapes of 'x'"),
        (
            {
                "x": Field(kind="ragged", shape=(None, None)),
                "x_shape": SHAPE_COLUMN.model_copy(update={"shape": (3,)}),
            },
            "the shapes of 'x' are kept there",
        ),
        ({"x" * 96: Field(kind="ragged", shape=(None, None))}, "is too long"),
    ],
)
def test_schemas_whose_shapes_do_not_belong_are_refused(fields: dict[str, Field], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Schema(fields=fields)


def test_what_a_function_gives_is_packed_by_its_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scans_of_mine.py").write_text(
        "import numpy as np\n"
        "def scans():\n"
        "    return [{'label': n, 'scan': np.full((n % 3, n + 1, 2 * n), n, np.int16)} for n in range(9)]\n"
    )
    monkeypatch.chdir(tmp_path)
    run(
        [*CLI, "convert", "python", "scans_of_mine:scans", "x.st", "--shard-bytes", "600B"],
        check=True,
        capture_output=True,
    )
    dataset = Dataset(tmp_path / "x.st")
    assert dataset.schema.primary == "scan"
    assert dataset.manifest.num_shards > 1
    scans = [np.full((n % 3, n + 1, 2 * n), n, np.int16) for n in range(9)]
    assert_holds(tmp_path / "x.st", [{"label": np.int64(n), "scan": scan} for n, scan in enumerate(scans)])


def test_other_libraries_find_rows_and_shapes(scans: Path) -> None:
    dataset, group = Dataset(scans), zarr.open_group(scans, mode="r")
    for number, sample in enumerate(volumes()):
        shape, row = group["x_shape"][number], int(group["index/x/row"][number])
        assert tuple(shape) == sample["x"].shape
        assert_same_bits({"x": group["x"][row : row + int(np.prod(shape))].reshape(shape)}, {"x": sample["x"]})
    for entry in dataset.manifest.shards_of("x"):
        with h5py.File(scans / entry.file, "r") as file:
            for row in range(entry.records):
                start, count, shape = file["x/offset"][row], file["x/count"][row], file["x_shape"][row]
                read = file["x/data"][start : start + count].reshape(shape)
                assert_same_bits({"x": read}, {"x": volumes()[entry.first + row]["x"]})


def test_a_batch_has_a_list_of_scans(scans: Path) -> None:
    samples = volumes()
    assert_same_bits(RecordDataset(scans)[2], samples[2])
    (*_, last) = batches = list(DataLoader(RecordDataset(scans), batch_size=4, num_workers=2))
    assert len(last["x"]) == NUM_SAMPLES % 4
    for name in "xy":
        read = [scan.numpy() for batch in batches for scan in batch[name]]
        for found, sample in zip(read, samples, strict=True):
            assert_same_bits({name: found}, {name: sample[name]})


def random_crop(sample: Arrays) -> Arrays:
    """The same window of 1 x 4 x 5 x 6 of both, filled up where a scan is smaller."""
    generator = np.random.default_rng(sample["x"].size)
    window = [slice(None)]
    for extent, wanted in zip(sample["x"].shape[1:], (4, 5, 6), strict=True):
        start = int(generator.integers(0, max(extent - wanted, 0) + 1))
        window.append(slice(start, start + wanted))
    cropped = {}
    for name, scan in sample.items():
        part = scan[tuple(window)]
        cropped[name] = np.pad(part, [(0, a - b) for a, b in zip((1, 4, 5, 6), part.shape, strict=True)])
    return cropped


def test_a_crop_of_every_scan_makes_one_tensor(scans: Path) -> None:
    loader = DataLoader(RecordDataset(scans), batch_size=4, num_workers=2, transform=PerSample(random_crop))
    batches = list(loader)
    for name, dtype in (("x", torch.float32), ("y", torch.uint8)):
        read = torch.cat([batch[name] for batch in batches])
        assert (read.shape, read.dtype) == ((NUM_SAMPLES, 1, 4, 5, 6), dtype)
        expected = np.stack([random_crop(sample)[name] for sample in volumes()])
        assert read.numpy().tobytes() == expected.tobytes()
    uncropped = DataLoader(RecordDataset(scans), batch_size=4, transform=PerSample(lambda sample: sample))
    with pytest.raises(UsageError, match=r"the samples of 'x' differ in shape, .*: let a transform resize or pad them"):
        next(iter(uncropped))


def test_what_differs_in_its_first_extent_alone_makes_a_tensor_under_another_name(tmp_path: Path) -> None:
    with Writer(tmp_path / "x.st") as writer:
        for number in range(4):
            writer.write({"slices": np.full((number + 2, 3, 3), number, np.float32)})

    def first_two(sample: Arrays) -> Arrays:
        return {**sample, "pair": sample["slices"][:2]}

    (batch,) = DataLoader(RecordDataset(tmp_path / "x.st"), batch_size=4, transform=PerSample(first_two))
    assert [len(slices) for slices in batch["slices"]] == [2, 3, 4, 5]
    assert batch["pair"][:, :, 0, 0].tolist() == [[number] * 2 for number in range(4)]


@pytest.mark.parametrize("wrong", [(1, 1, 1, 1), (-1, -1, 1, 1), (2**62, 4, 2**62, 4), (0, 2**63 - 1, 2**63 - 1, 1)])
def test_a_wrong_shape_is_found_named_and_not_believed(tmp_path: Path, wrong: tuple[int, ...]) -> None:
    """Written so: all sums hold."""
    target = tmp_path / "x.st"
    convert(scan_npy(write_npz(tmp_path / "npz", volumes())), target, container="zarr", shard_bytes=200_000)
    with open(target / "x_shape/c/0/0", "r+b") as file:
        file.seek(6 * 4 * 8)
        file.write(np.array(wrong, "<i8").tobytes())
    content = json.loads((target / "manifest.json").read_bytes())
    for entry in content["files"]:
        entry["xxh3_128"] = file_sums(target / entry["file"], content["chunk_bytes"])
    content["id"] = ""
    content["id"] = Manifest.model_validate(content).computed_id()
    (target / "manifest.json").write_text(json.dumps(content))
    (problem,) = verify(target).problems
    nbytes = volumes()[6]["x"].nbytes
    assert str(problem).startswith(
        f"x_shape/c/0/0: record 6 has {nbytes} bytes of 'x', which are no array of the shape ("
    )
    dataset = Dataset(target)
    shard = dataset.manifest.shards_of("x")[int(dataset.index.shard[6])].file
    sentence = (
        rf"record 6 in .*{shard} has {nbytes} bytes, which are no array of the shape \(.*\) that it is said to have"
    )
    for read in (lambda: dataset[6], lambda: dataset[4:8], lambda: RecordDataset(target)[6]):
        with pytest.raises(SourceError, match=sentence):
            read()
    assert_same_bits(dataset[5], volumes()[5])
    loader = DataLoader(
        RecordDataset(target, fields=["x"]),
        batch_size=NUM_SAMPLES,
        on_error="replace",
        error_budget=1,
        quarantine=tmp_path / "bad.jsonl",
    )
    with pytest.warns(RuntimeWarning, match="Record . takes its place"):
        (batch,) = loader
    assert [tuple(scan.shape) for scan in batch["x"]][6] in {sample["x"].shape for sample in volumes()}
    assert "record 6" in (tmp_path / "bad.jsonl").read_text()


def test_a_manifest_without_the_shapes_is_refused(scans: Path) -> None:
    content = json.loads((scans / "manifest.json").read_bytes())
    assert content["version"] == [1, 1]
    del content["schema"]["fields"]["x_shape"]
    with pytest.raises(SourceError, match="no field has the shapes of 'x'"):
        Manifest.parse(json.dumps(content).encode(), "x")


def test_data_sets_without_such_fields_are_what_they_were(tmp_path: Path) -> None:
    with Writer(tmp_path / "x.st", container="zarr") as writer:
        for number in range(5):
            writer.write(
                {
                    "x": np.full((40, 40), number, np.float32),
                    "boxes": np.full((number, 4), number, np.int16),
                    "text": "a" * number,
                }
            )
    manifest = Manifest.load(tmp_path / "x.st")
    assert manifest.id == "0ac324275ff71e78d1edb69acb9b0c7fa258927a6aa463df17deeb80cbc2fe27"  # of the first version


@given(
    shape=st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=4).filter(
        lambda each: None in each[1:]
    ),
    extents=st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=5),
    dtype=st.sampled_from(["bool", "int16", "uint64", "float32", "complex64", "complex128", "bfloat16"]),
)
@settings(max_examples=60)
def test_any_shapes_and_types_come_back(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int | None], extents: list[list[int]], dtype: str
) -> None:
    numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    samples = []
    for number, drawn in enumerate(extents):
        actual = [extent if fixed is None else fixed for fixed, extent in zip(shape, drawn, strict=False)]
        values = np.random.default_rng(number).integers(0, 2, actual)
        samples.append({"x": values.astype(numpy_dtype), "n": np.int64(number)})
    target = tmp_path_factory.mktemp("any") / "x.st"
    tail = shape[len(shape) - shape[::-1].index(None) :]
    if 0 in tail:
        with pytest.raises(ValueError, match="has rows of no bytes"):
            Field(kind="ragged", dtype=dtype, shape=tuple(shape))
        return
    schema = Schema(
        fields={"x": Field(kind="ragged", dtype=dtype, shape=tuple(shape)), "n": Field(kind="tensor", dtype="int64")}
    )
    for folder, given_schema in ((target, schema), (target.with_name("guessed.st"), None)):
        with Writer(folder, given_schema, shard_bytes=200) as writer:
            for sample in samples:
                writer.write(sample)
        for read, sample in zip(Dataset(folder), samples, strict=True):
            assert read["x"].shape == sample["x"].shape
            assert read["x"].tobytes() == sample["x"].tobytes()
        assert_read_alike(Dataset(folder))
        assert verify(folder).problems == []


def test_extents_of_nothing_are_no_obstacle(tmp_path: Path) -> None:
    samples = [{"x": np.zeros((number, 0, 4), np.int32), "n": np.int64(number)} for number in range(5)]
    with Writer(tmp_path / "x.st") as writer:
        for sample in samples:
            writer.write(sample)
    assert Dataset(tmp_path / "x.st").fields["x"].shape == (None, None, 4)
    assert_holds(tmp_path / "x.st", samples)


def test_a_shape_beyond_all_bytes_fits_none() -> None:
    field = Field(kind="ragged", dtype="uint8", shape=(None, None))
    shapes = np.array([[2**32, 2**32], [2**63 - 1, 0], [-1, -6], [2, 3], [6, 1], [0, 6]], np.int64)
    fits = fits_shapes(field, shapes, np.array([0, 0, 6, 6, 6, 6]))
    assert fits.tolist() == [False, True, False, True, True, False]


def test_a_source_that_changes_meanwhile_is_said(tmp_path: Path) -> None:
    root = write_npz(tmp_path / "npz", volumes())
    source = scan_npy(root)
    np.savez(root / "case_00002.npz", **volumes()[3])
    os.utime(root / "case_00002.npz", (1, 1))
    with pytest.raises(SourceError, match=r"case_00002\.npz changed while it was converted"):
        read_source(source)
