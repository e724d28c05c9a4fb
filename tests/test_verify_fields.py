"""Faults in records, shards, indexes and manifests of several fields: each is planted and found, named by file and record.

Faults of two sorts: bytes that change on disk, which sums find; and data sets that were wrong when they were written, whose
sums all hold, which only looking at what they say finds.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagein.formats import Dataset, Field, Manifest, Schema, Writer, verify
from stagein.formats.assembly import file_sums
from stagein.formats.checksums import crc32c
from stagein.formats.codecs import Codec
from stagein.formats.errors import ChecksumError, SourceError, StageinError
from stagein.formats.repair import repair

SCHEMA = Schema(
    fields={
        "image": Field(kind="encoded", encoding="bytes", storage="shards"),
        "mask": Field(kind="tensor", dtype="uint8", shape=(70, 90), codec=Codec(name="zstd")),
        "depth": Field(kind="tensor", dtype="float32", shape=(70, 90)),
        "boxes": Field(kind="ragged", dtype="float32", shape=(None, 4), storage="column"),
        "points": Field(kind="ragged", dtype="int16", shape=(None, 3), storage="shards"),
        "caption": Field(kind="text", storage="column"),
        "label": Field(kind="tensor", dtype="int64"),
    }
)


def make_record(number: int) -> dict[str, Any]:
    generator = np.random.default_rng(number)
    return {
        "image": generator.bytes(500 + 37 * number),
        "mask": generator.integers(0, 3, (70, 90), np.uint8),
        "depth": generator.random((70, 90), np.float32),
        "boxes": generator.random((number % 4, 4), np.float32),
        "points": generator.integers(0, 99, (number % 5, 3), np.int16),
        "caption": "größer " * (number % 3),
        "label": number,
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fields") / "x.st"
    with Writer(target, SCHEMA, shard_bytes=300_000, chunk_bytes=16 << 10) as writer:
        for number in range(23):
            writer.write(make_record(number))
    return target


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    target = shutil.copytree(written, tmp_path / "x.st", symlinks=True)
    for path in (target / "shards").rglob("*.h5"):
        path.chmod(0o644)
    return target


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def problems(path: Path) -> list[str]:
    return [str(problem) for problem in verify(path, workers=2).problems]


def test_a_flipped_byte_of_any_field_is_found_named_refused_and_mended(copy: Path, written: Path) -> None:
    dataset = Dataset(copy)
    for name in SCHEMA.resolved({}).indexed_fields:
        record = 14
        index, parts = dataset.readers[name].index, dataset.manifest.parts_of(name)
        while not index.nbytes[record]:
            record += 1
        file = parts[int(index.shard[record])].file
        flip(copy / file, int(index.offset[record]) + int(index.nbytes[record]) // 2)
        assert any(text.startswith(f"{file}: record {record} is damaged") for text in problems(copy)), name
        with pytest.raises(ChecksumError, match=f"record {record} in .*{file} is damaged"):
            dataset.readers[name].read_records([record])
    assert len(repair(copy, written).files) == len(dataset.readers)
    assert problems(copy) == []
    assert Dataset(copy)[14]["label"] == 14


def test_a_flipped_byte_in_any_file_is_found_and_no_index_or_column_is_believed(copy: Path) -> None:
    manifest = Manifest.load(copy)
    read_when_opened = [f"index/{name}/{part}/" for name in SCHEMA.fields for part in ("shard", "offset", "nbytes")]
    for entry in manifest.all_files():
        if not entry.nbytes:
            continue
        flip(copy / entry.file, entry.nbytes // 2)
        assert any(text.startswith(f"{entry.file}: bytes ") for text in problems(copy)), entry.file
        if entry.file.endswith("/c/0") and entry.file.startswith(("label/", *read_when_opened)):
            with pytest.raises(ChecksumError, match=f"{entry.file} is damaged"):
                Dataset(copy)
        flip(copy / entry.file, entry.nbytes // 2)
    assert problems(copy) == []


def test_missing_and_cut_files_of_every_field(copy: Path) -> None:
    manifest = Manifest.load(copy)
    for name in SCHEMA.fields:
        entry = next(e for e in manifest.all_files() if e.file.startswith((f"shards/{name}/", f"{name}/c/"))) \
            if name != "image" else manifest.shards[0]  # fmt: skip
        content = (copy / entry.file).read_bytes()
        os.truncate(copy / entry.file, len(content) - 1)
        assert any(text.startswith(f"{entry.file}: it has {len(content) - 1} bytes") for text in problems(copy)), name
        (copy / entry.file).unlink()
        assert any(text.startswith(f"{entry.file}: it is missing") for text in problems(copy)), name
        with pytest.raises(SourceError):
            list(Dataset(copy))
        (copy / entry.file).write_bytes(content)
    assert problems(copy) == []


# Wrong from the start: the sums hold


def reseal(folder: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Give the data set the sums of what is in it now, as one that was written so would have."""
    content = json.loads((folder / "manifest.json").read_bytes())
    for entry in [*content["shards"], *content["files"]]:
        entry["nbytes"] = (folder / entry["file"]).stat().st_size
        entry["xxh3_128"] = file_sums(folder / entry["file"], content["chunk_bytes"])
    change(content)
    content["id"] = ""
    content["id"] = Manifest.model_validate(content).computed_id()
    (folder / "manifest.json").write_text(json.dumps(content))


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def edit_hdf5(path: Path, name: str) -> None:
    """Invert every bit of the first element of a data set in a shard where it lies."""
    with h5py.File(path, "r") as file:
        offset, nbytes = file[name].id.get_offset(), file[name].dtype.itemsize
    content = path.read_bytes()[offset : offset + nbytes]
    overwrite(path, offset, bytes(byte ^ 0xFF for byte in content))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("shards/00000.h5", "image/crc32c"),
        ("shards/00000.h5", "image/offset"),
        ("shards/00000.h5", "image/nbytes"),
        ("shards/00000.h5", "label"),
        ("shards/00001.h5", "boxes/data"),
        ("shards/00001.h5", "boxes/offset"),
        ("shards/00001.h5", "boxes/count"),
        ("shards/00001.h5", "caption/data"),
        ("shards/00001.h5", "caption/nbytes"),
        ("shards/points/00000.h5", "points/count"),
        ("shards/mask/00001.h5", "mask/crc32c"),
    ],
)
def test_an_hdf5_view_that_says_something_else_is_found(copy: Path, file: str, name: str) -> None:
    edit_hdf5(copy / file, name)
    reseal(copy)
    assert problems(copy) == [f"{file}: its HDF5 data set {name} is not what the data set has for its records"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stagein_format", "stagein-shart"),
        ("stagein_version", np.array([2, 0], np.uint16)),
        ("num_records", np.uint64(24)),
        ("schema", "{}"),
        ("field", "masks"),
    ],
)
def test_wrong_attributes_of_a_shard_are_found(copy: Path, name: str, value: Any) -> None:
    with h5py.File(copy / "shards/depth/00000.h5", "r+") as file:
        file.attrs[name] = value
    reseal(copy)
    found = problems(copy)
    assert any(text.startswith(f"shards/depth/00000.h5: its HDF5 attribute {name} is") for text in found)


