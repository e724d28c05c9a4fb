"""Verification: every sum, count, index entry and link of a data set, and both container views, checked by reading them."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import hdf5_shard, zarr_view
from .checksums import chunk_sum, crc32c, pread_exactly
from .errors import ChecksumError, SourceError, StageinError
from .index import ROW_FIELD, RecordIndex, load_column
from .manifest import FileEntry, Manifest, ShardEntry
from .schema import Field, column_chunk_path, shape_name
from .shard_writing import hdf5_count_name, shard_attributes
from .shards import ShardLayout
from .values import fits_shapes

_READ_BYTES = 16 << 20
_LISTED = 20
"""An error names so many problems; the report has all of them."""


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
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def error(self, path: Path) -> StageinError | None:
        """The problems as one error: ChecksumError when any byte is wrong, SourceError when files are missing; else None."""
        if not self.problems:
            return None
        kind = ChecksumError if any(problem.damage for problem in self.problems) else SourceError
        listed = "".join(f"\n  {problem}" for problem in self.problems[:_LISTED])
        more = f"\n  and {len(self.problems) - _LISTED:,} more" if len(self.problems) > _LISTED else ""
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return kind(
            f"{path} has {count}: mend it by `stagein verify --repair --from GOOD_COPY`, or convert it again{listed}{more}"
        )


def verify(
    path: Path, *, workers: int = 1, on_progress: Callable[[int, int], None] = lambda nbytes, total: None
) -> VerifyReport:
    """Read all of the data set at `path` with `workers` threads and check it; `on_progress` gets bytes done and in all.

    Raises SourceError when there is no manifest that can be trusted; everything else is in the report.
    """
    manifest = Manifest.load(path)
    report = VerifyReport(manifest)
    tables = _Tables(path, manifest)
    report.problems += [*tables.problems, *_shape_problems(tables)]
    parts: dict[str, list[ShardEntry]] = {entry.file: [] for entry in manifest.all_files()}
    for name in manifest.record_schema.indexed_fields:
        for part in manifest.parts_of(name):
            parts[part.file].append(part)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_verify_file, tables, entry, parts[entry.file]) for entry in manifest.all_files()]
        for job in as_completed(jobs):
            entry, problems = job.result()
            report.files += 1
            report.nbytes += entry.nbytes
            report.sums += entry.num_chunks(manifest.chunk_bytes) + sum(part.records for part in parts[entry.file])
            report.problems += problems
            on_progress(report.nbytes, manifest.nbytes)
    report.problems += _link_problems(path, manifest)
    if not report.problems:
        report.problems += _zarr_problems(tables)
    report.problems.sort(key=lambda problem: (problem.file, problem.text))
    return report


class _Tables:
    """What a data set says about its records outside the shards: their indexes and columns, as far as they can be trusted."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.problems: list[Problem] = []
        self.indexes: dict[str, RecordIndex] = {}
        self.columns: dict[str, NDArray[np.generic]] = {}
        for name in manifest.record_schema.indexed_fields:
            with self._noting(f"index/{name}"):
                self.indexes[name] = RecordIndex.load(path, manifest, name)
        for name, field in manifest.record_schema.columns.items():
            with self._noting(name):
                self.columns[name] = load_column(path, name, field, manifest)

    @contextmanager
    def _noting(self, file: str) -> Iterator[None]:
        try:
            yield
        except (SourceError, ChecksumError) as error:
            self.problems.append(Problem(file, str(error), isinstance(error, ChecksumError)))

    def rows_in_shard(self, entry: ShardEntry, name: str) -> dict[str, NDArray[np.generic]]:
        """The small data sets that the file of a shard has about the field `name`, as the tables say they are."""
        field, mine = self.manifest.record_schema.fields[name], slice(entry.first, entry.first + entry.records)
        if name in self.columns:
            return {name: self.columns[name][mine].view(field.stored_dtype)}
        index = self.indexes.get(name)
        if index is None:
            return {}
        offset, nbytes, row_bytes = index.offset[mine], index.nbytes[mine], np.uint64(field.row_bytes)
        small: dict[str, NDArray[np.generic]] = {}
        start = np.uint64(entry.data_offset)
        if name == entry.field:
            small[f"{name}/crc32c"] = index.crc32c[mine]
        else:  # a ragged column: its rows stand in this file too
            start = offset[0] if len(offset) else np.uint64(0)
            stop = int(offset[-1]) + int(nbytes[-1]) if len(offset) else 0
            small[f"{name}/data"] = self._column_rows(name, field, int(start), stop)
        if field.is_variable:
            small[f"{name}/offset"] = (offset - start) // row_bytes
            small[hdf5_count_name(name, field)] = nbytes.astype(np.uint64) // row_bytes
        return small

    def _column_rows(self, name: str, field: Field, start: int, stop: int) -> NDArray[np.generic]:
        content = np.zeros(stop - start, np.uint8)
        with open(self.path / column_chunk_path(name, field), "rb", buffering=0) as file:
            pread_exactly(file.fileno(), content.data, start)
        return content.view(field.stored_dtype).reshape(-1, *field.row_shape)


