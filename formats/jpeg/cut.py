"""Crop before decode: from a seekable JPEG (`jpeg.restart`), by bytes, the smaller JPEG that holds a crop window.

What lies between two restart markers can be decoded by itself, so the segments that a window touches, with their
markers numbered anew and the frame's height and width changed, are a JPEG again. A few pixels of margin make the
window come out as it does in the whole image, on any decoder: chroma that is stored smaller is interpolated from its
neighbours when it is decoded.

A window is (top, left, height, width), in pixels of the image as stored.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import ChecksumError
from stagein.formats.native_code import NativeKernel

_cut_batch = NativeKernel(f"{__package__}.cut_kernels", "cut_batch")


@dataclass(frozen=True)
class CutJpegs:
    """Cut JPEGs in one buffer: file i is `content[start[i]:stop[i]]`.

    origin  [files, 2]: where the top left pixel of the file lies in the whole image, so that the window asked for starts
            at `(top, left) - origin` in it.
    """

    content: NDArray[np.uint8]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    origin: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        """File `number`, a view."""
        return self.content[self.start[number] : self.stop[number]]


def is_awaited() -> bool:
    """Whether `cut_windows` would have to wait until its kernel is compiled, which is being done then."""
    places, number = np.empty(0, np.int64), np.empty(0, np.uint8)
    windows = np.empty((0, 4), np.int64)
    return _cut_batch.is_awaited(number, *5 * (places,), windows, number, places, places, windows)


def cut_windows(
    source: NDArray[np.uint8],
    header_start: NDArray[np.int64],
    rows_start: NDArray[np.int64],
    rows_stop: NDArray[np.int64],
    first_row: NDArray[np.int64],
    num_rows: NDArray[np.int64],
    windows: NDArray[np.int64],
    buffer: NDArray[np.uint8] | None = None,
) -> CutJpegs:
    """Cut a batch of windows out of the pieces of seekable JPEGs, in one call that leaves other threads running.

    source                all pieces: for file i its header at `header_start[i]`, directly followed by its MCU rows.
    rows_start, rows_stop where these rows lie in it; rows_start is the end of the header.
    first_row, num_rows   which rows they are, those of `cut_kernels.needed_rows` at least; 0 rows: the file is no seekable one,
                          whole, and comes as it is, with origin (0, 0).
    windows               [n, 4].
    buffer                where to put the files, as large as `source` at least; by default fresh memory.

    Raises ChecksumError when pieces are not what `make_seekable` makes.
    """
    count = len(windows)
    if buffer is None:
        buffer = np.empty(len(source), np.uint8)
    if len(buffer) < int((rows_stop - header_start).sum()):
        raise ValueError(f"the buffer has {len(buffer)} bytes, less than the files may need")
    start, stop, origin = np.empty(count, np.int64), np.empty(count, np.int64), np.empty((count, 2), np.int64)
    places = map(np.ascontiguousarray, (header_start, rows_start, rows_stop, first_row, num_rows))
    failed = _cut_batch(source, *places, np.ascontiguousarray(windows, np.int64), buffer, start, stop, origin)
    if failed >= 0:
        raise ChecksumError(
            f"image {failed} of a batch is no seekable JPEG though its index says so: verify the data set"
        )
    return CutJpegs(buffer, start, stop, origin)