def test_damaged_hdf5_metadata_are_found(copy: Path) -> None:
    path = copy / "shards/depth/00000.h5"
    position = path.read_bytes().index(b"num_records")
    flip(path, position)
    reseal(copy)
    assert [text.partition(": HDF5 cannot read it: ")[0] for text in problems(copy)] == ["shards/depth/00000.h5"]


@pytest.mark.parametrize("name", ["image", "depth", "mask", "points"])
def test_a_wrong_zarr_index_is_found(copy: Path, name: str) -> None:
    entry = Manifest.load(copy).shards_of(name)[1]
    flip(copy / entry.file, entry.nbytes - 12)
    reseal(copy)
    assert f"{entry.file}: its Zarr shard index does not describe its payload" in problems(copy)


def test_wrong_zarr_documents_and_rows_are_found(copy: Path) -> None:
    for name in SCHEMA.fields:
        path = copy / name / "zarr.json"
        good = path.read_bytes()
        path.write_bytes(good.replace(b'"shape": [\n  ', b'"shape": [\n  1', 1))
        reseal(copy)
        assert problems(copy) == [f"{name}/zarr.json: it does not describe what the data set has"]
        path.write_bytes(good)
        if name == "label":
            continue
        path = copy / "index" / name / "row/c/0"
        flip(path, 80)
        reseal(copy)
        assert problems(copy) == [
            f"index/{name}/row: it does not say at which row of the Zarr array each record starts"
        ]
        flip(path, 80)
    reseal(copy)
    assert problems(copy) == []


