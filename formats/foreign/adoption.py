"""Adoption: a data set over HDF5 files or a Zarr array of others, whose records are read where they lie; nothing is rewritten.

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
from stagein.formats.errors import ChecksumError, SourceError, UsageError, source_error
from stagein.formats.index import RecordIndex
from stagein.formats.manifest import DEFAULT_CHUNK_BYTES, Manifest, Origin, ShardEntry
from stagein.formats.record_reader import RecordReader
from stagein.formats.schema import MAX_RECORD_BYTES, Schema
from stagein.formats.shards import ShardLayout

from .layout import ForeignFile, ForeignRecords

_BATCH_BYTES = 16 << 20
_HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5", ".nc")


def scan_foreign(source: Path, fields: Mapping[str, str] | None = None, primary: str | None = None) -> ForeignRecords:
    """What can be adopted of `source`: an HDF5 file, a folder of HDF5 files of one layout, or the folder of a Zarr v3 array.

    Raises UsageError, one sentence, for what cannot be adopted; SourceError for what cannot be read.
    """
    if (source / "zarr.json").exists():
        from .zarr import scan_foreign_zarr

        if fields:
            raise UsageError(f"{source} is a Zarr array, one field: name it by --primary")
        return scan_foreign_zarr(source, primary or "data")
    from .hdf5 import scan_foreign_hdf5

    paths = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix in _HDF5_SUFFIXES)
    if not paths:
        raise SourceError(f"{source} is no HDF5 file, no folder of them (*.h5, *.hdf5, …) and no Zarr v3 array")
    return scan_foreign_hdf5(paths, fields, primary)


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
    schema = Schema(fields={records.name: records.large, **records.columns}, primary=records.name).resolved({})
    capacity = {records.name: max(len(file.offset) for file in records.files)}
    layout = ShardLayout(schema, "foreign", capacity, DEFAULT_CHUNK_BYTES)
    growing = GrowingDataset(target, overwrite=overwrite)
    try:
        shards, done, total = [], 0, sum(_size(file.path) for file in records.files)
        for number, file in enumerate(records.files):
            shard = _adopt_file(growing.folder, number, file, records, layout.chunk_bytes)
            shards.append(shard)
            done += shard.large_fields[records.name].entry.nbytes
            on_progress(done, total)
        sums = hashlib.sha256(b"".join(shard.large_fields[records.name].crc32c.tobytes() for shard in shards))
        manifest = growing.publish(
            layout, shards, Origin(kind=f"adopted {records.kind}", records_sha256=sums.hexdigest())
        )
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


def _adopt_file(
    folder: Path, number: int, file: ForeignFile, records: ForeignRecords, chunk_bytes: int
) -> FinishedShard:
    name = f"shards/{number:05d}{file.path.suffix if records.kind == 'hdf5' else '.zarr-chunk'}"
    linked = folder / name
    try:
        linked.unlink(missing_ok=True)
        os.link(file.path.resolve(), linked)
    except OSError as error:
        raise UsageError(
            f"{file.path} cannot be linked into {folder} ({error.strerror}): choose a target on the same file system, "
            f"and files of your own, or use `stagein convert`"
        ) from None
    if int(file.nbytes.max()) > MAX_RECORD_BYTES:
        raise UsageError(f"{file.path} has records above the limit of {MAX_RECORD_BYTES} bytes")
    try:
        sums, nbytes = file_sums(linked, chunk_bytes), linked.stat().st_size
    except OSError as error:
        raise source_error(error, "reading", file.path) from None
    count = len(file.offset)
    entry = ShardEntry(
        file=name,
        nbytes=nbytes,
        xxh3_128=sums,
        field=records.name,
        records=count,
        first=0,
        data_offset=int(file.offset.min()),
    )
    payload_bytes = int(file.nbytes.sum(dtype=np.uint64))
    large = FinishedField(entry, payload_bytes, file.offset, file.nbytes, _record_sums(linked, file, records))
    return FinishedShard(count, {records.name: large}, {}, dict(file.columns), (), {})


def _record_sums(path: Path, file: ForeignFile, records: ForeignRecords) -> NDArray[np.uint32]:
    """The crc32c of every record as it lies in the file, whose first record is decoded to see that it can be."""
    count = len(file.offset)
    no_sums = np.zeros(count, np.uint32)
    reader = RecordReader(records.large, RecordIndex(no_sums, file.offset, file.nbytes, no_sums), [path])
    try:
        (first,) = reader.read_packed([0], check=False)
        try:
            reader.decode(first)
        except ChecksumError as error:
            raise ChecksumError(f"the first record of {file.path} cannot be decoded: {error}") from None
        each = max(1, _BATCH_BYTES // int(file.nbytes.max()))
        batches = (np.arange(start, min(start + each, count)) for start in range(0, count, each))
        sums = [crc32c(stored) for batch in batches for stored in reader.read_packed(batch, check=False)]
    finally:
        reader.close()
    return np.array(sums, np.uint32)
