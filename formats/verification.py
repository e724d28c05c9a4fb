"""Verification: every sum, count, index entry and link of a data set, and both container views, checked by reading them."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import hdf5_shard, zarr_view
from .checksums import chunk_sum, crc32c, pread_exactly
from .errors import ChecksumError, SourceError, StageinError
from .index import RecordIndex, load_column
from .manifest import FileEntry, Manifest, ShardEntry
from .shards import ShardLayout, hdf5_count_name

_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Problem:
    """Something that is not as the manifest says; `damage` when bytes are wrong, else a file is missing or misplaced."""

    file: str
    text: str
    damage: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


@dataclass
class VerifyReport:
    """What was checked, and everything that is wrong."""

    manifest: Manifest
    files: int = 0
    nbytes: int = 0
    sums: int = 0
    problems: list[Problem] = field(default_factory=list)

    def error(self, path: Path) -> StageinError | None:
        """The problems as one error: ChecksumError when any byte is wrong, SourceError when files are missing; else None."""
        if not self.problems:
            return None
        kind = ChecksumError if any(problem.damage for problem in self.problems) else SourceError
        listed = "".join(f"\n  {problem}" for problem in self.problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return kind(f"{path} has {count}: restore what is named below from a good copy, or convert it again{listed}")


def verify(
    path: Path, *, workers: int = 1, on_progress: Callable[[int, int], None] = lambda nbytes, total: None
) -> VerifyReport:
    """Read all of the data set at `path` with `workers` threads and check it; `on_progress` gets bytes done and in all.

    Raises SourceError when there is no manifest that can be trusted; everything else is in the report.
    """
    manifest = Manifest.load(path)
    report = VerifyReport(manifest)
    indexes: dict[str, RecordIndex] = {}
    for name in manifest.record_schema.indexed_fields:
        try:
            indexes[name] = RecordIndex.load(path, manifest, name)
        except SourceError as error:
            report.problems.append(Problem(f"index/{name}", str(error)))
    for name, column in manifest.record_schema.columns.items():
        try:
            load_column(path, name, column, manifest.num_records)
        except SourceError as error:
            report.problems.append(Problem(name, str(error)))
    names = manifest.record_schema.indexed_fields
    records = {part.file: part for name in names for part in manifest.parts_of(name)}
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_verify_file, path, records.get(entry.file, entry), manifest, indexes)
            for entry in manifest.all_files()
        ]
        for job in as_completed(jobs):
            entry, problems = job.result()
            report.files += 1
            report.nbytes += entry.nbytes
            records_here = entry.records if isinstance(entry, ShardEntry) else 0
            report.sums += entry.num_chunks(manifest.chunk_bytes) + records_here
            report.problems += problems
            on_progress(report.nbytes, manifest.nbytes)
    report.problems += _link_problems(path, manifest)
    if not report.problems:
        report.problems += _zarr_problems(path, manifest)
    report.problems.sort(key=lambda problem: (problem.file, problem.text))
    return report


def _verify_file(
    path: Path, entry: FileEntry, manifest: Manifest, indexes: Mapping[str, RecordIndex]
) -> tuple[FileEntry, list[Problem]]:
    try:
        index = indexes.get(entry.field) if isinstance(entry, ShardEntry) else None
        problems = list(_content_problems(path / entry.file, entry, manifest, index))
        if isinstance(entry, ShardEntry) and entry.field in manifest.record_schema.large_fields and not problems:
            problems = list(_container_problems(path / entry.file, entry, manifest, indexes))
    except OSError as error:
        reason = (
            "it is missing" if isinstance(error, FileNotFoundError) else f"it cannot be read: {error.strerror or error}"
        )
        problems = [Problem(entry.file, reason)]
    return entry, problems


def _content_problems(path: Path, entry: FileEntry, manifest: Manifest, index: RecordIndex | None) -> Iterator[Problem]:
    """Size, sum of every chunk, and the crc32c of every record of a shard."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        nbytes = os.fstat(descriptor).st_size
        if nbytes != entry.nbytes:
            yield Problem(entry.file, f"it has {nbytes} bytes, the manifest says {entry.nbytes}", damage=True)
            return
        buffer = memoryview(bytearray(min(manifest.chunk_bytes, nbytes)))
        for number in range(entry.num_chunks(manifest.chunk_bytes)):
            start = number * manifest.chunk_bytes
            chunk = buffer[: min(manifest.chunk_bytes, nbytes - start)]
            if pread_exactly(descriptor, chunk, start) != len(chunk) or chunk_sum(chunk) != entry.chunk_sum(number):
                yield Problem(
                    entry.file,
                    f"bytes {start} to {start + len(chunk)} differ from what was written (xxh3_128)",
                    damage=True,
                )
        if isinstance(entry, ShardEntry) and index is not None:
            yield from _record_problems(descriptor, entry, index)
    finally:
        os.close(descriptor)