@pytest.mark.parametrize("name", ["image", "depth", "mask", "points", "boxes", "caption"])
@pytest.mark.parametrize(
    ("part", "value"), [("shard", 7), ("offset", 2**63), ("offset", 2**64 - 1), ("nbytes", 2**32 - 1)]
)
def test_an_index_that_leads_out_of_its_files_is_refused(copy: Path, name: str, part: str, value: int) -> None:
    path = copy / "index" / name / part / "c/0"
    width = path.stat().st_size // 23
    overwrite(path, 5 * width, value.to_bytes(width, "little"))
    reseal(copy)
    with pytest.raises(SourceError, match=f"the index of '{name}' in .* does not fit .*, at record 5: run"):
        Dataset(copy)
    assert any("does not fit" in text for text in problems(copy))


def test_an_index_of_another_record_gives_no_wrong_data(copy: Path) -> None:
    path = copy / "index/image/offset/c/0"
    offsets = np.fromfile(path, "<u8")
    overwrite(path, 0, offsets[[1, 0]].tobytes())
    reseal(copy)
    for record in (0, 1):
        with pytest.raises(ChecksumError, match=f"record {record} in .* is damaged"):
            Dataset(copy)[record]
    found = problems(copy)
    assert any("record 0 is damaged" in text for text in found)


def move_record_between_shards(manifest: dict[str, Any], name: str) -> None:
    """Shards that add up by themselves, but are not those of the other fields."""
    first, second = [shard for shard in manifest["shards"] if shard["field"] == name][:2]
    first["records"] -= 1
    second.update(first=second["first"] - 1, records=second["records"] + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"].pop(), "equally many shards"),
        (lambda m: m["shards"].reverse(), "equally many shards|starts at record"),
        (lambda m: m["shards"][-1].update(records=1), "holds 1 records|hold .* records"),
        (lambda m: m["shards"][0].update(field="mask"), "equally many shards"),
        (lambda m: m["shards"][0].update(data_offset=2**40), "starts behind its end"),
        (lambda m: move_record_between_shards(m, "mask"), "shards/mask/00000.h5 holds . records, shards/00000.h5"),
        (lambda m: m["capacity"].pop("mask"), "has capacities of"),
        (lambda m: m["capacity"].update(mask=0), "capacity.mask"),
        (lambda m: m.update(num_records=22), "shards hold 23 records"),
        (lambda m: m["schema"]["fields"]["boxes"].update(storage=None), "does not say how it is stored"),
        (lambda m: m["schema"]["fields"]["mask"].update(shape=[70, None]), "its kind is ragged"),
        (lambda m: m["schema"].update(primary="label"), "primary|capacities|shards"),
    ],
)
def test_manifests_that_do_not_add_up_are_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = json.loads((copy / "manifest.json").read_bytes())
    change(content)
    with pytest.raises(SourceError, match=message):
        Manifest.parse(json.dumps(content).encode(), "x")


