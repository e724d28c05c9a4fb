"""Conversion of records with several large fields: read at once, each into shards of its own, with the same records in them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lookalikes import DEEPCAM_SHAPE, deepcam_samples, write_deepcam_hdf5, write_deepcam_npy, write_deepcam_single
from numpy.typing import NDArray
from readers import assert_read_alike

from stagein import stage
from stagein.formats import Dataset, Field, Schema, convert, verify
from stagein.formats.errors import SourceError
from stagein.formats.source import RefusedRecord, Room, SourceRecord
from stagein.formats.sources.hdf5 import scan_hdf5
from stagein.formats.sources.npy import scan_npy
from stagein.formats.values import row_bytes, to_rows

SCHEMA = Schema(
    fields={
        "image": Field(kind="encoded", encoding="bytes"),
        "mask": Field(kind="tensor", dtype="uint8", shape=(80, 80)),
        "text": Field(kind="text"),
        "notes": Field(kind="text"),
        "boxes": Field(kind="ragged", dtype="float32", shape=(None, 4)),
        "label": Field(kind="tensor", dtype="int64"),
    }
)


def make_record(number: int) -> dict[str, Any]:
    generator = np.random.default_rng(number)
    return {
        "image": generator.bytes(int(generator.integers(0, 9000))),
        "mask": (generator.random((80, 80)) < 0.05).astype(np.uint8),
        "text": "ä" * int(generator.integers(2000, 4000)),
        "notes": "ö" * int(generator.integers(0, 20)),
        "boxes": generator.random((int(generator.integers(0, 5)), 4), np.float32),
        "label": number,
    }


@dataclass(frozen=True)
class MadePart:
    numbers: tuple[int, ...]
    bad: frozenset[int]
    by_room: frozenset[str]

    def mark(self) -> object:
        return self.numbers, sorted(self.bad), sorted(self.by_room)

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        for number in self.numbers:
            values = make_record(number)
            for name in self.by_room:
                rows = to_rows(SCHEMA.fields[name], values.pop(name))
                room(name, rows.nbytes)[:] = row_bytes(rows)
            if number in self.bad:
                for name in SCHEMA.fields:  # room that was asked for before it was known
                    room(name, SCHEMA.fields[name].record_bytes)
                yield RefusedRecord(f"made {number}", "it is bad")
            else:
                yield SourceRecord(values)


@dataclass(frozen=True)
class MadeRecords:
    """Records of all kinds of fields; the sizes of `notes` are not known before they are read."""

    count: int
    bad: frozenset[int] = frozenset()
    by_room: frozenset[str] = frozenset({"image", "mask", "boxes"})
    schema: Schema = SCHEMA
    kind: str = "made"
    name: str = "memory"
    refused: tuple[RefusedRecord, ...] = ()
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> NDArray[np.int64]:
        return self._sizes("image")

    @property
    def secondary_nbytes(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: self._sizes(name) for name in ("text", "boxes")}

    def _sizes(self, name: str) -> NDArray[np.int64]:
        rows = [to_rows(SCHEMA.fields[name], make_record(number)[name]).nbytes for number in range(self.count)]
        return np.array(rows, np.int64)

    def identity(self) -> object:
        return self.count

    def part(self, numbers: NDArray[np.int64]) -> MadePart:
        return MadePart(tuple(numbers.tolist()), self.bad, self.by_room)


def assert_holds(dataset: Dataset, numbers: list[int]) -> None:
    assert len(dataset) == len(numbers)
    for number, record in zip(numbers, dataset, strict=True):
        for name, value in make_record(number).items():
            read = record[name].tobytes() if name == "image" else record[name]
            assert np.array_equal(read, value) if isinstance(value, np.ndarray) else read == value, name
    assert verify(dataset.path).problems == []
    assert_read_alike(dataset)


@pytest.mark.parametrize("container", ["hdf5+zarr", "hdf5", "zarr"])
def test_every_field_finds_its_place(tmp_path: Path, container: Any) -> None:
    convert(MadeRecords(29), tmp_path / "x.st", container=container, shard_bytes=100_000, codec="auto")
    dataset = Dataset(tmp_path / "x.st")
    assert {name: declared.storage for name, declared in dataset.fields.items()} == {
        "image": "shards", "mask": "shards", "text": "shards", "notes": "column", "boxes": "column", "label": "column",
    }  # fmt: skip
    assert dataset.fields["mask"].codec is not None
    assert len(dataset.manifest.shards) == 3 * dataset.manifest.num_shards > 10
    assert_holds(dataset, list(range(29)))


def test_workers_and_the_way_fields_are_given_change_no_byte(tmp_path: Path) -> None:
    ids = set()
    for number, (workers, by_room) in enumerate([(1, ()), (2, SCHEMA.fields), (2, ("text", "label"))]):
        source = MadeRecords(29, by_room=frozenset(by_room))
        converted = convert(source, tmp_path / f"{number}.st", shard_bytes=100_000, workers=workers)
        ids.add(converted.manifest.id)
    assert len(ids) == 1


@pytest.mark.parametrize("bad", [{0}, {9, 10, 28}, set(range(20)), set(range(29))], ids=str)
def test_records_left_out_leave_gaps_that_the_index_tells(tmp_path: Path, bad: set[int]) -> None:
    source = MadeRecords(29, bad=frozenset(bad))
    with pytest.raises(SourceError, match=r"no record"):
        convert(source, tmp_path / "x.st", shard_bytes=100_000)
    converted = convert(source, tmp_path / "x.st", shard_bytes=100_000, skip_bad=True)
    assert {refused.name for refused in converted.skipped} == {f"made {number}" for number in bad}
    assert_holds(Dataset(tmp_path / "x.st"), [number for number in range(29) if number not in bad])


def test_tensors_left_out_do_not_shift_the_others_in_zarr(tmp_path: Path) -> None:
    """Shards of tensors count as full in the Zarr view: without the gaps, later records would be read from wrong rows."""
    root = tmp_path / "in"
    write_deepcam_npy(root)
    bad = sorted(root.glob("data-*.npy"))[1]
    bad.write_bytes(bad.read_bytes()[:-8])
    record_bytes = int(np.prod(DEEPCAM_SHAPE)) * 4 + int(np.prod(DEEPCAM_SHAPE[:2])) * 4
    for codec in (None, "auto"):
        target = tmp_path / f"{codec}.st"
        convert(scan_npy(root), target, shard_bytes=2 * record_bytes, codec=codec, skip_bad=True)
        dataset = Dataset(target)
        samples = [sample for number, sample in enumerate(deepcam_samples()) if number != 1]
        for record, sample in zip(dataset, samples, strict=True):
            assert all(record[name].tobytes() == sample[name].tobytes() for name in sample)
        assert verify(target).problems == []
        assert_read_alike(dataset)


@pytest.mark.parametrize("layout", ["folder", "rows", "npy"])
def test_deepcam_with_label_maps_above_4_kib(tmp_path: Path, layout: str) -> None:
    assert int(np.prod(DEEPCAM_SHAPE[:2])) * 4 <= 4096  # the look-alike's are smaller: they are declared large here
    write = {"folder": write_deepcam_hdf5, "rows": write_deepcam_single, "npy": write_deepcam_npy}[layout]
    samples = write(tmp_path / "in")
    found = (scan_npy if layout == "npy" else scan_hdf5)(tmp_path / "in")
    large = found.schema.fields["label"].model_copy(update={"storage": "shards"})
    schema = found.schema.model_copy(update={"fields": found.schema.fields | {"label": large}})
    object.__setattr__(found, "schema", schema)
    convert(found, tmp_path / "x.st", codec="auto", shard_bytes=200_000, workers=2)
    dataset = Dataset(tmp_path / "x.st")
    assert list(dataset.schema.large_fields) == ["data", "label"]
    assert dataset.fields["label"].codec is not None
    for record, sample in zip(dataset, samples, strict=True):
        assert all(record[name].tobytes() == sample[name].tobytes() for name in sample)
    labels = dataset.readers["label"].read_tensors([6, 0])
    assert labels.tobytes() == np.stack([samples[6]["label"], samples[0]["label"]]).tobytes()
    assert verify(dataset.path).problems == []
    assert_read_alike(dataset)


def test_killed_and_started_again_it_ends_the_same(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom test_convert_fields import MadeRecords\n"
        "from stagein.formats import convert\n"
        "convert(MadeRecords(29), Path(sys.argv[1]), shard_bytes=40_000, on_progress=lambda p: print(p, flush=True))\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "x.st"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment, cwd=Path(__file__).parent.parent
    ) as process:
        assert process.stdout is not None
        for _ in range(4):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "x.st").exists()
    again = convert(MadeRecords(29), tmp_path / "x.st", shard_bytes=40_000)
    assert again.reused_shards >= 4
    whole = convert(MadeRecords(29), tmp_path / "whole.st", shard_bytes=40_000)
    assert again.manifest.id == whole.manifest.id
    assert_holds(Dataset(tmp_path / "x.st"), list(range(29)))


def test_a_staged_copy_has_every_field(tmp_path: Path) -> None:
    convert(MadeRecords(29), tmp_path / "x.st", shard_bytes=100_000)
    (tmp_path / "node").mkdir()
    stage(tmp_path / "x.st", str(tmp_path / "node"))
    (copy,) = (tmp_path / "node/stagein").glob("*/READY")
    assert_holds(Dataset(tmp_path / "x.st", staged_path=copy.parent), list(range(29)))
    assert_holds(Dataset(copy.parent), list(range(29)))
