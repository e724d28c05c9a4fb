"""The record index: for every record, which shard it is in, where, how long it is, and the crc32c of its bytes.

20 bytes a record in four plain arrays. They are Zarr arrays of one uncompressed chunk each, so any Zarr library reads
them; we map their files, and all processes of a node share one copy in memory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SourceError
from .manifest import Manifest
from .schema import Field
from .zarr_view import column_chunk_path, column_from_chunk

_DTYPES = {"shard": "uint32", "offset": "uint64", "nbytes": "uint32", "crc32c": "uint32"}


def index_fields(primary: str) -> dict[str, Field]:
    """The arrays of the index of a field, as columns named by their place below the data set."""
    return {f"index/{primary}/{name}": Field(kind="tensor", dtype=dtype) for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class RecordIndex:
    """Four arrays with one element a record; `offset` counts from the start of the shard's file."""

    shard: NDArray[np.uint32]
    offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint32]
    crc32c: NDArray[np.uint32]

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> "RecordIndex":
        """Map the index of the data set in `folder`. Raises SourceError for a missing file or one of a wrong size."""
        prefix = f"index/{manifest.record_schema.primary}/"
        arrays: dict[str, Any] = {
            name.removeprefix(prefix): load_column(folder, name, field, manifest.num_records)
            for name, field in index_fields(manifest.record_schema.primary).items()
        }
        index = cls(**arrays)
        index._refuse_out_of_bounds(folder, manifest)
        return index

    def _refuse_out_of_bounds(self, folder: Path, manifest: Manifest) -> None:
        """A damaged index must not send a reader past the end of a shard, or into another one."""
        for number, shard in enumerate(manifest.shards):
            mine = slice(shard.first, shard.first + shard.records)
            ends = self.offset[mine] + self.nbytes[mine]
            if (self.shard[mine] != number).any() or (ends > shard.nbytes).any():
                raise SourceError(
                    f"the record index of {folder} does not fit {shard.file}: run `stagein verify {folder}`"
                )


def load_column(folder: Path, name: str, field: Field, num_records: int) -> NDArray[np.generic]:
    """Map one column, [num_records, *shape]. Raises SourceError for a missing file or one of a wrong size."""
    path = folder / column_chunk_path(name, field)
    if num_records == 0:
        return column_from_chunk(b"", field, 0)
    expected = num_records * field.record_bytes
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read ({error.strerror}): copy the data set again, or run `stagein verify {folder}`"
        ) from None
    if len(content) != expected:
        raise SourceError(f"{path} has {len(content)} bytes instead of {expected}: run `stagein verify {folder}`")
    return column_from_chunk(content, field, num_records)
