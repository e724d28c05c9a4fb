"""Reading crop windows of images: of a seekable JPEG only the MCU rows that a window needs, cut to a small JPEG of it."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .jpeg import cut
from .jpeg.cut import CutJpegs, cut_windows
from .jpeg.rows import RowTables
from .record_reader import RecordReader


@dataclass
class WindowBuffers:
    """Memory for the windows of a batch, kept for the next: fresh pages cost more than copying. For one thread at a time."""

    _pieces: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    _files: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    def views(self, nbytes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Room for so many bytes as they are read, and as they are cut. Earlier views of these buffers are void."""
        if len(self._pieces) < nbytes:
            self._pieces, self._files = np.empty((2, nbytes + nbytes // 4), np.uint8)
        return self._pieces[:nbytes], self._files[:nbytes]


class WindowReader:
    """The crop windows of a field of images. Safe to use from many threads."""

    def __init__(self, reader: RecordReader, tables: RowTables) -> None:
        self._reader = reader
        self._tables = tables

    def is_awaited(self) -> bool:
        """Whether `read` would have to wait until its kernels are compiled, which is being done then."""
        awaited = [self._tables.is_awaited(self._reader.index), cut.is_awaited()]
        return any(awaited)

    def read(
        self, records: NDArray[np.int64], windows: NDArray[np.int64], buffers: WindowBuffers | None = None
    ) -> CutJpegs:
        """Read a window of each of these images and cut the seekable JPEGs among them; the others come whole.

        records   [n], their numbers.
        windows   [n, 4], (top, left, height, width) in pixels of the image as stored.
        buffers   where to put them; by default fresh memory.

        Returns n files; the window of file i starts at `windows[i, :2] - origin[i]` in it, and its pixels are those that it
        has in the whole image. Every byte read is checked. Raises ChecksumError or SourceError, naming shard and record.
        """
        if windows.shape != (len(records), 4):
            raise UsageError(f"{len(records)} records need windows of shape ({len(records)}, 4), not {windows.shape}")
        reads = self._tables.plan(records, windows, self._reader.index)
        stops = np.cumsum(reads.nbytes).reshape(-1, 2)
        pieces, files = (buffers or WindowBuffers()).views(int(stops[-1, 1]) if len(stops) else 0)
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