def _record_problems(descriptor: int, entry: ShardEntry, index: RecordIndex) -> Iterator[Problem]:
    """The crc32c of every record, over large reads."""
    mine = slice(entry.first, entry.first + entry.records)
    offsets, sizes, sums = index.offset[mine].tolist(), index.nbytes[mine].tolist(), index.crc32c[mine].tolist()
    window, window_start = memoryview(b""), 0
    for record, (offset, size, expected) in enumerate(zip(offsets, sizes, sums, strict=True), start=entry.first):
        if not (window_start <= offset and offset + size <= window_start + len(window)):
            window, window_start = memoryview(bytearray(min(max(_READ_BYTES, size), entry.nbytes - offset))), offset
            pread_exactly(descriptor, window, offset)
        if crc32c(window[offset - window_start : offset - window_start + size]) != expected:
            yield Problem(entry.file, f"record {record} is damaged (crc32c)", damage=True)


def _container_problems(
    path: Path, entry: ShardEntry, manifest: Manifest, indexes: Mapping[str, RecordIndex]
) -> Iterator[Problem]:
    """What HDF5 and Zarr see of a shard file is what the index says."""
    index = indexes.get(entry.field)
    if "hdf5" in manifest.container:
        yield from _hdf5_problems(path, entry, manifest, indexes)
    if "zarr" in manifest.container and index is not None:
        layout = ShardLayout(manifest.record_schema, manifest.container, manifest.capacity, manifest.chunk_bytes)
        mine = slice(entry.first, entry.first + entry.records)
        payload_bytes = _payload_bytes(index, mine, entry, manifest)
        expected = layout.zarr_index(
            entry.field, entry.data_offset, payload_bytes, index.offset[mine], index.nbytes[mine]
        )
        with open(path, "rb") as file:
            file.seek(max(0, entry.nbytes - len(expected)))
            if file.read() != expected:
                yield Problem(entry.file, "its Zarr shard index does not describe its payload")


def _payload_bytes(index: RecordIndex, records: slice, entry: ShardEntry, manifest: Manifest) -> int:
    """Size of the padded payload of a field whose records differ in size: it ends with the last record."""
    end = int((index.offset[records] + index.nbytes[records]).max(initial=entry.data_offset))
    return zarr_view.padded_bytes(manifest.record_schema.fields[entry.field], end - entry.data_offset)


def _hdf5_problems(
    path: Path, entry: ShardEntry, manifest: Manifest, indexes: Mapping[str, RecordIndex]
) -> Iterator[Problem]:
    schema, name, index = manifest.record_schema, entry.field, indexes.get(entry.field)
    data, mine = f"{name}/data", slice(entry.first, entry.first + entry.records)
    if schema.fields[name].codec is None:
        offset = hdf5_shard.payload_offset(path, data)
        if offset != entry.data_offset:
            yield Problem(entry.file, f"HDF5 has the payload at byte {offset}, the manifest at {entry.data_offset}")
    elif index is not None:
        places = np.stack([index.offset[mine], index.nbytes[mine].astype(np.uint64)], axis=1)
        if not np.array_equal(hdf5_shard.chunk_places(path, data), places):
            yield Problem(entry.file, "its HDF5 chunks are not where the record index says")
    for small, expected in _expected_small(entry, manifest, indexes).items():
        found = hdf5_shard.read_small(path, small)
        if found is None or found.shape[:1] != (entry.records,):
            yield Problem(entry.file, f"its HDF5 data set {small} does not have one element a record")
        elif expected is not None and not np.array_equal(found, expected):
            yield Problem(entry.file, f"its HDF5 data set {small} differs from the record index")


def _expected_small(
    entry: ShardEntry, manifest: Manifest, indexes: Mapping[str, RecordIndex]
) -> dict[str, NDArray[np.generic] | None]:
    """The small data sets of a shard file with one element a record, and their content, where an index says it."""
    schema, mine = manifest.record_schema, slice(entry.first, entry.first + entry.records)
    index = indexes.get(entry.field)
    small: dict[str, NDArray[np.generic] | None] = {
        f"{entry.field}/crc32c": None if index is None else index.crc32c[mine]
    }
    names = [entry.field]
    if entry.field == schema.primary:
        small |= dict.fromkeys(schema.columns)
        names += list(schema.ragged_columns)
    for name in names:
        field, index = schema.fields[name], indexes.get(name)
        if field.is_variable:
            count = None if index is None else index.nbytes[mine] // field.row_bytes
            small |= {hdf5_count_name(name, field): count, f"{name}/offset": None}
    return small


def _link_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    for name, target in zarr_view.link_paths(manifest):
        if not (path / name).is_symlink() or str((path / name).readlink()) != target:
            yield Problem(name, f"it is not a link to {target}")


def _zarr_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    """zarr-python opens every array, with the schema's shape and type."""
    import zarr

    schema = manifest.record_schema
    group = zarr.open_group(path, mode="r")
    names = [*schema.columns, *schema.ragged_columns]
    for name in [*names, *(schema.large_fields if "zarr" in manifest.container else ())]:
        field, array = schema.fields[name], group.get(name)
        if not isinstance(array, zarr.Array):
            yield Problem(f"{name}/zarr.json", "Zarr finds no array there")
        elif (array.dtype.name, array.shape[1:]) != (field.stored_dtype.name, field.row_shape) or (
            name in schema.columns and array.shape[0] != manifest.num_records
        ):
            yield Problem(f"{name}/zarr.json", f"Zarr has {array.dtype.name} {array.shape}, the schema {field}")
