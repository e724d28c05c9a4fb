"""The record index of a field: for every record, which file it is in, where, how long it is, and the crc32c of its bytes.

20 bytes a record in four plain arrays. They are Zarr arrays of one uncompressed chunk each, so any Zarr library reads
them; we map their files, and all processes of a node share one copy in memory. A fifth, `row`, is there for those who read
the Zarr arrays of the fields: it says at which row of it a record starts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checksums import chunk_sums
from .errors import ChecksumError, SourceError
from .manifest import Manifest
from .schema import Field, column_chunk_path
from .zarr_view import column_from_chunk

_DTYPES = {"shard": "uint32", "offset": "uint64", "nbytes": "uint32", "crc32c": "uint32"}
ROW_FIELD = Field(kind="tensor", dtype="uint64")


def index_fields(name: str) -> dict[str, Field]:
    """The arrays of the index of a field, as columns named by their place below the data set."""
    return {f"index/{name}/{part}": Field(kind="tensor", dtype=dtype) for part, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class RecordIndex:
    """Four arrays with one element a record; `offset` counts from the start of the shard's file."""

    shard: NDArray[np.uint32]
    offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint32]
    crc32c: NDArray[np.uint32]

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, name: str) -> "RecordIndex":
        """Map the index of the field `name` of the data set in `folder`.

        Raises SourceError for a missing file, one of a wrong size, and an index that leads out of the field's files, and
        ChecksumError for a damaged one.
        """
        prefix = f"index/{name}/"
        arrays: dict[str, Any] = {
            path.removeprefix(prefix): load_column(folder, path, field, manifest)
            for path, field in index_fields(name).items()
        }
        index = cls(**arrays)
        index._refuse_out_of_bounds(folder, manifest, name)
        return index

    def _refuse_out_of_bounds(self, folder: Path, manifest: Manifest, name: str) -> None:
        """A damaged index must not send a reader past the end of a shard, or into another one."""
        parts, field = manifest.parts_of(name), manifest.record_schema.fields[name]
        if manifest.num_records and not parts:
            raise SourceError(f"{folder} has records but no file with {name!r}: run `stagein verify {folder}`")
        for number, shard in enumerate(parts):
            mine = slice(shard.first, shard.first + shard.records)
            offset, nbytes = self.offset[mine], self.nbytes[mine].astype(np.uint64)
            fits = (self.shard[mine] == number) & (offset <= shard.nbytes) & (nbytes <= shard.nbytes - offset)
            if field.codec is None:
                fits &= nbytes % field.row_bytes == 0 if field.is_variable else nbytes == field.record_bytes
            if not fits.all():
                record = shard.first + int(np.argmin(fits))
                raise SourceError(
                    f"the index of {name!r} in {folder} does not fit {shard.file}, at record {record}: "
                    f"run `stagein verify {folder}`"
                )


def load_column(folder: Path, name: str, field: Field, manifest: Manifest) -> NDArray[np.generic]:
    """Map one column of the data set in `folder`, and check the sums of its file: [num_records, *shape], or all the rows of
    a ragged one, [rows, *row_shape].

    All of it is read for that, once, at the speed of memory where it is there already: a flipped bit in an index or a label
    would otherwise be believed. Raises SourceError for a missing file or one of a wrong size, ChecksumError for damage.
    """
    if manifest.num_records == 0:
        return column_from_chunk(b"", field, 0)
    file = column_chunk_path(name, field)
    path, entry = folder / file, next((entry for entry in manifest.files if entry.file == file), None)
    num_rows = entry.nbytes // field.row_bytes if entry and field.is_variable else manifest.num_records
    if entry is None or entry.nbytes != num_rows * field.row_bytes:
        raise SourceError(f"{folder}: its manifest lists no {file} with a row a record: convert the data set again")
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read ({error.strerror}): copy the data set again, or run `stagein verify {folder}`"
        ) from None
    if len(content) != entry.nbytes:
        raise SourceError(f"{path} has {len(content)} bytes instead of {entry.nbytes}: run `stagein verify {folder}`")
    if b"".join(chunk_sums([content], manifest.chunk_bytes)).hex() != entry.xxh3_128:
        raise ChecksumError(
            f"{path} is damaged: its xxh3_128 is not what the manifest says; restore it from a good copy"
        )
    return column_from_chunk(content, field, num_rows)
