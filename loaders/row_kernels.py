"""The kernel of `row_maker`: images of a batch, from where they lie to rows of the batch, by as many threads as call it."""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import call_entry, fetch_add, kernel, signed
from stagein.formats.read_kernels import nanoseconds, read_and_sum

from .resize import taps
from .row_layout import (
    ALL_TAKEN,
    CLOCK,
    COUNT,
    DECODE_NS,
    DECODED,
    DECODED_BYTES,
    EXTENTS,
    IN_MEMORY,
    OUT,
    PIXELS,
    READ_BYTES,
    READ_NS,
    RECORD,
    REGION,
    ROW,
    TRANSFORM_NS,
    UNDECODED,
    UNREAD,
    WEIGHT_X,
    WEIGHT_Y,
    WINDOW,
)

_COLOURS = 3
_WORD_BYTES = 8
_FLOAT_BYTES = 4
_taps = kernel(taps)


@kernel
def make_rows(
    counter: NDArray[np.int64],
    order: NDArray[np.int64],
    descriptors: NDArray[np.int32],
    places: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    sums: NDArray[np.uint32],
    piece_bytes: int,
    windows: NDArray[np.int64],
    regions: NDArray[np.float64],
    mirrored: NDArray[np.uint8],
    rows_address: int,
    decoded_row: int,
    size: int,
    antialias: bool,
    decode_entry: int,
    decode_frame: NDArray[np.int64],
    resize_entry: int,
    resize_frame: NDArray[np.int64],
    arrays: NDArray[np.int64],
    content: NDArray[np.uint8],
    block: NDArray[np.int16],
    decoded_window: NDArray[np.int64],
    blended: NDArray[np.float32],
    spent: NDArray[np.int64],
) -> tuple[int, int]:
    """Make rows that no thread has taken yet, the first of which is `decoded_row`, where that is no -1: it is decoded already.

    counter       [1], how many of `order` are taken.
    descriptors   [n], of the file where record i lies from byte `places[i]` on, or IN_MEMORY: `places[i]` is its address.
    sums          [n], the crc32c of what is read.
    windows, regions, mirrored  of `graphs.ImageViews`.
    rows_address  of the batch, float32 [n, 3, size, size]; 0: there is no memory for it yet.
    decode_entry, resize_entry, decode_frame, resize_frame   of the kernels `decode_window` and `resize`.
    arrays        what the frames say of arrays that differ from row to row: see `row_layout`.
    content, block, decoded_window, blended   memory to work in.
    spent         is added what was done: see `row_layout`.

    Returns a row and what is the matter with it: see `row_layout`. The file of one that is UNDECODED is in `content`, or in memory where it
    was.
    """
    row, clock = decoded_row, spent[CLOCK:]
    while True:
        if row < 0:
            taken = fetch_add(counter, 1)
            if taken >= len(order):
                return -1, ALL_TAKEN
            row = order[taken]
            began, address = nanoseconds(clock), places[row]
            if descriptors[row] != IN_MEMORY:
                address = content.ctypes.data
                trouble, found = read_and_sum(
                    signed(descriptors[row]), address, nbytes[row], places[row], np.uint32(0), piece_bytes
                )
                if trouble != 0 or found != sums[row]:
                    return row, UNREAD
                spent[READ_BYTES] += nbytes[row]
            read = nanoseconds(clock)
            spent[READ_NS] += read - began
            arrays[RECORD, 0], arrays[RECORD, EXTENTS] = address, nbytes[row]
            arrays[WINDOW, 0] = windows.ctypes.data + 4 * _WORD_BYTES * row
            decode_frame[0], decode_frame[1] = _fields(arrays, RECORD), _fields(arrays, WINDOW)
            for place in range(len(block)):
                block[place] = 0
            is_called = call_entry(decode_entry, decode_frame.ctypes.data) == 1
            if not is_called or decode_frame[0] == 0:
                return row, UNDECODED
            spent[DECODE_NS] += nanoseconds(clock) - read
            spent[DECODED_BYTES] += _COLOURS * windows[row, 2] * windows[row, 3]
            if rows_address == 0:
                return row, DECODED
        began, height, width = nanoseconds(clock), windows[row, 2], windows[row, 3]
        taps_y = _taps(regions[row, 2] - regions[row, 0], size, antialias)
        taps_x = _taps(regions[row, 3] - regions[row, 1], size, antialias)
        decoded_window[2], decoded_window[3] = height, width
        for place in range(_COLOURS * width, _COLOURS * (width + taps_x)):
            blended[place] = 0  # read with weight 0
        arrays[PIXELS, EXTENTS], arrays[PIXELS, EXTENTS + 1] = height, _COLOURS * width
        arrays[REGION, 0] = regions.ctypes.data + 4 * _WORD_BYTES * row
        arrays[WEIGHT_Y, EXTENTS + 1], arrays[WEIGHT_X, EXTENTS + 1] = taps_y, taps_x
        arrays[ROW, EXTENTS] = _COLOURS * (width + taps_x)
        arrays[OUT, 0] = rows_address + _FLOAT_BYTES * _COLOURS * size * size * row
        resize_frame[0], resize_frame[4] = _fields(arrays, PIXELS), signed(mirrored[row])
        if call_entry(resize_entry, resize_frame.ctypes.data) < 0:
            return row, UNDECODED
        spent[TRANSFORM_NS] += nanoseconds(clock) - began
        spent[COUNT] += 1
        row = -1


@kernel
def _fields(arrays: NDArray[np.int64], number: int) -> int:
    return arrays.ctypes.data + _WORD_BYTES * arrays.shape[1] * number  # type: ignore[no-any-return]
