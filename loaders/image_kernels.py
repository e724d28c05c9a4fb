"""The kernels of `resize`.

A first batch waits until they are compiled, half a second: plain loops and comparisons compile in half the time of numpy's
functions, `min` and `max`.
"""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import float_kernel

from .image_vectors import PIXELS, weigh_pixels


@float_kernel
def _weigh(
    start: float,
    stop: float,
    extent: int,
    antialias: bool,
    first: NDArray[np.int64],
    weights: NDArray[np.float32],
) -> None:
    """For each result along one axis, the `first` source pixel of 0 … extent - 1, and the weights `[size, taps]` from it on.

    Weights beyond the filter, or the last pixel, are 0.
    """
    size, taps = weights.shape
    ratio = (stop - start) / size
    support = ratio if antialias and ratio > 1 else 1.0
    for i in range(size):
        centre = start + (i + 0.5) * ratio
        low, high = int(centre - support + 0.5), int(centre + support + 0.5)
        if low < 0:
            low = 0
        elif low >= extent:
            low = extent - 1
        if high > extent:
            high = extent
        total = 0.0
        for tap in range(taps):
            weight = 1 - abs((low + tap + 0.5 - centre) / support)
            if weight < 0 or low + tap >= high:
                weight = 0.0
            weights[i, tap] = weight
            total += weight
        if total == 0:
            weights[i, 0] = total = 1.0
        for tap in range(taps):
            weights[i, tap] /= total
        first[i] = low


@float_kernel
def _blend(
    upper: NDArray[np.uint8],
    lower: NDArray[np.uint8],
    of_upper: np.float32,
    of_lower: np.float32,
    row: NDArray[np.float32],
) -> None:
    for i in range(len(upper)):
        row[i] = of_upper * np.float32(upper[i]) + of_lower * np.float32(lower[i])


@float_kernel
def _blend_in(
    upper: NDArray[np.uint8],
    lower: NDArray[np.uint8],
    of_upper: np.float32,
    of_lower: np.float32,
    row: NDArray[np.float32],
) -> None:
    for i in range(len(upper)):
        row[i] += of_upper * np.float32(upper[i]) + of_lower * np.float32(lower[i])


@float_kernel
def resize(
    pixels: NDArray[np.uint8],
    window: NDArray[np.int64],
    region: NDArray[np.float64],
    antialias: bool,
    mirror: bool,
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    first: NDArray[np.int64],
    weight_y: NDArray[np.float32],
    weight_x: NDArray[np.float32],
    row: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    size, last_row, width = out.shape[1], window[2] - 1, 3 * window[3]
    top, left, right = window[0], 3 * window[1], 3 * window[1] + width
    first_y, first_x = first[0], first[1]
    _weigh(region[0], region[2], window[2], antialias, first_y, weight_y)
    _weigh(region[1], region[3], window[3], antialias, first_x, weight_x)
    taps_y, taps_x = weight_y.shape[1], weight_x.shape[1]
    for y in range(size):
        for tap in range(0, taps_y, 2):
            of_upper, of_lower = weight_y[y, tap], weight_y[y, tap + 1]
            if tap > 0 and of_upper == 0:
                break
            at = first_y[y] + tap
            upper = pixels[top + (at if at < last_row else last_row), left:right]
            lower = pixels[top + (at + 1 if at < last_row else last_row), left:right]
            if tap == 0:
                _blend(upper, lower, of_upper, of_lower, row)
            else:
                _blend_in(upper, lower, of_upper, of_lower, row)
        for x in range(0, size - size % PIXELS, PIXELS):
            weigh_pixels(row, first_x, weight_x, x, y, mirror, scale, offset, out)
        for x in range(size - size % PIXELS, size):
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