CODECS = {
    "blosc-lz4": Codec(name="blosc-lz4", shuffle="byte"),
    "zstd": Codec(name="zstd"),
    "lz4": Codec(name="lz4"),
}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@pytest.mark.parametrize("damage", ["garbage", "zeros", "cut", "empty", "another"])
def test_a_record_that_its_codec_cannot_decode_is_named(tmp_path: Path, codec: Codec, damage: str) -> None:
    """All sums hold, as if it had been written so: only decoding it can tell."""
    schema = Schema(fields={"x": Field(kind="tensor", dtype="int16", shape=(90, 90), codec=codec)})
    with Writer(tmp_path / "x.st", schema, container="hdf5") as writer:
        for number in range(5):
            writer.write({"x": np.random.default_rng(number).integers(0, 9, (90, 90), np.int16)})
    index = Dataset(tmp_path / "x.st").index
    shard = tmp_path / "x.st/shards/00000.h5"
    shard.chmod(0o644)
    offset, nbytes = int(index.offset[2]), int(index.nbytes[2])
    stored = shard.read_bytes()[offset : offset + nbytes]
    bad = {
        "garbage": np.random.default_rng(9).bytes(nbytes),
        "zeros": bytes(nbytes),
        "cut": stored[: nbytes // 2],
        "empty": b"",
        "another": codec.encode(np.zeros(45 * 90, np.int16), 2),  # well made, of half a record
    }[damage]
    overwrite(shard, offset, bad)
    overwrite(tmp_path / "x.st/index/x/nbytes/c/0", 8, len(bad).to_bytes(4, "little"))
    overwrite(tmp_path / "x.st/index/x/crc32c/c/0", 8, crc32c(bad).to_bytes(4, "little"))
    reseal(tmp_path / "x.st")
    dataset = Dataset(tmp_path / "x.st")
    for read in (lambda: dataset[2], lambda: dataset.read_tensors([1, 2]), lambda: dataset[1:3]):
        with pytest.raises(ChecksumError, match=r"record 2 in .*shards/00000\.h5: a .* chunk cannot be decoded"):
            read()
    assert dataset[3]["x"].shape == (90, 90)


# Fuzzing


def assert_read_right_or_refused(folder: Path) -> None:
    """Whatever was done to it, what can still be read is what was written."""
    try:
        dataset = Dataset(folder)
        numbers = range(len(dataset))
    except StageinError:
        return
    assert len(dataset) == 23
    for number in numbers:
        try:
            record = dataset[number]
        except StageinError:
            continue
        for name, value in make_record(number).items():
            read = record[name].tobytes() if name == "image" else record[name]
            assert np.array_equal(read, value) if isinstance(value, np.ndarray) else read == value


def _fuzzed_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@given(data=st.data())
@settings(max_examples=80)
def test_any_damage_is_refused_or_without_effect(written: Path, data: st.DataObject) -> None:
    """Bytes changed, cut off or doubled in any file: an error, or the right records; never a crash or wrong data."""
    path = data.draw(st.sampled_from(_fuzzed_files(written)))
    content, mode = path.read_bytes(), path.stat().st_mode
    position = data.draw(st.integers(0, max(len(content) - 1, 0)))
    change = data.draw(st.sampled_from(["flip", "cut", "double", "zero"]))
    damaged = bytearray(content)
    if change == "cut":
        del damaged[position:]
    elif change == "double":
        damaged[position:position] = content[position : position + data.draw(st.integers(1, 4096))]
    else:
        stop = position + data.draw(st.integers(1, 64))
        bits = 0 if change == "zero" else data.draw(st.integers(1, 255))
        damaged[position:stop] = bytes(byte ^ bits if bits else 0 for byte in damaged[position:stop])
    path.chmod(0o644)
    try:
        path.write_bytes(damaged)
        assert_read_right_or_refused(written)
    finally:
        path.write_bytes(content)
        path.chmod(mode)


@given(data=st.data())
@settings(max_examples=60)
def test_any_number_in_an_index_whose_sums_hold_is_refused_or_without_effect(
    written: Path, data: st.DataObject
) -> None:
    """As if it had been written so: offsets, sizes and sums of one record, or of one like another."""
    name = data.draw(st.sampled_from(sorted(SCHEMA.resolved({}).indexed_fields)))
    part = data.draw(st.sampled_from(["shard", "offset", "nbytes"]))
    path = written / "index" / name / part / "c/0"
    good, manifest = path.read_bytes(), (written / "manifest.json").read_bytes()
    values = np.frombuffer(good, {"offset": "<u8"}.get(part, "<u4")).copy()
    record, other = data.draw(st.integers(0, 22)), data.draw(st.integers(0, 22))
    near = int(values[other]) + data.draw(st.sampled_from([0, 1, -1, 4096]))
    values[record] = data.draw(
        st.sampled_from([max(near, 0), 0, data.draw(st.integers(0, np.iinfo(values.dtype).max))])
    )
    try:
        path.write_bytes(values.tobytes())
        reseal(written)
        assert_read_right_or_refused(written)
    finally:
        path.write_bytes(good)
        (written / "manifest.json").write_bytes(manifest)


@given(data=st.data())
@settings(max_examples=150)
def test_any_manifest_is_a_manifest_or_a_sentence(written: Path, data: st.DataObject) -> None:
    """Any value of any kind anywhere in a manifest that is sealed anew: refused in a sentence, or read without a crash."""
    content = json.loads((written / "manifest.json").read_bytes())
    place: Any = content
    while True:
        key = data.draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else data.draw(
            st.integers(0, len(place) - 1)
        )  # fmt: skip
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    values = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=9))
    place[key] = data.draw(
        st.one_of(values, st.lists(values, max_size=3), st.dictionaries(st.text(max_size=9), values))
    )
    try:
        sealed = Manifest.model_validate(content | {"id": ""}).sealed()
        manifest = Manifest.parse(sealed.to_bytes(), "fuzzed")
    except (StageinError, ValueError):
        with pytest.raises(SourceError):
            Manifest.parse(json.dumps(content).encode(), "fuzzed")
        return
    path = written / "manifest.json"
    good = path.read_bytes()
    try:
        path.write_bytes(manifest.to_bytes())
        try:
            for record in Dataset(written):
                assert record.keys() == manifest.record_schema.fields.keys()
        except StageinError:
            pass
    finally:
        path.write_bytes(good)
