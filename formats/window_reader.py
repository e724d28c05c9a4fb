"""Reading crop windows of images: of a seekable JPEG only the MCU rows that a window needs, cut to a small JPEG of it."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .jpeg import cut
from .jpeg.cut import CutJpegs, cut_windows
from .jpeg.rows import RowTables
from .record_reader import RecordReader

Memory: TypeAlias = Callable[[int], NDArray[np.uint8]]
"""From a number of bytes to an array of as many, or more, of undefined content."""


def fresh_memory(nbytes: int) -> NDArray[np.uint8]:
    """Memory that nobody used before, whose pages cost more than copying to it."""
    return np.empty(nbytes, np.uint8)


class WindowReader:
    """The crop windows of a field of images. Safe to use from many threads."""

    def __init__(self, reader: RecordReader, tables: RowTables) -> None:
        self._reader = reader
        self._tables = tables

    def is_awaited(self) -> bool:
        """Whether `read` would have to wait until its kernels are compiled, which is being done then."""
        awaited = [self._tables.is_awaited(self._reader.index), cut.is_awaited()]
        return any(awaited)

    def read(self, records: NDArray[np.int64], windows: NDArray[np.int64], memory: Memory = fresh_memory) -> CutJpegs:
        """Read a window of each of these images and cut the seekable JPEGs among them; the others come whole.

        records   [n], their numbers.
        windows   [n, 4], (top, left, height, width) in pixels of the image as stored.
        memory    where the files go, and before that, for the time of the call, what they are cut out of.

        Returns n files; the window of file i starts at `windows[i, :2] - origin[i]` in it, and its pixels are those that it
        has in the whole image. Every byte read is checked. Raises ChecksumError or SourceError, naming shard and record.
        """
        if windows.shape != (len(records), 4):
            raise UsageError(f"{len(records)} records need windows of shape ({len(records)}, 4), not {windows.shape}")
        reads = self._tables.plan(records, windows, self._reader.index)
        stops = np.cumsum(reads.nbytes).reshape(-1, 2)
        nbytes = int(stops[-1, 1]) if len(stops) else 0
        pieces, files = memory(nbytes), memory(nbytes)
        self._reader.read_ranges(
            np.repeat(records, 2),
            reads.start.reshape(-1),
            reads.nbytes.reshape(-1),
            reads.before.reshape(-1),
            reads.after.reshape(-1),
            pieces,
        )
        header_start = stops[:, 0] - reads.nbytes[:, 0]
        return cut_windows(
            pieces,
            header_start,
            header_start + reads.header_bytes,
            np.ascontiguousarray(stops[:, 1]),
            reads.first_row,
            reads.num_rows,
            windows,
            files,
        )
