"""Decoding the window of a JPEG that a crop needs, and little else, to the very pixels that libjpeg-turbo makes of it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native_code import NativeKernel

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
    """Decodes sequential JPEGs, grey or in colour. For one thread at a time: the next call overwrites the pixels."""

    def __init__(self) -> None:
        self._is_ready = False
        self._zigzag = _zigzag()
        self._header = np.zeros(HEADER_WORDS, np.int64)
        self._quantization = np.zeros(MOST_TABLES * BLOCK_COEFFICIENTS, np.int16)
        self._look = np.zeros((2 * MOST_TABLES, 1 << LOOKED_UP_BITS), np.int32)
        self._limit, self._delta = (np.zeros((2 * MOST_TABLES, MAX_CODE_BITS + 1), np.int32) for _ in range(2))
        self._symbols = np.zeros((2 * MOST_TABLES, TABLE_SYMBOLS), np.uint8)
        self._segments = np.zeros(_MOST_SEGMENTS, np.int64)
        self._block = np.zeros(BLOCK_COEFFICIENTS, np.int16)
        self._plan, self._dc = np.zeros((MCU_BLOCKS, BLOCK_WORDS), np.int64), np.zeros(MOST_COMPONENTS, np.int64)
        self._plain, self._planes, self._rows, self._pixels = (np.zeros(0, np.uint8) for _ in range(4))
        self._columns = np.zeros(0, np.uint16)

    def decode(self, record: NDArray[np.uint8], window: NDArray[np.int64]) -> NDArray[np.uint8] | None:
        """The pixels of a window (top, left, height, width) of the image as stored, uint8 [height, 3 * width], RGB side by side.

        None for what is no such JPEG, is damaged, or does not have the window: another decoder tells what it is. None for all
        until the machine code is compiled, once a machine, and where there can be none.
        """
        height, width = int(window[2]), int(window[3])
        if len(record) < 4 or height < 1 or width < 1:
            return None
        row_pixels = (width // MCU_PIXELS + 3) * MCU_PIXELS + 4 * VECTOR_PIXELS
        self._plain = _at_least(self._plain, len(record) + PADDING_BYTES)
        self._planes = _at_least(self._planes, 3 * BAND_ROWS * MCU_PIXELS * row_pixels)
        self._rows = _at_least(self._rows, 2 * row_pixels)
        self._columns = _at_least(self._columns, row_pixels)
        self._pixels = _at_least(self._pixels, 3 * (height * width + VECTOR_PIXELS))
        self._block[:] = 0
        arrays = (self._quantization, self._look, self._limit, self._delta, self._symbols, self._plain, self._segments)
        memory = (self._block, self._plan, self._dc, self._planes, self._columns, self._rows, self._pixels)
        arguments = (record, window, self._zigzag, self._header, *arrays, *memory)
        self._is_ready = self._is_ready or _decode_window.is_ready(*arguments)
        if not self._is_ready or not _decode_window(*arguments):
            return None
        return self._pixels[: 3 * height * width].reshape(height, 3 * width)


def _at_least(memory: NDArray[Any], count: int) -> NDArray[Any]:
    """This memory, or more, where it has fewer elements than `count`."""
    return memory if len(memory) >= count else np.zeros(count, memory.dtype)


def _zigzag() -> NDArray[np.uint8]:
    """The place of each coefficient of a block, row by row, in the order of the file (T.81 figure A.6)."""
    places = sorted(range(BLOCK_COEFFICIENTS), key=lambda place: _diagonal(*divmod(place, BLOCK_PIXELS)))
    return np.array(places, np.uint8)


def _diagonal(row: int, column: int) -> tuple[int, int]:
    number = row + column
    return number, row if number % 2 else column
