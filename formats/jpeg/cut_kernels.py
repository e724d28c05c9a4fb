"""The kernels of `cut`, and `needed_rows`, which says what has to be read for it."""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import kernel, signed

from .bits import copy_bytes
from .header import BLOCK_PIXELS
from .limits import SEARCHED_BYTES
from .vectors import find_marker

_MARGIN_SAMPLES = 2
"""Chroma samples around a window that its pixels may depend on: decoders look at one on either side, we give two."""

_SEGMENTS_TO_KEEP = (0xC0, 0xC1, 0xC4, 0xDB, 0xDD, 0xE0, 0xEE)
"""Frame, tables, restart interval, and what says which colours they are (JFIF, Adobe)."""


@kernel
def needed_rows(top: int, height: int, mcu_height: int, mcu_rows: int) -> tuple[int, int]:
    """The MCU rows that a window needs of an image of `mcu_rows` rows of `mcu_height` pixels, as (first, stop).

    A window that lies outside its image gets the row next to it.
    """
    margin = _MARGIN_SAMPLES * mcu_height // BLOCK_PIXELS if mcu_height > BLOCK_PIXELS else 0
    first = min(max((top - margin) // mcu_height, 0), mcu_rows - 1)
    stop = max(min(-(-(top + height + margin) // mcu_height), mcu_rows), first + 1)
    return first, stop


@kernel
def cut_batch(
    source: NDArray[np.uint8],
    header_start: NDArray[np.int64],
    rows_start: NDArray[np.int64],
    rows_stop: NDArray[np.int64],
    first_row: NDArray[np.int64],
    num_rows: NDArray[np.int64],
    windows: NDArray[np.int64],
    target: NDArray[np.uint8],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    origin: NDArray[np.int64],
) -> int:
    """Fill `target`, `start`, `stop` and `origin`; returns the number of the first file that is not what it must be, or -1."""
    filled = signed(0)  # the constant 0 is a type of its own to numba: all that is called would be compiled for it too
    for number in range(len(windows)):
        start[number] = filled
        if not 0 <= header_start[number] <= rows_start[number] <= rows_stop[number] <= len(source):
            return number
        if num_rows[number] == 0:
            filled = copy_bytes(source, header_start[number], rows_stop[number], target, filled)
            origin[number] = 0
        else:
            filled = _cut(
                source,
                header_start[number],
                rows_start[number],
                rows_stop[number],
                first_row[number],
                num_rows[number],
                windows[number],
                target,
                filled,
                origin[number],
            )
            if filled < 0:
                return number
        stop[number] = filled
    return -1


@kernel
def _cut(
    source: NDArray[np.uint8],
    header_start: int,
    rows_start: int,
    rows_stop: int,
    first_row: int,
    num_rows: int,
    window: NDArray[np.int64],
    target: NDArray[np.uint8],
    filled: int,
    origin: NDArray[np.int64],
) -> int:
    """Append one cut file to `target`, fill `origin`; returns the bytes that `target` then has, or -1.

    No more bytes are written than header and rows have.
    """
    frame_place, filled, interval = _copy_header(source, header_start, rows_start, target, filled)
    if frame_place < 0 or interval == 0:
        return -1
    height = signed(target[frame_place + 5]) << 8 | signed(target[frame_place + 6])
    width = signed(target[frame_place + 7]) << 8 | signed(target[frame_place + 8])
    horizontal = vertical = 1
    if target[frame_place + 9] > 1:
        for component in range(signed(target[frame_place + 9])):
            factors = signed(target[frame_place + 11 + 3 * component])
            horizontal, vertical = max(horizontal, factors >> 4), max(vertical, factors & 15)
    mcu_width, mcu_height = BLOCK_PIXELS * horizontal, BLOCK_PIXELS * vertical
    mcu_columns, mcu_rows = -(-width // mcu_width), -(-height // mcu_height)
    if mcu_columns == 0 or mcu_rows == 0 or mcu_columns % interval or first_row < 0 or first_row + num_rows > mcu_rows:
        return -1
    needed_first, needed_stop = needed_rows(window[0], window[2], mcu_height, mcu_rows)
    if needed_first < first_row or needed_stop > first_row + num_rows:
        return -1

    segment_width = interval * mcu_width
    segments = mcu_columns // interval
    margin = _MARGIN_SAMPLES * horizontal if horizontal > 1 else 0
    first = min(max((window[1] - margin) // segment_width, 0), segments - 1)
    stop = max(min(-(-(window[1] + window[3] + margin) // segment_width), segments), first + 1)

    count, position = 0, rows_start
    for _ in range(num_rows):
        for segment in range(segments):
            segment_start = position
            position = _behind_marker(source, position, rows_stop)
            if position < 0:
                return -1
            if first <= segment < stop:
                filled = copy_bytes(source, segment_start, position, target, filled)
                target[filled - 1] = 0xD0 + (count & 7)
                count += 1
    if position != rows_stop:
        return -1
    target[filled - 1] = 0xD9

    origin[0], origin[1] = first_row * mcu_height, first * segment_width
    height = min(height, (first_row + num_rows) * mcu_height) - origin[0]
    width = min(width, stop * segment_width) - origin[1]
    target[frame_place + 5], target[frame_place + 6] = height >> 8, height & 0xFF
    target[frame_place + 7], target[frame_place + 8] = width >> 8, width & 0xFF
    return filled


@kernel
def _copy_header(
    source: NDArray[np.uint8], position: int, stop: int, target: NDArray[np.uint8], filled: int
) -> tuple[int, int, int]:
    """Append the segments of a header that decoding needs to `target`.

    Returns where the frame header then lies in it, the bytes that it then has, and the restart interval; -1 for the first
    when the header is not what `make_seekable` makes.
    """
    frame_place, interval = -1, 0
    if stop - position < 2:
        return -1, filled, 0
    target[filled], target[filled + 1] = 0xFF, 0xD8
    filled += 2
    position += 2
    while position + 4 <= stop:
        marker = signed(source[position + 1])
        nbytes = 2 + (signed(source[position + 2]) << 8 | signed(source[position + 3]))
        if source[position] != 0xFF or position + nbytes > stop:
            return -1, filled, 0
        if marker in _SEGMENTS_TO_KEEP or marker == 0xDA:
            if marker == 0xC0 or marker == 0xC1:
                if nbytes < 10 or nbytes != 10 + 3 * signed(source[position + 9]):
                    return -1, filled, 0
                frame_place = filled
            elif marker == 0xDD and nbytes == 6:
                interval = signed(source[position + 4]) << 8 | signed(source[position + 5])
            filled = copy_bytes(source, position, position + nbytes, target, filled)
        position += nbytes
        if marker == 0xDA:
            break
    return frame_place if position == stop else -1, filled, interval


@kernel
def _behind_marker(source: NDArray[np.uint8], position: int, stop: int) -> int:
    """Where the next restart or end marker from `position` on ends, -1 when there is none before `stop`."""
    while position + SEARCHED_BYTES < stop:
        count_before: int = find_marker(source, position)
        if count_before < SEARCHED_BYTES:
            return position + count_before + 2
        position += SEARCHED_BYTES
    while position + 1 < stop:
        if source[position] == 0xFF and 0xD0 <= source[position + 1] <= 0xD9:
            return position + 2
        position += 1
    return -1
