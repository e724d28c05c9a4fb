"""The table of MCU rows of a field of seekable JPEGs: which bytes of a record a crop window needs, and their sums.

It is a field of its own, a ragged column of uint32 [rows, 2] beside the image, so that HDF5 and Zarr show it, and staging
and verification treat it as any other. A seekable JPEG has (mcu_height, 0), then (end, crc32c) for its header and for each
of its MCU rows: where that piece ends in the record, and the crc32c of the record up to there, so that the crc32c of any run
of pieces is known from the two at its ends. An image that is kept as it came has no rows.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stagein.formats.checksums import crc32c_extend
from stagein.formats.errors import SourceError
from stagein.formats.index import RecordIndex, load_column
from stagein.formats.manifest import Manifest
from stagein.formats.native_code import NativeKernel
from stagein.formats.schema import Field

from .pieces import SeekableJpeg

_plan_reads = NativeKernel(f"{__package__}.rows_kernels", "plan_reads")
_ENTRY = Field(kind="tensor", dtype="uint32", shape=(2,))
NO_ROWS = np.empty((0, 2), np.uint32)
"""The rows of an image that is no seekable JPEG."""


def rows_name(name: str) -> str:
    """The field that lists the MCU rows of the field `name`."""
    return f"{name}_rows"


def rows_field(name: str) -> Field:
    """The schema of the table of the field `name`."""
    return Field(
        kind="ragged", dtype="uint32", shape=(None, 2), dims=("piece", "end_crc32c"), storage="column", rows_of=name
    )


def list_rows(image: SeekableJpeg) -> NDArray[np.uint32]:
    """The table of one image."""
    table = np.empty((1 + len(image.piece_ends), 2), np.uint32)
    table[0] = image.mcu_height, 0
    table[1:, 0] = image.piece_ends
    start = before = 0
    for piece, end in enumerate(image.piece_ends.tolist(), start=1):
        before = table[piece, 1] = crc32c_extend(int(before), image.content[start:end])
        start = end
    return table


class WindowReads(NamedTuple):
    """What to read of n records for a window each: two ranges of a record, of its header and of its MCU rows, [n, 2].

    start, nbytes   where a range starts in its record, and its bytes; 0 bytes for the header where it is read with the rows
                    behind it, and where the record is no seekable JPEG and is read whole.
    before, after   the crc32c of the record up to where the range starts and up to where it ends.
    header_bytes    [n], bytes of the header, 0 for a record that is read whole.
    first_row, num_rows   [n], the MCU rows; no rows for a record that is read whole.
    """

    start: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    before: NDArray[np.uint32]
    after: NDArray[np.uint32]
    header_bytes: NDArray[np.int64]
    first_row: NDArray[np.int64]
    num_rows: NDArray[np.int64]

    @classmethod
    def empty(cls, count: int) -> "WindowReads":
        """Room for the reads of `count` records."""
        ranges, sums = np.empty((2, count, 2), np.int64), np.empty((2, count, 2), np.uint32)
        return cls(*ranges, *sums, *np.empty((3, count), np.int64))


class RowTables:
    """The tables of all records of a field, mapped: all processes of a node share one copy in memory."""

    def __init__(self, folder: Path, manifest: Manifest, name: str) -> None:
        """Map the tables of the field `name` of the data set in `folder`; without tables, no image has rows.

        Raises SourceError for tables that cannot be read.
        """
        table = rows_name(name)
        self._place = f"the table {table} of {folder}"
        if table in manifest.record_schema.fields:
            index = RecordIndex.load(folder, manifest, table)
            self._offset, self._nbytes = index.offset, index.nbytes
            self._entries = load_column(folder, table, manifest.record_schema.fields[table], manifest).view(np.uint32)
        else:
            self._offset = np.broadcast_to(np.uint64(0), manifest.num_records)
            self._nbytes = np.broadcast_to(np.uint32(0), manifest.num_records)
            self._entries = NO_ROWS

    def is_awaited(self, index: RecordIndex) -> bool:
        """Whether `plan` would have to wait until its kernel is compiled, which is being done then."""
        windows = np.empty((0, 4), np.int64)
        return _plan_reads.is_awaited(*self._arguments(windows[:, 0], windows, index), *WindowReads.empty(0))

    def plan(self, records: NDArray[np.int64], windows: NDArray[np.int64], index: RecordIndex) -> WindowReads:
        """What to read of these records for these windows [n, 4] (top, left, height, width); `index` is that of the images.

        Raises SourceError when a table leads out of its record.
        """
        reads = WindowReads.empty(len(records))
        failed = _plan_reads(*self._arguments(records, windows, index), *reads)
        if failed >= 0:
            raise SourceError(
                f"{self._place} does not fit record {int(records[failed])}: run `stagein verify` on the data set"
            )
        return reads

    def _arguments(
        self, records: NDArray[np.int64], windows: NDArray[np.int64], index: RecordIndex
    ) -> tuple[NDArray[Any], ...]:
        """Of the kernel, but for the reads that it fills."""
        return (
            self._entries,
            self._offset[records].astype(np.int64) // _ENTRY.record_bytes,
            self._nbytes[records].astype(np.int64) // _ENTRY.record_bytes,
            index.nbytes[records].astype(np.int64),
            index.crc32c[records],
            np.ascontiguousarray(windows, np.int64),
        )
