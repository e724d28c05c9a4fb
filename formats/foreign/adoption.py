"""Adoption: a data set over HDF5 files or Zarr arrays of others, whose records are read where they lie; nothing is rewritten.

The new folder has the files as hard links, so that it can be staged, verified and moved as any data set, and what is
adopted stays even when its old name goes. Sums of what the files hold now are kept: a later edit in place is found.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stagein.formats.assembly import FinishedField, FinishedShard, GrowingDataset, file_sums
from stagein.formats.checksums import crc32c
from stagein.formats.errors import ChecksumError, SourceError, UsageError, destination_error, source_error
from stagein.formats.index import RecordIndex
from stagein.formats.listing import files_below
from stagein.formats.manifest import DEFAULT_CHUNK_BYTES, Manifest, Origin, ShardEntry
from stagein.formats.record_reader import RecordReader
from stagein.formats.schema import Field, make_schema
from stagein.formats.shards import ShardLayout

from .layout import ForeignPart, ForeignRecords, ForeignShard

_BATCH_BYTES = 16 << 20
_HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5", ".nc")


def scan_foreign(
    source: Path, fields: Mapping[str, str] | None = None, primary: str | None = None, *, file_per_record: bool = False
) -> ForeignRecords:
    """What can be adopted of `source`: an HDF5 file, a folder of HDF5 files of one layout, or the folder of a Zarr v3 array or
    group. See `scan_foreign_hdf5` and `scan_foreign_zarr` for the arguments.

    Raises UsageError, one sentence, for what cannot be adopted; SourceError for what cannot be read.
    """
    _refuse_unreadable(source)
    if (source / "zarr.json").exists():
        from .zarr import scan_foreign_zarr

        if file_per_record:
            raise UsageError(f"{source} is Zarr, whose records are rows: --file-per-record is for HDF5 files")
        return scan_foreign_zarr(source, fields, primary)
    from .hdf5 import scan_foreign_hdf5

    if (source / ".zarray").exists() or (source / ".zgroup").exists():
        raise UsageError(
            f"{source} is of Zarr v2, and only v3 is adopted: use `stagein convert python MODULE:FUNCTION` with a function of "
            "yours that gives its rows"
        )
    return scan_foreign_hdf5(_hdf5_files(source), fields, primary, file_per_record=file_per_record)


def _refuse_unreadable(source: Path) -> None:
    try:
        if not source.exists():
            raise SourceError(f"{source} is not there: is the path right?")
        if source.is_dir():
            os.scandir(source).close()
    except OSError as error:
        raise source_error(error, "reading", source) from None


def _hdf5_files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    paths = [path for path in files_below(source) if path.suffix.lower() in _HDF5_SUFFIXES]
    if not paths:
        raise SourceError(f"{source} holds no HDF5 files (*.h5, *.hdf5, …), and is no array and no group of Zarr v3")
    return paths


def adopt(
    records: ForeignRecords,
    target: Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Make the data set `target` over the files of `records`; `on_progress` gets bytes done and in all.

    All of them are read once, for their sums, and of each the first record is decoded. Raises UsageError where they cannot be
    linked into `target`, ChecksumError for a record that cannot be decoded.
    """
    schema = make_schema({**records.large, **records.columns}, records.primary).resolved({})
    capacity = {name: max(len(shard.parts[name].offset) for shard in records.shards) for name in records.large}
    layout = ShardLayout(schema, "foreign", capacity, DEFAULT_CHUNK_BYTES)
    try:
        growing = GrowingDataset(target, overwrite=overwrite)
    except OSError as error:
        raise destination_error(error, "writing", target) from None
    try:
        total = sum(_size(path) for shard in records.shards for path in {part.path for part in shard.parts.values()})
        shards, done = [], 0
        for number, shard in enumerate(records.shards):
            adopted = _adopt_shard(growing.folder, number, shard, records, layout.chunk_bytes)
            shards.append(adopted)
            done += sum({field.entry.file: field.entry.nbytes for field in adopted.large_fields.values()}.values())
            on_progress(done, total)
        sums = hashlib.sha256()
        for name in records.large:
            sums.update(b"".join(shard.large_fields[name].crc32c.tobytes() for shard in shards))
        origin = Origin(kind=f"adopted {records.kind}", records_sha256=sums.hexdigest())
        manifest = growing.publish(layout, shards, origin)
    except OSError as error:
        growing.discard()
        raise destination_error(error, "writing", target) from None
    except BaseException:
        growing.discard()
        raise
    growing.close()
    return manifest


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise source_error(error, "reading", path) from None


def _adopt_shard(
    folder: Path, number: int, shard: ForeignShard, records: ForeignRecords, chunk_bytes: int
) -> FinishedShard:
    linked: dict[Path, ShardEntry] = {}
    large = {}
    for name, part in shard.parts.items():
        if part.path not in linked:  # fields may lie in one file
            place = "shards" if name == records.primary else f"shards/{name}"
            suffix = part.path.suffix if records.kind == "hdf5" else ".zarr-chunk"
            linked[part.path] = _link(folder, f"{place}/{number:05d}{suffix}", part, chunk_bytes)
        entry = linked[part.path].model_copy(update={"field": name, "data_offset": int(part.offset.min())})
        payload_bytes = int(part.nbytes.sum(dtype=np.uint64))
        sums = _record_sums(folder / entry.file, name, part, records.large[name])
        large[name] = FinishedField(entry, payload_bytes, part.offset, part.nbytes, sums)
    count = len(next(iter(shard.parts.values())).offset)
    return FinishedShard(count, large, {}, dict(shard.columns), (), {})


def _link(folder: Path, name: str, part: ForeignPart, chunk_bytes: int) -> ShardEntry:
    """Give the file a name in the data set, and sum it."""
    linked = folder / name
    linked.parent.mkdir(exist_ok=True)
    try:
        linked.unlink(missing_ok=True)
        os.link(part.path.resolve(), linked)
    except OSError as error:
        raise UsageError(
            f"{part.path} cannot be linked into {folder} ({error.strerror}): choose a target on the same file system, "
            f"and files of your own, or use `stagein convert`"
        ) from None
    try:
        sums, nbytes = file_sums(linked, chunk_bytes), linked.stat().st_size
    except OSError as error:
        raise source_error(error, "reading", part.path) from None
    count = len(part.offset)
    return ShardEntry(file=name, nbytes=nbytes, xxh3_128=sums, field="", records=count, first=0, data_offset=0)


def _record_sums(path: Path, name: str, part: ForeignPart, field: Field) -> NDArray[np.uint32]:
    """The crc32c of every record as it lies in the file, whose first record is decoded to see that it can be."""
    count = len(part.offset)
    no_sums = np.zeros(count, np.uint32)
    reader = RecordReader(field, RecordIndex(no_sums, part.offset, part.nbytes, no_sums), [path])
    try:
        (first,) = reader.read_packed([0], check=False)
        try:
            reader.decode(first)
        except ChecksumError as error:
            raise ChecksumError(f"the first record of {name!r} in {part.path} cannot be decoded: {error}") from None
        each = max(1, _BATCH_BYTES // int(part.nbytes.max()))
        batches = (np.arange(start, min(start + each, count)) for start in range(0, count, each))
        sums = [crc32c(stored) for batch in batches for stored in reader.read_packed(batch, check=False)]
    finally:
        reader.close()
    return np.array(sums, np.uint32)
