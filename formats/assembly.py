"""From finished shards to a data set: the journal of what is finished, then columns, index, Zarr view and manifest.

While it grows, a data set lives in `TARGET.part`; it becomes `TARGET` by one rename when its manifest is in place.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .checksums import Buffer, chunk_sums, pread_exactly, pwrite_all
from .errors import UsageError, destination_error
from .index import ROW_FIELD, index_fields
from .manifest import MANIFEST_NAME, FileEntry, Manifest, Origin, ShardEntry
from .payload import FieldContent, packed_starts
from .payload_file import PayloadFile
from .publish import PART_SUFFIX, check_writable, fsync_file, fsync_folder, publish_bytes
from .schema import Field, column_chunk_path
from .shard_writing import ShardFile
from .shards import ShardContent, ShardLayout, ShardPlan
from .source import RefusedRecord
from .zarr_view import (
    GROUP_DOCUMENT,
    column_document,
    document,
    link_paths,
    shards_document,
    starting_rows,
)

JOURNAL_FOLDER = "journal"
_READ_BYTES = 16 << 20
_FILE_MODE = 0o644
_SYNC_THREADS = 16
_IN_A_LINE = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
"""What would end a line or a column of skipped.tsv, as it is written there."""


@dataclass(frozen=True)
class FinishedField:
    """A large field in a published shard: its manifest entry, and the index rows of its records."""

    entry: ShardEntry
    payload_bytes: int
    offset: NDArray[np.uint64]
    """Offsets of the records from the start of the file, in bytes."""
    nbytes: NDArray[np.uint32]
    crc32c: NDArray[np.uint32]


@dataclass(frozen=True)
class ColumnPart:
    """The records of a shard in a ragged column: their bytes, one record behind the other, and index rows."""

    content: NDArray[np.uint8]
    nbytes: NDArray[np.uint32]
    crc32c: NDArray[np.uint32]


@dataclass(frozen=True)
class FinishedShard:
    """A published shard: its large fields, which are in its files, its columns, which are not yet, and what was left out."""

    records: int
    large_fields: dict[str, FinishedField]
    ragged_columns: dict[str, ColumnPart]
    columns: dict[str, NDArray[np.generic]]
    skipped: tuple[RefusedRecord, ...]
    """What was left out of it, on request."""
    counts: dict[str, int]
    """What its records were counted under, added up."""


class GrowingShard:
    """Shard `number` of the data set growing in `folder`: its files are written, then published, in any thread. One without records
    has no files. All raise OSError as the file system does; on leaving the `with` block, nothing is left of what is not published.
    """

    def __init__(self, folder: Path, number: int, first: int, layout: ShardLayout) -> None:
        self._files = {name: ShardFile(folder, number, first, name, layout) for name in layout.schema.large_fields}
        self._layout = layout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.discard()

    def lay_out(self, plan: ShardPlan) -> dict[str, PayloadFile]:
        """Begin with files whose place for the payload is known before the records are: those of a field without codec, unless columns
        of unknown size stand before it. Returns them: payloads may be written to them as they come."""
        schema = self._layout.schema
        if not plan.records:
            return {}
        expected = ShardContent.expected(schema, plan)
        return {
            name: self._files[name].lay_out(expected)
            for name, field in schema.large_fields.items()
            if field.codec is None and not (name == schema.primary and schema.ragged_columns)
        }

    def write(self, content: ShardContent) -> None:
        """Write all that is not written; the memory of the payloads is not needed any more then."""
        self._content = content
        for file in self._files.values() if content.records else ():
            file.write(content)

    def publish(
        self, skipped: tuple[RefusedRecord, ...] = (), counts: Mapping[str, int] | None = None
    ) -> FinishedShard:
        """Have all of it on the disk, under its names."""
        content, large = self._content, {}
        for name, file in self._files.items() if content.records else ():
            entry, offset = file.publish()
            field = content.large_fields[name]
            large[name] = FinishedField(entry, field.payload_bytes, offset, field.nbytes, field.crc32c)
        ragged = {
            name: ColumnPart(np.frombuffer(field.pieces[0], np.uint8), field.nbytes, field.crc32c)
            for name, field in content.ragged_columns.items()
            if content.records
        }
        columns = dict(content.columns) if content.records else {}
        return FinishedShard(content.records, large, ragged, columns, skipped, dict(counts or {}))


def rewrite_field(folder: Path, number: int, shard: FinishedShard, name: str, layout: ShardLayout) -> FinishedShard:
    """Write the uncompressed file of one field of a finished shard again, in another layout. Raises OSError."""
    old = shard.large_fields[name]
    payload = memoryview(bytearray(old.payload_bytes))
    descriptor = os.open(folder / old.entry.file, os.O_RDONLY)
    try:
        pread_exactly(descriptor, payload, old.entry.data_offset)
    finally:
        os.close(descriptor)
    in_payload = old.offset - np.uint64(old.entry.data_offset)
    ragged = {
        column: FieldContent.packed([memoryview(part.content)], part.nbytes, part.crc32c)
        for column, part in shard.ragged_columns.items()
    }
    mine = {name: FieldContent([payload], old.payload_bytes, in_payload, old.nbytes, old.crc32c)}
    content = ShardContent(shard.records, mine, ragged, shard.columns)
    file = ShardFile(folder, number, old.entry.first, name, layout)
    try:
        file.write(content)
        entry, offset = file.publish()
    finally:
        file.discard()
    rewritten = FinishedField(entry, old.payload_bytes, offset, old.nbytes, old.crc32c)
    return replace(shard, large_fields={**shard.large_fields, name: rewritten})


def refuse_target(target: Path, source: Path | None = None, *, overwrite: bool) -> None:
    """Refuse a target that cannot be: better before a long scan than after it.

    source  what is not written to either, where it is a folder.

    Raises UsageError when `target` exists and may not be overwritten or lies in `source`, StageinError when it cannot be written.
    """
    try:
        is_there, is_dataset = target.exists(), (target / MANIFEST_NAME).exists()
        if not is_there:
            check_writable(target.parent)
        is_inside = source is not None and target.resolve().is_relative_to(source.resolve())
    except OSError as error:
        raise destination_error(error, "writing", target) from error
    if is_there and not is_dataset:
        raise UsageError(f"{target} exists and is not a stagein data set: choose another target")
    if is_there and not overwrite:
        raise UsageError(f"{target} exists already: choose another target, or pass --overwrite to replace it")
    if is_inside:
        raise UsageError(f"{target} lies in {source}, where it would be taken for records: choose a target outside it")


class GrowingDataset:
    """The data set that will be `target`, while it is being written in `target`.part. One process tree at a time."""

    def __init__(self, target: Path, *, overwrite: bool = False) -> None:
        """Raises UsageError when `target` exists and may not be overwritten, or another process is writing it."""
        self.target = target
        self.folder = target.with_name(target.name + PART_SUFFIX)
        self._overwrite = overwrite
        refuse_target(target, overwrite=overwrite)
        for folder in (self.folder, self.folder / "shards", self.folder / JOURNAL_FOLDER):
            folder.mkdir(parents=folder is self.folder, exist_ok=True)
        self._lock = os.open(self.folder / JOURNAL_FOLDER / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UsageError(f"{self.folder} is being written by another process: wait for it to end") from None
        self._sweep()

    def close(self) -> None:
        """Let others write it; what is finished stays for them to resume."""
        self._sweep()
        os.close(self._lock)

    def _sweep(self) -> None:
        """Remove half-written files of processes that were killed; that we hold the lock says they are gone."""
        for leftover in self.folder.rglob(f".*{PART_SUFFIX}"):
            leftover.unlink()

    def discard(self) -> None:
        """Give up: remove what was written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def publish(
        self,
        layout: ShardLayout,
        shards: Sequence[FinishedShard],
        origin: Origin,
        skipped: Sequence[RefusedRecord] = (),
    ) -> Manifest:
        """Complete the data set from its shards, in order, and give it its final name."""
        shards = [shard for shard in shards if shard.records]
        manifest = _write_all_but_shards(self.folder, layout, shards, origin, skipped)
        expected = {self.folder / field.entry.file for shard in shards for field in shard.large_fields.values()}
        for path in sorted((self.folder / "shards").rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif path.is_file() and path not in expected:  # of an earlier attempt with other options
                path.unlink()
        manifest.save(self.folder)
        shutil.rmtree(self.folder / JOURNAL_FOLDER)
        fsync_folder(self.folder)
        if self._overwrite and self.target.exists():
            old = self.target.with_name(f".{self.target.name}.{os.getpid()}.old")
            self.target.rename(old)
            self.folder.rename(self.target)
            shutil.rmtree(old)
        else:
            self.folder.rename(self.target)
        fsync_folder(self.target.parent)
        return manifest


def journal_shard(folder: Path, number: int, fingerprint: str, shard: FinishedShard) -> None:
    """Note that shard `number` is finished; `fingerprint` says from what it was made."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, field in shard.large_fields.items():
        arrays |= {f"{name}.{part}": getattr(field, part) for part in ("offset", "nbytes", "crc32c")}
    for name, column in shard.ragged_columns.items():
        arrays |= {f"{name}.{part}": getattr(column, part) for part in ("content", "nbytes", "crc32c")}
    head = {
        "fingerprint": fingerprint,
        "records": shard.records,
        "large_fields": [
            (name, field.entry.model_dump(), field.payload_bytes) for name, field in shard.large_fields.items()
        ],
        "ragged_columns": list(shard.ragged_columns),
        "columns": list(shard.columns),
        "skipped": [(refused.name, refused.reason) for refused in shard.skipped],
        "counts": shard.counts,
    }
    content = io.BytesIO()
    np.savez(content, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays, **shard.columns)  # type: ignore[arg-type]
    publish_bytes(_journal_path(folder, number), content.getvalue())


def resume_shard(folder: Path, number: int, fingerprint: str, chunk_bytes: int) -> FinishedShard | None:
    """Shard `number` of an earlier attempt, when it was made from the same records and all its sums hold; else None."""
    try:
        with np.load(_journal_path(folder, number), allow_pickle=False) as content:
            head = json.loads(content["head"].tobytes())
            if head["fingerprint"] != fingerprint:
                return None
            shard = _shard_from_journal(head, content)
        for field in shard.large_fields.values():
            if file_sums(folder / field.entry.file, chunk_bytes) != field.entry.xxh3_128:
                return None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # none, or damaged: the shard is made again
        return None
    return shard


def _shard_from_journal(head: Any, content: Mapping[str, NDArray[Any]]) -> FinishedShard:
    return FinishedShard(
        head["records"],
        {
            name: FinishedField(
                ShardEntry(**entry),
                payload_bytes,
                content[f"{name}.offset"],
                content[f"{name}.nbytes"],
                content[f"{name}.crc32c"],
            )
            for name, entry, payload_bytes in head["large_fields"]
        },
        {
            name: ColumnPart(content[f"{name}.content"], content[f"{name}.nbytes"], content[f"{name}.crc32c"])
            for name in head["ragged_columns"]
        },
        {name: content[name] for name in head["columns"]},
        tuple(RefusedRecord(name, reason) for name, reason in head["skipped"]),
        head["counts"],
    )


def fingerprint(*parts: object) -> str:
    """A short name for what a shard is made from; equal parts give equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _journal_path(folder: Path, number: int) -> Path:
    return folder / JOURNAL_FOLDER / f"{number:05d}.npz"


def file_sums(path: Path, chunk_bytes: int) -> str:
    """The xxh3_128 of every chunk of a file, as one hex string. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return b"".join(chunk_sums(iter(lambda: file.read(_READ_BYTES), b""), chunk_bytes)).hex()


def _write_all_but_shards(
    folder: Path,
    layout: ShardLayout,
    shards: Sequence[FinishedShard],
    origin: Origin,
    skipped: Sequence[RefusedRecord],
) -> Manifest:
    files = _FileWriter(folder, layout.chunk_bytes)
    files.write("zarr.json", [document(GROUP_DOCUMENT)])
    files.write("index/zarr.json", [document(GROUP_DOCUMENT)])
    for name, field in layout.schema.columns.items():
        files.write_column(name, field, [shard.columns[name] for shard in shards])
    for name in layout.schema.indexed_fields:
        _write_index(files, layout, name, shards)
    for name, field in layout.schema.ragged_columns.items():
        files.write_column(name, field, [_rows(field, shard.ragged_columns[name].content) for shard in shards])
    if "zarr" in layout.container:
        for name, field in layout.schema.large_fields.items():
            rows = [_shard_rows(field, shard.large_fields[name], shard.records) for shard in shards]
            files.write(f"{name}/zarr.json", [document(shards_document(field, layout.capacity[name], rows))])
    if skipped:
        lines = "".join(
            f"{refused.name.translate(_IN_A_LINE)}\t{refused.reason.translate(_IN_A_LINE)}\n" for refused in skipped
        )
        files.write("skipped.tsv", [lines.encode(errors="surrogateescape")])
    manifest = Manifest(
        version=layout.schema.format_version,
        container=layout.container,
        schema=layout.schema,
        num_records=sum(shard.records for shard in shards),
        capacity=dict(layout.capacity),
        chunk_bytes=layout.chunk_bytes,
        shards=_renumbered_entries(layout, shards),
        files=tuple(sorted(files.entries, key=lambda entry: entry.file)),
        source=origin,
    ).sealed()
    make_links(folder, manifest)
    _make_durable([folder / entry.file for entry in files.entries], folder)
    return manifest


def _make_durable(files: Sequence[Path], folder: Path) -> None:
    """Have these files, and all names below `folder`, on the disk. Many at a time: file systems write them together then."""
    folders = [Path(each) for each, _, _ in os.walk(folder)]
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        synced = pool.map(fsync_file, files), pool.map(fsync_folder, folders)
        list(chain(*synced))  # raises what was raised


def _renumbered_entries(layout: ShardLayout, shards: Sequence[FinishedShard]) -> tuple[ShardEntry, ...]:
    """The entries of all shard files, field after field; records that were skipped move the first record of later shards."""
    firsts = np.cumsum([0, *(shard.records for shard in shards)]).tolist()
    return tuple(
        shard.large_fields[name].entry.model_copy(update={"first": first})
        for name in layout.schema.large_fields
        for shard, first in zip(shards, firsts, strict=False)
    )


def _write_index(files: "_FileWriter", layout: ShardLayout, name: str, shards: Sequence[FinishedShard]) -> None:
    """The index of a field that is read record by record; with a Zarr array, also at which row of it each record starts."""
    field = layout.schema.fields[name]
    if name in layout.schema.ragged_columns:
        parts = [(shard.ragged_columns[name].nbytes, shard.ragged_columns[name].crc32c) for shard in shards]
        sizes = [nbytes for nbytes, _ in parts]
        offsets = _offsets_of_column(sizes)
        numbers = [np.zeros(len(nbytes), np.uint32) for nbytes in sizes]
        rows = [starting_rows(field, offset, 0, 0) for offset in offsets]
        sums = [crc32c for _, crc32c in parts]
    else:
        finished = [shard.large_fields[name] for shard in shards]
        sizes, sums = [each.nbytes for each in finished], [each.crc32c for each in finished]
        offsets = [each.offset for each in finished]
        numbers = [np.full(shard.records, number, np.uint32) for number, shard in enumerate(shards)]
        rows = [
            starting_rows(field, each.offset, each.entry.data_offset, number * layout.capacity[name])
            for number, each in enumerate(finished)
        ]
    files.write(f"index/{name}/zarr.json", [document(GROUP_DOCUMENT)])
    arrays: dict[str, Any] = {"shard": numbers, "offset": offsets, "nbytes": sizes, "crc32c": sums}
    for path, declared in index_fields(name).items():
        files.write_column(path, declared, arrays[path.rpartition("/")[2]])
    if "zarr" in layout.container or name in layout.schema.ragged_columns:
        files.write_column(f"index/{name}/row", ROW_FIELD, rows)


def _offsets_of_column(sizes: Sequence[NDArray[np.uint32]]) -> list[NDArray[np.uint64]]:
    """Where the records of a ragged column start in its file, part after part."""
    first, offsets = 0, []
    for nbytes in sizes:
        offsets.append(packed_starts(nbytes) + np.uint64(first))
        first += int(nbytes.sum(dtype=np.uint64))
    return offsets


def _shard_rows(field: Field, finished: FinishedField, records: int) -> int:
    return finished.payload_bytes // field.row_bytes if field.is_variable else records


def _rows(field: Field, content: NDArray[np.uint8]) -> NDArray[np.generic]:
    return content.view(field.stored_dtype).reshape(-1, *field.row_shape)


class _FileWriter:
    """Writes the files beside the shards, piece by piece, and keeps their manifest entries."""

    def __init__(self, folder: Path, chunk_bytes: int) -> None:
        self._folder = folder
        self._chunk_bytes = chunk_bytes
        self.entries: list[FileEntry] = []

    def write(self, name: str, pieces: Sequence[Buffer]) -> None:
        """Write the file `name` with these bytes; it is durable later, and counts only when the manifest does."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of an earlier attempt, where it may be a link to a shard
        with open(path, "xb", buffering=0) as file:
            os.fchmod(file.fileno(), _FILE_MODE)
            for piece in pieces:
                pwrite_all(file.fileno(), piece, file.tell())
                file.seek(0, os.SEEK_END)
        sums = b"".join(chunk_sums(pieces, self._chunk_bytes)).hex()
        nbytes = sum(memoryview(piece).nbytes for piece in pieces)
        self.entries.append(FileEntry(file=name, nbytes=nbytes, xxh3_128=sums))

    def write_column(self, name: str, field: Field, parts: Sequence[NDArray[np.generic]]) -> None:
        """Publish a column of these parts as a Zarr array of one chunk."""
        self.write(f"{name}/zarr.json", [document(column_document(field, sum(len(part) for part in parts)))])
        if parts:
            stored = [np.ascontiguousarray(part, field.stored_dtype).reshape(-1).view(np.uint8) for part in parts]
            self.write(column_chunk_path(name, field), stored)


def make_links(folder: Path, manifest: Manifest) -> None:
    """Make the relative links of the Zarr view below `folder`; links that stand already are replaced."""
    for name, target in link_paths(manifest):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
