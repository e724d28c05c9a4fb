"""Files of others whose records lie in them as ours do: what a scan of HDF5 files or of a Zarr array finds in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import UsageError
from stagein.formats.schema import Field


@dataclass(frozen=True)
class ForeignFile:
    """A file with records of the large field: where in it each starts, in bytes, and how long it is; and their columns."""

    path: Path
    offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint32]
    columns: Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class ForeignRecords:
    """The records of files of one layout: `large`, the field that is read where it lies, and `columns`, which are copied."""

    kind: str
    name: str
    large: Field
    columns: Mapping[str, Field]
    files: tuple[ForeignFile, ...]


def refuse(what: object, reason: str) -> NoReturn:
    """Raise UsageError: `what` cannot be read where it lies."""
    raise UsageError(f"{what} {reason}, so that it cannot be adopted as it is: use `stagein convert`")


def tensor_field(what: object, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Field:
    """The field of records of this type and shape. Raises UsageError for a type that cannot be read as it is."""
    if dtype.byteorder == ">":
        refuse(what, "is big-endian")
    try:
        return Field(kind="tensor", dtype=dtype.name, shape=shape)
    except ValueError:
        refuse(what, f"has elements of type {dtype}")
