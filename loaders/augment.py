"""Which part of each image is used, and which images are mirrored: planned on the host, for a whole batch at once.

Windows depend on (seed, epoch, sample id) and the image's size only, so they are the same for every world size, after a
resume, on the CPU and on the GPU, and they are known before a byte is read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stagein.formats.errors import UsageError

from .philox import sample_uniforms

CROP_ATTEMPTS = 10
_FLIP_BLOCK = CROP_ATTEMPTS


@dataclass(frozen=True)
class Windows:
    """Windows of images, in whole pixels: `start` and `extent`, int32 `[batch, 2]`, as (y, x) and (height, width)."""

    start: NDArray[np.int32]
    extent: NDArray[np.int32]


@dataclass(frozen=True)
class EvalWindows:
    """Windows to decode and, inside each, the region to resize: float32 `[batch, 2]` bounds in pixels of the window."""

    windows: Windows
    region_start: NDArray[np.float32]
    region_end: NDArray[np.float32]


def train_uniforms(seed: int, epoch: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The random numbers of a training image, `[batch, 11, 4]`: ten attempts at a crop, and one block for the flip."""
    return sample_uniforms(seed, epoch, ids, CROP_ATTEMPTS + 1)


def refuse_odd_draws(area: tuple[float, float], ratio: tuple[float, float], flip: float) -> None:
    """Raise UsageError for what `random_resized_crops` and `random_flips` cannot draw from."""
    if not 0 <= area[0] <= area[1] <= 1 or not area[1]:
        raise UsageError(f"area={area} is not the smallest and the largest share of an image: they are from 0 to 1")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise UsageError(f"ratio={ratio} is not the smallest and the largest ratio of width to height")
    if not 0 <= flip <= 1:
        raise UsageError(f"flip={flip} is not a probability: it is from 0 to 1")


def random_resized_crops(
    uniforms: NDArray[np.float64],
    height_width: NDArray[np.int32],
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Windows:
    """Windows of a random share of the area and a random aspect ratio, one an image of `height_width` int32 `[batch, 2]`.

    The rule is that of torchvision's RandomResizedCrop: the first of ten attempts that fits, else the centre window
    whose ratio is nearest to the allowed ones. `area` is relative, `ratio` is width / height, drawn on a log scale.
    """
    whole = height_width.astype(np.float64)
    height, width = whole[:, :1], whole[:, 1:]
    draws = uniforms[:, :CROP_ATTEMPTS]
    target_area = height * width * (area[0] + draws[:, :, 0] * (area[1] - area[0]))
    log_ratio = np.log(ratio)
    aspect = np.exp(log_ratio[0] + draws[:, :, 1] * (log_ratio[1] - log_ratio[0]))
    crop_height, crop_width = np.rint(np.sqrt(target_area / aspect)), np.rint(np.sqrt(target_area * aspect))
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)

    found = np.arange(len(whole)), fits.argmax(axis=1)
    extent = np.empty_like(whole)
    extent[:, 0], extent[:, 1] = crop_height[found], crop_width[found]
    start = np.floor(draws[found][:, 2:] * (whole - extent + 1))
    if not (is_found := fits[found]).all():
        centre_start, centre_extent = _centre_windows(whole[:, 0], whole[:, 1], ratio)
        start = np.where(is_found[:, None], start, centre_start)
        extent = np.where(is_found[:, None], extent, centre_extent)
    return Windows(start.astype(np.int32), extent.astype(np.int32))


def _centre_windows(
    height: NDArray[np.float64], width: NDArray[np.float64], ratio: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest centred windows whose aspect ratio lies within `ratio`, as start and extent `[batch, 2]`."""
    crop_height = np.minimum(height, np.maximum(1, np.rint(width / ratio[0])))
    crop_width = np.minimum(width, np.maximum(1, np.rint(height * ratio[1])))
    start = np.stack([(height - crop_height) // 2, (width - crop_width) // 2], axis=-1)
    return start, np.stack([crop_height, crop_width], axis=-1)


def random_flips(uniforms: NDArray[np.float64], probability: float = 0.5) -> NDArray[np.int32]:
    """1 where the image is mirrored left to right, else 0: int32 `[batch]`."""
    return (uniforms[:, _FLIP_BLOCK, 0] < probability).astype(np.int32)


def volume_uniforms(seed: int, epoch: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The random numbers of a volume, `[batch, 2, 4]`: where it is cropped, and along which axes it is flipped."""
    return sample_uniforms(seed, epoch, ids, 2)


def random_starts(uniforms: NDArray[np.float64], shapes: ArrayLike, crop: Sequence[int]) -> NDArray[np.int32]:
    """Where crops of a fixed size begin along each axis, any place alike, in volumes of these shapes, `[axes]` for all or
    `[batch, axes]`: int32 `[batch, axes]`."""
    room: NDArray[np.int64] = np.subtract(shapes, crop) + 1
    return np.floor(uniforms[:, 0, : len(crop)] * room).astype(np.int32)


def random_axis_flips(uniforms: NDArray[np.float64], probabilities: Sequence[float]) -> NDArray[np.int32]:
    """1 where a volume is reversed along an axis, each by itself, else 0: int32 `[batch, axes]`."""
    return np.less(uniforms[:, 1, : len(probabilities)], probabilities).astype(np.int32)


def centre_crops(height_width: NDArray[np.int32], size: int, resize: int) -> EvalWindows:
    """What of each image is seen when its shorter side is resized to `resize` and the centre `size` x `size` is kept.

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop round them. The window to decode is the region
    plus the support of an antialiasing linear filter, so that the pixels next to the region's edge count as they should.
    """
    height_width = height_width.astype(np.int64)
    short = height_width.min(axis=1, keepdims=True)
    resized = resize * height_width // short
    offset = np.rint((resized - size) / 2)
    source_pixels = height_width / resized  # of the image, for one pixel of the result
    region_start, region_end = offset * source_pixels, (offset + size) * source_pixels
    margin = np.maximum(1, source_pixels) + 1
    start = np.maximum(0, np.floor(region_start - margin))
    end = np.minimum(height_width, np.ceil(region_end + margin))
    return EvalWindows(
        Windows(start.astype(np.int32), (end - start).astype(np.int32)),
        (region_start - start).astype(np.float32),
        (region_end - start).astype(np.float32),
    )
