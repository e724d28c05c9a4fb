"""The fields that sources make of what they find: images with their size, and columns whose values keep their meaning."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stagein.formats.images import IMAGE_SUFFIXES, read_header
from stagein.formats.schema import Field
from stagein.formats.values import UNKNOWN_ENCODING, BadValueError, encoding_of, infer_field

from .files import most_common

SIZE_FIELD = Field(kind="tensor", dtype="int32", shape=(2,), dims=("height_width",))
"""The column `hw` beside an image."""

LABEL_FIELD = Field(kind="tensor", dtype="int64")


def image_field(encoding: str) -> Field:
    """The field of an image as its file holds it; `encoding` is `jpeg`, `png`, or `image` for a mixture."""
    return Field(
        kind="encoded",
        dtype="uint8",
        shape=(None, None, 3),
        encoding=encoding,
        dims=("height", "width", "channel"),
    )


def file_field(contents: Sequence[bytes]) -> Field:
    """The field of files of which these are some: of images, where most start like one, else of the format that all have."""
    found = [encoding_of(content) for content in contents]
    if 2 * sum(encoding in IMAGE_SUFFIXES.values() for encoding in found) > len(found):
        return image_field("image")  # the next one may be of another format
    return Field(kind="encoded", encoding=found[0] if len(set(found)) == 1 else UNKNOWN_ENCODING, shape=(None,))


def common_array_field(arrays: Sequence[NDArray[np.generic]]) -> Field:
    """The field of records of which these are some: a `tensor` where most have one shape, else `ragged`. Raises BadValueError."""
    shape = most_common(array.shape for array in arrays)
    usual = [array for array in arrays if array.shape == shape]
    if 4 * len(usual) < 3 * len(arrays):
        usual = list(arrays)
    return infer_field(usual)


def image_size(content: memoryview) -> tuple[int, int]:
    """Height and width of a complete image file, for the column `hw`. Raises BadImageError for anything else."""
    header = read_header(content)
    return header.height, header.width


def number_array(value: ArrayLike) -> NDArray[np.generic]:
    """`value` as an array. Raises BadValueError unless it is made of numbers."""
    try:
        array = np.asarray(value)
    except ValueError:  # nested lists of differing lengths
        raise BadValueError("it is no array of numbers") from None
    if array.dtype.kind not in "biufc":
        raise BadValueError("it is no array of numbers")
    return array


def column_value(value: ArrayLike, field: Field) -> NDArray[np.generic]:
    """`value` as `field` stores it. Raises BadValueError when its shape differs or a number would not stay what it is."""
    array = number_array(value)
    if array.shape != field.fixed_shape:
        raise BadValueError(f"its shape is {array.shape}, not {field.fixed_shape}")
    with np.errstate(all="ignore"):
        stored = array.astype(field.stored_dtype)
    if not np.array_equal(stored, array, equal_nan=True):
        raise BadValueError(f"its value {_short(array)} is none of {field.dtype}")
    return stored


def _short(array: NDArray[np.generic]) -> str:
    return str(array) if array.size == 1 else f"{array.ravel()[0]}, …"
