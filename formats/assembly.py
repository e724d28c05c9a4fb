"""From finished shards to a data set: the journal of what is finished, then columns, index, Zarr view and manifest.

While it grows, a data set lives in `TARGET.part`; it becomes `TARGET` by one rename when its manifest is in place.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checksums import chunk_sums
from .errors import UsageError
from .index import index_fields
from .manifest import MANIFEST_NAME, FileEntry, Manifest, Origin, ShardEntry
from .publish import PART_SUFFIX, fsync_folder, publish_bytes
from .schema import Field
from .shards import ShardContent, ShardLayout, write_shard
from .sources import RefusedRecord
from .zarr_view import GROUP_DOCUMENT, column_chunk_path, column_document, document, link_paths, primary_document

JOURNAL_FOLDER = "journal"
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class FinishedShard:
    """A published shard: its manifest entry, the index rows and columns of its records, and what was left out of it."""

    entry: ShardEntry
    payload_bytes: int
    offset: NDArray[np.uint64]
    """Offsets of the records from the start of the file, in bytes."""
    nbytes: NDArray[np.uint32]
    crc32c: NDArray[np.uint32]
    columns: dict[str, NDArray[np.generic]]
    skipped: tuple[RefusedRecord, ...] = ()
    """What was left out of it, on request."""


def finish_shard(
    folder: Path,
    number: int,
    first: int,
    content: ShardContent,
    layout: ShardLayout,
    skipped: tuple[RefusedRecord, ...] = (),
) -> FinishedShard:
    """Write and publish shard `number` of the data set growing in `folder`. Raises OSError as the file system does."""
    entry, offset = write_shard(folder, number, first, content, layout)
    payload_bytes, columns = len(content.payload), dict(content.columns)
    return FinishedShard(entry, payload_bytes, offset, content.nbytes, content.crc32c, columns, skipped)


class GrowingDataset:
    """The data set that will be `target`, while it is being written in `target`.part. One process tree at a time."""

    def __init__(self, target: Path, *, overwrite: bool = False) -> None:
        """Raises UsageError when `target` exists and may not be overwritten, or another process is writing it."""
        self.target = target
        self.folder = target.with_name(target.name + PART_SUFFIX)
        self._overwrite = overwrite
        if target.exists():
            if not overwrite:
                raise UsageError(f"{target} exists already: choose another target, or pass --overwrite to replace it")
            if not (target / MANIFEST_NAME).exists():
                raise UsageError(
                    f"{target} exists and is not a stagein data set, so it is not overwritten: choose another target"
                )
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
        manifest = _write_all_but_shards(self.folder, layout, shards, origin, skipped)
        expected = {shard.entry.file for shard in shards}
        for path in (self.folder / "shards").iterdir():  # shards of an earlier attempt with other options
            if f"shards/{path.name}" not in expected:
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
    head = {
        "fingerprint": fingerprint,
        "entry": shard.entry.model_dump(),
        "payload_bytes": shard.payload_bytes,
        "skipped": [(refused.name, refused.reason) for refused in shard.skipped],
        "columns": sorted(shard.columns),
    }
    arrays: dict[str, Any] = {"offset": shard.offset, "nbytes": shard.nbytes, "crc32c": shard.crc32c}
    arrays |= {f"column.{name}": values for name, values in shard.columns.items()}
    content = io.BytesIO()
    np.savez(content, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    publish_bytes(_journal_path(folder, number), content.getvalue())


def resume_shard(folder: Path, number: int, fingerprint: str, chunk_bytes: int) -> FinishedShard | None:
    """Shard `number` of an earlier attempt, when it was made from the same records and all its sums hold; else None."""
    try:
        with np.load(_journal_path(folder, number), allow_pickle=False) as content:
            head = json.loads(content["head"].tobytes())
            if head["fingerprint"] != fingerprint:
                return None
            shard = FinishedShard(
                ShardEntry(**head["entry"]),
                head["payload_bytes"],
                content["offset"],
                content["nbytes"],
                content["crc32c"],
                {name: content[f"column.{name}"] for name in head["columns"]},
                tuple(RefusedRecord(name, reason) for name, reason in head["skipped"]),
            )
        if file_sums(folder / shard.entry.file, chunk_bytes) != shard.entry.xxh3_128:
            return None
    except (OSError, ValueError, KeyError):  # no journal entry, or a damaged one: the shard is made again
        return None
    return shard


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
    schema, primary = layout.schema, layout.schema.primary
    num_records = sum(shard.entry.records for shard in shards)
    files: dict[str, bytes] = {"zarr.json": document(GROUP_DOCUMENT)}

    def add_column(name: str, field: Field, parts: list[NDArray[np.generic]]) -> None:
        files[f"{name}/zarr.json"] = document(column_document(field, num_records))
        if num_records:
            column = np.concatenate(parts).astype(field.stored_dtype, copy=False)
            files[column_chunk_path(name, field)] = column.tobytes()

    files["index/zarr.json"] = files[f"index/{primary}/zarr.json"] = document(GROUP_DOCUMENT)
    rows: dict[str, list[NDArray[np.generic]]] = {
        "shard": [np.full(shard.entry.records, number, np.uint32) for number, shard in enumerate(shards)],
        "offset": [shard.offset for shard in shards],
        "nbytes": [shard.nbytes for shard in shards],
        "crc32c": [shard.crc32c for shard in shards],
    }
    for name, field in index_fields(primary).items():
        add_column(name, field, rows[name.rpartition("/")[2]])
    for name, field in schema.columns.items():
        add_column(name, field, [shard.columns[name] for shard in shards])
    if "zarr" in layout.container:
        last_payload = shards[-1].payload_bytes if shards else 0
        files[f"{primary}/zarr.json"] = document(
            primary_document(schema.primary_field, num_records, layout.capacity, last_payload, len(shards))
        )
    if skipped:
        files["skipped.tsv"] = "".join(f"{refused.name}\t{refused.reason}\n" for refused in skipped).encode()

    entries = []
    for name, content in sorted(files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(folder / name, content)
        entries.append(
            FileEntry(
                file=name, nbytes=len(content), xxh3_128=b"".join(chunk_sums([content], layout.chunk_bytes)).hex()
            )
        )
    first, shard_entries = 0, []
    for shard in shards:  # records that were skipped move the first record of later shards
        shard_entries.append(shard.entry.model_copy(update={"first": first}))
        first += shard.entry.records
    manifest = Manifest(
        container=layout.container,
        schema=schema,
        num_records=num_records,
        capacity=layout.capacity,
        chunk_bytes=layout.chunk_bytes,
        shards=tuple(shard_entries),
        files=tuple(entries),
        source=origin,
    ).sealed()
    make_links(folder, manifest)
    return manifest


def make_links(folder: Path, manifest: Manifest) -> None:
    """Make the relative links of the Zarr view below `folder`; links that stand already are replaced."""
    for name, target in link_paths(manifest):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
