"""Repair: damaged and missing files of a data set are made again, chunk by chunk, from another copy of it."""

import os
from dataclasses import dataclass
from pathlib import Path

from .assembly import file_sums, make_links
from .checksums import chunk_sum, pread_exactly, pwrite_all
from .errors import ChecksumError, SourceError, UsageError, destination_error
from .manifest import FileEntry, Manifest, ShardEntry
from .publish import publish_file
from .shard_writing import SHARD_MODE

_FILE_MODE = 0o644


@dataclass(frozen=True)
class Repaired:
    """What a repair did: files that were made again, and how many of their chunks came from the other copy."""

    files: tuple[str, ...]
    chunks: int


def repair(path: Path, good: Path) -> Repaired:
    """Make every file of the data set at `path` what its manifest says, with chunks of the copy at `good` where needed.

    A chunk is taken only when its sum holds; a file gets its name when all of it does. Raises UsageError when `good` is
    another data set, ChecksumError when a chunk is damaged in both, NoSpaceError or StageinError where `path` cannot be written.
    """
    try:
        return _repair(path, good)
    except OSError as error:
        raise destination_error(error, "mending", path) from None


def _repair(path: Path, good: Path) -> Repaired:
    manifest = Manifest.load(good)
    try:
        if Manifest.load(path).id != manifest.id:
            raise UsageError(f"{good} is not a copy of {path}: their ids differ, so nothing is repaired")
    except SourceError:  # the manifest itself is damaged: the files tell whether it was the same data set
        _refuse_foreign_shards(path, manifest)
        manifest.save(path)
    files, chunks = [], 0
    for entry in manifest.all_files():
        if _is_whole(path / entry.file, entry, manifest.chunk_bytes):
            continue
        chunks += _remake(path, good, entry, manifest.chunk_bytes)
        files.append(entry.file)
    make_links(path, manifest)
    return Repaired(tuple(files), chunks)


def _is_whole(path: Path, entry: FileEntry, chunk_bytes: int) -> bool:
    try:
        return path.stat().st_size == entry.nbytes and file_sums(path, chunk_bytes) == entry.xxh3_128
    except OSError:
        return False


def _refuse_foreign_shards(path: Path, manifest: Manifest) -> None:
    """Without a manifest at `path`, at least one of its shards must be one of the good copy's."""
    if manifest.shards and not any(
        _is_whole(path / shard.file, shard, manifest.chunk_bytes) for shard in manifest.shards
    ):
        raise UsageError(f"{path} has no manifest and no shard of the good copy: copy the good one as a whole instead")


def _remake(path: Path, good: Path, entry: FileEntry, chunk_bytes: int) -> int:
    """Write a file anew from the chunks that hold; returns how many came from the good copy."""
    target = path / entry.file
    target.parent.mkdir(parents=True, exist_ok=True)
    taken = 0
    with publish_file(target, mode=SHARD_MODE if isinstance(entry, ShardEntry) else _FILE_MODE) as part:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            for number in range(entry.num_chunks(chunk_bytes)):
                chunk = memoryview(bytearray(min(chunk_bytes, entry.nbytes - number * chunk_bytes)))
                if not _read_good_chunk(target, entry, number, chunk_bytes, chunk):
                    if not _read_good_chunk(good / entry.file, entry, number, chunk_bytes, chunk):
                        raise ChecksumError(
                            f"chunk {number} of {entry.file} (from byte {number * chunk_bytes}) is damaged or missing in {path} "
                            f"and in {good}: repair it from a third copy"
                        )
                    taken += 1
                pwrite_all(descriptor, chunk, number * chunk_bytes)
        finally:
            os.close(descriptor)
    return taken


def _read_good_chunk(path: Path, entry: FileEntry, number: int, chunk_bytes: int, chunk: memoryview) -> bool:
    """Fill `chunk` with chunk `number` of a file; whether its sum holds."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return pread_exactly(descriptor, chunk, number * chunk_bytes) == len(chunk) and chunk_sum(
            chunk
        ) == entry.chunk_sum(number)
    except OSError:
        return False
    finally:
        os.close(descriptor)