def _verify_file(tables: _Tables, entry: FileEntry, parts: Sequence[ShardEntry]) -> tuple[FileEntry, list[Problem]]:
    """`parts` are the fields of which the file has records."""
    path = tables.path / entry.file
    try:
        problems = list(_content_problems(path, entry, tables, parts))
        if isinstance(entry, ShardEntry) and not problems:
            problems = [problem for part in parts for problem in _container_problems(path, part, tables)]
    except OSError as error:
        reason = (
            "it is missing" if isinstance(error, FileNotFoundError) else f"it cannot be read: {error.strerror or error}"
        )
        problems = [Problem(entry.file, reason)]
    return entry, problems


def _content_problems(path: Path, entry: FileEntry, tables: _Tables, parts: Sequence[ShardEntry]) -> Iterator[Problem]:
    """Size, sum of every chunk, and the crc32c of every record in it."""
    manifest = tables.manifest
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would be waited for
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
        for part in parts:
            if part.field in tables.indexes:
                yield from _record_problems(descriptor, part, tables.indexes[part.field])
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


def _container_problems(path: Path, entry: ShardEntry, tables: _Tables) -> Iterator[Problem]:
    """What HDF5 and Zarr see of a shard file is what the tables say."""
    manifest, index = tables.manifest, tables.indexes.get(entry.field)
    if "hdf5" in manifest.container:
        try:
            yield from list(_hdf5_problems(path, entry, tables))
        except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # the library raises any of them
            yield Problem(entry.file, f"HDF5 cannot read it: {str(error).splitlines()[0]}", damage=True)
    if "zarr" in manifest.container and index is not None:
        layout = ShardLayout(manifest.record_schema, manifest.container, manifest.capacity, manifest.chunk_bytes)
        mine = slice(entry.first, entry.first + entry.records)
        payload_bytes = _payload_bytes(index, entry, manifest)
        expected = layout.zarr_index(
            entry.field, entry.data_offset, payload_bytes, index.offset[mine], index.nbytes[mine]
        )
        with open(path, "rb") as file:
            file.seek(max(0, entry.nbytes - len(expected)))
            if file.read() != expected:
                yield Problem(entry.file, "its Zarr shard index does not describe its payload")


def _payload_bytes(index: RecordIndex, entry: ShardEntry, manifest: Manifest) -> int:
    """Size of the padded payload of a field whose records differ in size: it ends with the last record."""
    mine = slice(entry.first, entry.first + entry.records)
    end = int((index.offset[mine] + index.nbytes[mine]).max(initial=entry.data_offset))
    return zarr_view.padded_bytes(manifest.record_schema.fields[entry.field], end - entry.data_offset)


def _hdf5_problems(path: Path, entry: ShardEntry, tables: _Tables) -> Iterator[Problem]:
    """Attributes, place of the payload and every small data set of a shard file."""
    schema, index = tables.manifest.record_schema, tables.indexes.get(entry.field)
    data, mine = f"{entry.field}/data", slice(entry.first, entry.first + entry.records)
    attributes: dict[str, Any] = dict(hdf5_shard.read_attributes(path))
    for name, expected in shard_attributes(schema, entry.field, entry.records).items():
        if name not in attributes or not np.array_equal(attributes[name], np.asarray(expected)):
            yield Problem(entry.file, f"its HDF5 attribute {name} is {attributes.get(name)}, not {expected}")
    if schema.fields[entry.field].codec is None:
        offset = hdf5_shard.payload_offset(path, data)
        if offset != entry.data_offset:
            yield Problem(entry.file, f"HDF5 has the payload at byte {offset}, the manifest at {entry.data_offset}")
    elif index is not None:
        places = np.stack([index.offset[mine], index.nbytes[mine].astype(np.uint64)], axis=1)
        if not np.array_equal(hdf5_shard.chunk_places(path, data), places):
            yield Problem(entry.file, "its HDF5 chunks are not where the record index says")
    columns = [*schema.columns, *schema.ragged_columns] if entry.field == schema.primary else []
    for field in [entry.field, *columns]:
        for name, rows in tables.rows_in_shard(entry, field).items():
            found = hdf5_shard.read_small(path, name)
            if found is None:
                yield Problem(entry.file, f"it has no HDF5 data set {name}")
            elif (found.dtype, found.shape) != (rows.dtype, rows.shape) or found.tobytes() != rows.tobytes():
                yield Problem(entry.file, f"its HDF5 data set {name} is not what the data set has for its records")


