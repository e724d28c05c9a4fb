"""Files of others whose records lie in them as ours do: what a scan of HDF5 files or of Zarr arrays finds in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import SourceError, UsageError
from stagein.formats.schema import MAX_RECORD_BYTES, SMALL_FIELD_BYTES, Field


@dataclass(frozen=True)
class ForeignPart:
    """A file with records of a large field: where in it each starts, in bytes, and how long it is as it is stored."""

    path: Path
    offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint32]


@dataclass(frozen=True)
class ForeignShard:
    """The same records of all fields: the large ones each in a file, which may be one for all; the values of the others."""

    parts: Mapping[str, ForeignPart]
    columns: Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class ForeignRecords:
    """The records of files of one layout: `large` fields, the primary one first, that are read where they lie, and `columns`,
    which are copied."""

    kind: str
    large: Mapping[str, Field]
    columns: Mapping[str, Field]
    shards: tuple[ForeignShard, ...]

    @property
    def primary(self) -> str:
        return next(iter(self.large))


def refuse(what: object, reason: str, instead: str = "use `stagein convert`") -> NoReturn:
    """Raise UsageError: `what` cannot be read where it lies."""
    raise UsageError(f"{what} {reason}, so that it cannot be adopted as it is: {instead}")


def tensor_field(what: object, dtype: str, shape: tuple[int, ...]) -> Field:
    """The field of records of this type and shape. Raises UsageError for a type that cannot be read as it is."""
    try:
        return Field(kind="tensor", dtype=dtype, shape=shape)
    except ValueError:
        refuse(what, f"has elements of type {dtype}", "name the others with --field, or use `stagein convert`")


def primary_name(what: object, fields: Mapping[str, Field], primary: str | None) -> str:
    """The field that was asked for, or the largest. Raises UsageError where there is none."""
    name = primary or max(fields, key=lambda each: fields[each].record_bytes)
    if name not in fields:
        raise UsageError(f"{what} has no field {name!r}: it has {', '.join(fields)}")
    if fields[name].record_bytes == 0:
        refuse(f"{name!r} of {what}", "has no bytes")
    return name


def large_names(fields: Mapping[str, Field], primary: str) -> list[str]:
    """The fields that are too large to be columns, after the primary one."""
    return [primary, *(n for n, field in fields.items() if n != primary and field.record_bytes > SMALL_FIELD_BYTES)]


def foreign_part(path: Path, places: NDArray[np.uint64], file_bytes: int) -> ForeignPart:
    """The records at these places, [records, 2]: offset and size. Raises SourceError where the file has not so many bytes."""
    offset, nbytes = places[:, 0].copy(), places[:, 1].copy()
    is_inside = (nbytes <= file_bytes) & (offset <= np.uint64(file_bytes) - np.minimum(nbytes, np.uint64(file_bytes)))
    if not is_inside.all():
        raise SourceError(
            f"{path} has {file_bytes} bytes, too few for its record {int(np.argmin(is_inside))}: restore it from a good copy"
        )
    if int(nbytes.max(initial=0)) > MAX_RECORD_BYTES:
        refuse(path, f"has records above the limit of {MAX_RECORD_BYTES} bytes")
    return ForeignPart(path, offset, nbytes.astype(np.uint32))
