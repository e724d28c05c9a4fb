"""From pixels to a row of a batch in one pass: crop, resize, mirror, normalise, height x width x channel to planes."""

import numba
import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import kernel, signed

_FRAME_BYTES = 9
"""Of a frame segment, from its marker to its width."""


@numba.njit(nogil=True, cache=True, fastmath={"contract"})  # multiply and add in one
def resize_into(
    pixels: NDArray[np.uint8],
    window: NDArray[np.int64],
    region: NDArray[np.float64],
    antialias: bool,
    mirror: bool,
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Resize a region of an image linearly to `out` [3, size, size], each channel times `scale` plus `offset`.

    pixels   [height, 3 * width], RGB side by side.
    window   (top, left, height, width): pixels outside it do not count. It must lie in the image.
    region   (top, left, bottom, right) inside the window, in its pixels.
    antialias  the filter is as wide as a pixel of the result, where that is larger: the rule, and the rounding of its
             bounds, are those of Pillow's BILINEAR. Otherwise it is two pixels wide.
    """
    size, width = out.shape[1], 3 * window[3]
    top, left = window[0], 3 * window[1]
    first_y, weight_y = _weights(region[0], region[2], window[2], size, antialias)
    first_x, weight_x = _weights(region[1], region[3], window[3], size, antialias)
    taps_y, taps_x, last_row = weight_y.shape[1], weight_x.shape[1], window[2] - 1
    row = np.empty(width + 3 * taps_x, np.float32)
    row[width:] = np.float32(0)  # read with weight 0
    for y in range(size):
        for tap in range(0, taps_y, 2):
            at = first_y[y] + tap
            if tap > 0 and weight_y[y, tap] == 0:
                break
            upper = pixels[top + min(at, last_row), left : left + width]
            lower = pixels[top + min(at + 1, last_row), left : left + width]
            of_upper, of_lower = weight_y[y, tap], weight_y[y, tap + 1]
            if tap == 0:
                for i in range(width):
                    row[i] = of_upper * np.float32(upper[i]) + of_lower * np.float32(lower[i])
            else:
                for i in range(width):
                    row[i] += of_upper * np.float32(upper[i]) + of_lower * np.float32(lower[i])
        for x in range(size):
            red = green = blue = np.float32(0)
            at = 3 * first_x[x]
            for tap in range(taps_x):
                weight = weight_x[x, tap]
                red += weight * row[at]
                green += weight * row[at + 1]
                blue += weight * row[at + 2]
                at += 3
            to = size - 1 - x if mirror else x
            out[0, y, to] = red * scale[0] + offset[0]
            out[1, y, to] = green * scale[1] + offset[1]
            out[2, y, to] = blue * scale[2] + offset[2]


@numba.njit(nogil=True, cache=True)
def _weights(
    start: float, stop: float, extent: int, size: int, antialias: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each of `size` results along one axis, the first source pixel of 0 … extent - 1, and the weights from it on.

    The number of weights is even; those beyond the filter, or the last pixel, are 0.
    """
    ratio = (stop - start) / size
    support = ratio if antialias and ratio > 1 else 1.0
    taps = 2 * (int(np.ceil(2 * support)) // 2 + 1)
    first, weights = np.empty(size, np.int64), np.zeros((size, taps), np.float32)
    for i in range(size):
        centre = start + (i + 0.5) * ratio
        low = min(max(int(np.floor(centre - support + 0.5)), 0), extent - 1)
        high = min(max(int(np.floor(centre + support + 0.5)), low + 1), extent, low + taps)
        total = 0.0
        for pixel in range(low, high):
            weight = max(1 - abs((pixel + 0.5 - centre) / support), 0.0)
            weights[i, pixel - low] = weight
            total += weight
        if total > 0:
            for tap in range(taps):
                weights[i, tap] /= total
        else:
            weights[i, 0] = 1
        first[i] = low
    return first, weights


@kernel
def find_frame(record: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """(position of its height, height, width, MCU height) of the frame of a sequential Huffman-coded JPEG, grey or in colour.

    (-1, 0, 0, 0) for anything else. Segments are walked as ITU-T T.81 annex B lays them out.
    """
    position, end = 2, len(record)
    while position + _FRAME_BYTES < end and record[position] == 0xFF:
        marker = signed(record[position + 1])
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        nbytes = 256 * signed(record[position + 2]) + signed(record[position + 3])
        if marker == 0xC0 or marker == 0xC1:
            components = signed(record[position + 9])
            if position + 10 + 3 * components > end or (components != 1 and components != 3):
                break
            vertical = 1
            for number in range(components):
                vertical = max(vertical, signed(record[position + 11 + 3 * number]) & 15)
            height = 256 * signed(record[position + 5]) + signed(record[position + 6])
            width = 256 * signed(record[position + 7]) + signed(record[position + 8])
            return position + 5, height, width, 8 * vertical
        if marker == 0xDA or (0xC2 <= marker <= 0xCF and marker != 0xC4):
            break
        position += 2 + nbytes
    return -1, 0, 0, 0
