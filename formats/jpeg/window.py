"""Decoding the window of a JPEG that a crop needs, and little else, to the very pixels that libjpeg-turbo makes of it."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.huge_pages import WorkMemory
from stagein.formats.native_code import NativeKernel, frame_of

from .header import BLOCK_PIXELS
from .limits import (
    BAND_ROWS,
    BLOCK_COEFFICIENTS,
    BLOCK_WORDS,
    HEADER_WORDS,
    LOOKED_UP_BITS,
    MAX_CODE_BITS,
    MCU_BLOCKS,
    MCU_PIXELS,
    MOST_COMPONENTS,
    MOST_TABLES,
    PADDING_BYTES,
    TABLE_SYMBOLS,
    VECTOR_PIXELS,
)

_decode_window = NativeKernel(f"{__package__}.window_kernels", "decode_window")

_MOST_SEGMENTS = 4096
"""Restart segments of a JPEG that is decoded here."""


class WindowDecoder:
    """Decodes sequential JPEGs, grey or in colour. For one thread at a time: the next call overwrites the pixels.

    memory  what it works in; by default its own.
    """

    def __init__(self, memory: WorkMemory | None = None) -> None:
        self._is_ready = False
        self._memory = memory = memory or WorkMemory()
        self._zigzag = memory.zeros(np.uint8, BLOCK_COEFFICIENTS)
        self._zigzag[:] = _zigzag()
        self._header = memory.zeros(np.int64, HEADER_WORDS)
        self._quantization = memory.zeros(np.int16, MOST_TABLES * BLOCK_COEFFICIENTS)
        self._look = memory.zeros(np.int32, 2 * MOST_TABLES, 1 << LOOKED_UP_BITS)
        self._limit, self._delta = (memory.zeros(np.int32, 2 * MOST_TABLES, MAX_CODE_BITS + 1) for _ in range(2))
        self._symbols = memory.zeros(np.uint8, 2 * MOST_TABLES, TABLE_SYMBOLS)
        self._segments = memory.zeros(np.int64, _MOST_SEGMENTS)
        self.block = memory.zeros(np.int16, BLOCK_COEFFICIENTS)
        self._plan = memory.zeros(np.int64, MCU_BLOCKS, BLOCK_WORDS)
        self._dc = memory.zeros(np.int64, MOST_COMPONENTS)
        self._plain, self._planes, self._rows, self.pixels = (np.zeros(0, np.uint8) for _ in range(4))
        self._columns = np.zeros(0, np.uint16)

    def decode(self, record: NDArray[np.uint8], window: NDArray[np.int64]) -> NDArray[np.uint8] | None:
        """The pixels of a window (top, left, height, width) of the image as stored, uint8 [height, 3 * width], RGB side by side.

        None for what is no such JPEG, is damaged, or does not have the window: another decoder tells what it is. None for all
        until the machine code is compiled, once a machine, and where there can be none.
        """
        height, width = int(window[2]), int(window[3])
        if len(record) < 4 or height < 1 or width < 1:
            return None
        self.reserve(len(record), width, height * width)
        self.block[:] = 0
        arguments = (record, window, *self._arrays())
        self._is_ready = self._is_ready or _decode_window.is_ready(*arguments)
        if not self._is_ready or not _decode_window(*arguments):
            return None
        return self.pixels[: 3 * height * width].reshape(height, 3 * width)

    def reserve(self, nbytes: int, width: int, num_pixels: int) -> None:
        """Have memory for records of so many bytes, and windows of at most that width and number of pixels."""
        row_pixels = (width // MCU_PIXELS + 3) * MCU_PIXELS + 4 * VECTOR_PIXELS
        self._plain = self._at_least(self._plain, nbytes + PADDING_BYTES)
        self._planes = self._at_least(self._planes, 3 * BAND_ROWS * MCU_PIXELS * row_pixels)
        self._rows = self._at_least(self._rows, 2 * row_pixels)
        self._columns = self._at_least(self._columns, row_pixels)
        self.pixels = self._at_least(self.pixels, 3 * (num_pixels + VECTOR_PIXELS))

    def frame(self) -> NDArray[np.int64]:
        """What the machine code is called with, for records and windows that memory is reserved for: the first two words are the addresses
        of what says where these are. `block` must be 0; there is one result, whether `pixels` are there."""
        return frame_of(0, 0, *self._arrays())

    def _at_least(self, array: NDArray[Any], count: int) -> NDArray[Any]:
        """This one, or a new one, where it has fewer elements than `count`."""
        return array if len(array) >= count else self._memory.zeros(array.dtype, count)

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        tables = (self._quantization, self._look, self._limit, self._delta, self._symbols, self._plain, self._segments)
        work = (self.block, self._plan, self._dc, self._planes, self._columns, self._rows, self.pixels)
        return (self._zigzag, self._header, *tables, *work)


def decode_entry() -> int | None:
    """Where the machine code is, for a kernel that calls it with the `frame` of a decoder; None until it is compiled."""
    return _decode_window.entry(*_some_arguments())


@functools.cache
def _some_arguments() -> tuple[NDArray[Any], ...]:
    return np.zeros(1, np.uint8), np.zeros(4, np.int64), *WindowDecoder()._arrays()


def _zigzag() -> NDArray[np.uint8]:
    """The place of each coefficient of a block, row by row, in the order of the file (T.81 figure A.6)."""
    places = sorted(range(BLOCK_COEFFICIENTS), key=lambda place: _diagonal(*divmod(place, BLOCK_PIXELS)))
    return np.array(places, np.uint8)


def _diagonal(row: int, column: int) -> tuple[int, int]:
    number = row + column
    return number, row if number % 2 else column
