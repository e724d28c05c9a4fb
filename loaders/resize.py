"""From pixels to a row of a batch in one pass: crop, resize, mirror, normalise, height x width x channel to planes."""

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native_code import NativeKernel

_resize = NativeKernel(f"{__package__}.image_kernels", "resize")


def prepare() -> None:
    """Have the kernel compiled, once a machine, while the caller goes on."""
    _resize.prepare(*_some_arguments())


def entry() -> int | None:
    """Where the machine code is, for a kernel that calls it with a frame of the arguments of `image_kernels.resize`; None until it is
    compiled."""
    return _resize.entry(*_some_arguments())


@functools.cache
def _some_arguments() -> tuple[Any, ...]:
    ones = np.ones(3, np.float32)
    window, region = np.array([0, 0, 1, 1]), np.array([0.0, 0.0, 1.0, 1.0])
    pixels, out = np.zeros((1, 3), np.uint8), np.empty((3, 1, 1), np.float32)
    return (pixels, window, region, True, False, ones, ones, *_work_memory(window, region, True, 1), out)


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
    memory = _work_memory(window, region, antialias, out.shape[1])
    _resize(pixels, window, region, antialias, mirror, scale, offset, *memory, out)


def _work_memory(
    window: NDArray[np.int64], region: NDArray[np.float64], antialias: bool, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """For the first pixels of the results, [2, size], their weights in both directions, and a row of the image."""
    top, left, bottom, right = region.tolist()
    taps_y, taps_x = taps(bottom - top, size, antialias), taps(right - left, size, antialias)
    first = np.empty((2, size), np.int64)
    weight_y, weight_x = np.empty((size, taps_y), np.float32), np.empty((size, taps_x), np.float32)
    row = np.zeros(3 * (int(window[3]) + taps_x), np.float32)  # beyond the width it is read with weight 0
    return first, weight_y, weight_x, row


def taps(extent: float, size: int, antialias: bool) -> int:
    """Pixels that a result may depend on along an axis, rounded up to an even number."""
    support = extent / size if antialias and extent > size else 1.0
    return 2 * (math.ceil(2 * support) // 2 + 1)