def _shape_problems(tables: _Tables) -> Iterator[Problem]:
    """The shape of every record that has one in a column is one of its field and fits its bytes."""
    for name, field in tables.manifest.record_schema.shaped_fields.items():
        column = shape_name(name)
        if name not in tables.indexes or column not in tables.columns:
            continue
        shapes, nbytes = tables.columns[column].astype(np.int64), tables.indexes[name].nbytes
        file = column_chunk_path(column, tables.manifest.record_schema.fields[column])
        for record in np.flatnonzero(~fits_shapes(field, shapes, nbytes)).tolist():
            text = f"record {record} has {nbytes[record]} bytes of {name!r}, which are no array of the shape"
            yield Problem(file, f"{text} {tuple(shapes[record].tolist())}", damage=True)


def _link_problems(path: Path, manifest: Manifest) -> Iterator[Problem]:
    for name, target in zarr_view.link_paths(manifest):
        if not (path / name).is_symlink() or str((path / name).readlink()) != target:
            yield Problem(name, f"it is not a link to {target}")


def _zarr_problems(tables: _Tables) -> Iterator[Problem]:
    """The Zarr documents and the rows of records are what the schema and the shards say, and zarr-python opens every array."""
    import zarr

    path, manifest = tables.path, tables.manifest
    group = zarr.open_group(path, mode="r")
    for name, expected in _zarr_documents(tables).items():
        if json.loads((path / name / "zarr.json").read_bytes()) != json.loads(zarr_view.document(expected)):
            yield Problem(f"{name}/zarr.json", "it does not describe what the data set has")
        elif not isinstance(group.get(name), zarr.Array):
            yield Problem(f"{name}/zarr.json", "Zarr finds no array there")
    for name in manifest.record_schema.indexed_fields:
        if "zarr" in manifest.container or name in manifest.record_schema.ragged_columns:
            rows = load_column(path, f"index/{name}/row", ROW_FIELD, manifest)
            if not np.array_equal(rows, _expected_rows(tables, name)):
                yield Problem(f"index/{name}/row", "it does not say at which row of the Zarr array each record starts")


def _zarr_documents(tables: _Tables) -> dict[str, dict[str, object]]:
    """The metadata of the Zarr array of every field."""
    manifest, schema = tables.manifest, tables.manifest.record_schema
    documents = {name: zarr_view.column_document(field, manifest.num_records) for name, field in schema.columns.items()}
    for name, field in schema.ragged_columns.items():
        rows = sum(part.nbytes for part in manifest.parts_of(name)) // field.row_bytes
        documents[name] = zarr_view.column_document(field, rows)
    if "zarr" in manifest.container:
        for name, field in schema.large_fields.items():
            shards, index = manifest.shards_of(name), tables.indexes[name]
            rows_of_shards = [
                _payload_bytes(index, shard, manifest) // field.row_bytes if field.is_variable else shard.records
                for shard in shards
            ]
            documents[name] = zarr_view.shards_document(field, manifest.capacity[name], rows_of_shards)
    return documents


def _expected_rows(tables: _Tables, name: str) -> NDArray[np.uint64]:
    field, index, capacity = (
        tables.manifest.record_schema.fields[name],
        tables.indexes[name],
        tables.manifest.capacity.get(name, 0),
    )
    rows = [
        zarr_view.starting_rows(
            field, index.offset[part.first : part.first + part.records], part.data_offset, number * capacity
        )
        for number, part in enumerate(tables.manifest.parts_of(name))
    ]
    return np.concatenate([np.zeros(0, np.uint64), *rows])
