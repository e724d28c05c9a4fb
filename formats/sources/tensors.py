"""What the sources of tensors share: how an array of a file reaches a record, and records that are files or rows of files.

Tensors have one shape and one type in all of a source, so that the size of every record is known when one has been looked
at. The others are held to it when they are read.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from stagein.formats.checksums import pread_exactly
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.schema import Field, Schema, make_array_field
from stagein.formats.source import RefusedRecord, Room, SourceRecord

from .files import SourceFile, most_common
from .read_order import read_in_order

FieldReader: TypeAlias = Callable[[str, memoryview], None]
"""Fills the memory with the little-endian bytes of the named field of one record. Raises BadTensorError."""


class BadTensorError(Exception):
    """A file or a row of one that cannot be a record, and why; `path` is the file."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True)
class StoredArray:
    """An array of numbers as it lies in a file, in one piece: its first byte, its element type with the byte order, and
    whether its first extent is the one that varies fastest."""

    path: Path
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int
    fortran_order: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def order(self) -> Literal["C", "F"]:
        """numpy's word for which extent varies fastest: the last or the first."""
        return "F" if self.fortran_order else "C"

    def row(self, number: int) -> "StoredArray":
        """Row `number` of an array whose rows lie one behind the other."""
        shape = self.shape[1:]
        offset = self.offset + number * math.prod(shape) * self.dtype.itemsize
        return StoredArray(self.path, self.dtype, shape, offset)

    def read(self, descriptor: int, target: memoryview) -> None:
        """Fill `target` with the elements, little-endian and the last extent varying fastest.

        Raises BadTensorError when the file ends before the array does, OSError when it cannot be read.
        """
        content = memoryview(bytearray(self.nbytes)) if self.fortran_order else target
        got = pread_exactly(descriptor, content, self.offset)
        if got != self.nbytes:
            raise BadTensorError(self.path, f"it ends after {got} of the {self.nbytes} bytes of its array")
        if self.fortran_order:
            stored = np.frombuffer(content, self.dtype).reshape(self.shape, order="F")
            copy_little_endian(stored, target)
        else:
            make_little_endian(target, self.dtype)

    def mapped(self) -> NDArray[np.generic]:
        """The array, mapped into memory: for rows that are scattered over all of the file. Raises OSError."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, self.order)


def copy_little_endian(array: NDArray[np.generic], target: memoryview) -> None:
    """Fill `target` with the elements of `array`, whatever its strides and byte order; their bits stay what they are."""
    np.frombuffer(target, array.dtype).reshape(array.shape)[...] = array
    make_little_endian(target, array.dtype)


def make_little_endian(content: memoryview, dtype: np.dtype[np.generic]) -> None:
    """Turn elements of `dtype` round where they lie, if they are big-endian."""
    if dtype != dtype.newbyteorder("<"):
        np.frombuffer(content, dtype).byteswap(inplace=True)


def tensor_field(path: Path, what: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Field:
    """The field for records of this type and shape. Raises BadTensorError, about `what` in `path`, when it holds no numbers."""
    if dtype.hasobject:
        raise BadTensorError(path, f"{what} holds Python objects or text of any length: save it as an array of numbers")
    if dtype.kind not in "biufc":
        raise BadTensorError(path, f"{what} holds {dtype}, no plain numbers: save it as an array of numbers")
    try:
        return make_array_field(dtype.name, shape)
    except ValueError as error:
        raise BadTensorError(path, f"{what} cannot be a field: {error}") from None


def refuse_other_field(path: Path, what: str, found: Field, expected: Field) -> None:
    """Raise BadTensorError when `what` in `path` is not of the type and shape that all records have."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise BadTensorError(
            path,
            f"{what} is {found.dtype} of shape {found.shape}, expected {expected.dtype} of shape {expected.shape}",
        )


def read_record(schema: Schema, room: Room, read_field: FieldReader) -> SourceRecord:
    """One record, every field of it read straight into `room`."""
    for name, declared in schema.fields.items():
        read_field(name, room(name, declared.record_bytes))
    return SourceRecord()


Sample: TypeAlias = tuple[SourceFile, ...]
"""The files of one record: one that holds all of it, or one a field, in the order of the fields."""

_Description = TypeVar("_Description")
_LOOKED_AT = 16
"""Samples that say together what records are."""


def without_empty_files(root: Path, samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], tuple[RefusedRecord, ...]]:
    """The samples without an empty file, and the refusals of the others."""
    empty = {sample: file for sample in samples for file in sample if not file.nbytes}
    whole = tuple(sample for sample in samples if sample not in empty)
    return whole, tuple(RefusedRecord(name_below(root, file.path), "the file is empty") for file in empty.values())


def describe_most(root: Path, samples: Sequence[Sample], describe: Callable[[Sample], _Description]) -> _Description:
    """What `describe` finds in most of a few samples from all over the source; the others are refused when they are read.

    When none of these can be read, the first sample that can decides. Raises SourceError when there is none, UsageError
    when that is what `describe` says about all that can be read.
    """
    if not samples:
        raise SourceError(f"{root}: every record has an empty file: was copying them interrupted?")
    spread = np.unique(np.linspace(0, len(samples) - 1, _LOOKED_AT).astype(int)).tolist()
    described: list[_Description] = []
    unknown: UsageError | None = None
    for number in spread:
        try:
            described.append(describe(samples[number]))
        except BadTensorError:
            continue
        except UsageError as error:
            unknown = unknown or error
    if described:
        by_text = {repr(description): description for description in reversed(described)}
        return by_text[most_common(map(repr, described))]
    if unknown is not None:
        raise unknown
    return _describe_first(root, samples, describe)


def _describe_first(root: Path, samples: Sequence[Sample], describe: Callable[[Sample], _Description]) -> _Description:
    first: BadTensorError | None = None
    for sample in samples:
        try:
            return describe(sample)
        except BadTensorError as error:
            first = first or error
    raise SourceError(f"none of the {len(samples)} records in {root} can be read, the first of them: {first}")


class SampleReader(Protocol):
    """Reads one record from the files that hold it. Picklable; JSON tells two of them apart."""

    def mark(self) -> object: ...

    def read(self, files: Sample, schema: Schema, room: Room) -> SourceRecord:
        """Raises BadTensorError when they hold no such record, SourceError for a file that is missing or has changed."""


@dataclass(frozen=True)
class TensorFiles:
    """Records of which each has files of its own: one, or one a field."""

    kind: str
    root: Path
    schema: Schema
    samples: tuple[Sample, ...]
    reader: SampleReader
    refused: tuple[RefusedRecord, ...] = ()
    secondary_nbytes: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.root)

    @property
    def nbytes(self) -> NDArray[np.int64]:
        return np.full(len(self.samples), self.schema.primary_field.record_bytes, np.int64)

    def identity(self) -> object:
        files = [[(name_below(self.root, file.path), file.nbytes) for file in sample] for sample in self.samples]
        return self.reader.mark(), files

    def part(self, numbers: NDArray[np.int64]) -> "TensorFilesPart":
        samples = tuple(self.samples[number] for number in numbers.tolist())
        return TensorFilesPart(self.root, self.schema, samples, self.reader)


@dataclass(frozen=True)
class TensorFilesPart:
    """Some of the records of TensorFiles."""

    root: Path
    schema: Schema
    samples: tuple[Sample, ...]
    reader: SampleReader

    def mark(self) -> object:
        return self.reader.mark(), [[file.mark() for file in sample] for sample in self.samples]

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        for files in self.samples:
            yield self._read_sample(files, room)

    def _read_sample(self, files: Sample, room: Room) -> SourceRecord | RefusedRecord:
        try:
            return self.reader.read(files, self.schema, room)
        except BadTensorError as error:
            return RefusedRecord(name_below(self.root, error.path), error.reason)


def row_count(path: Path, shape: tuple[int, ...]) -> int:
    """Rows of an array of this shape in `path`. Raises BadTensorError for a single value."""
    if not shape:
        raise BadTensorError(path, "it holds a single value where there should be rows: choose other fields")
    return shape[0]


def common_row_count(source: Path, rows: Mapping[str, int]) -> int:
    """The rows that all of these arrays have. Raises SourceError when they differ."""
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} has {count} rows" for name, count in rows.items())
        raise SourceError(f"{source}: {listed}: row i of each belongs to record i, so they must be equally many")
    return next(iter(rows.values()))


class RowReader(Protocol):
    """Opens the files whose rows are the records. Picklable; JSON tells two of them apart."""

    @property
    def files(self) -> tuple[SourceFile, ...]: ...

    @property
    def shares_chunks(self) -> bool:
        """Whether several rows are read, and decompressed, together."""

    def mark(self) -> object: ...

    def open(self) -> AbstractContextManager[Callable[[int, str, memoryview], None]]:
        """What fills memory with the field of this name of the record of this number, as a FieldReader does.

        Raises SourceError when a file is missing or has changed.
        """


@dataclass(frozen=True)
class TensorRows:
    """Records that are the rows of files: row i of each is record i."""

    kind: str
    root: Path
    schema: Schema
    count: int
    reader: RowReader
    refused: tuple[RefusedRecord, ...] = ()
    secondary_nbytes: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.root)

    @property
    def nbytes(self) -> NDArray[np.int64]:
        return np.full(self.count, self.schema.primary_field.record_bytes, np.int64)

    @property
    def costly_order(self) -> str | None:
        return "chunks of several rows are read whole" if self.reader.shares_chunks else None

    def identity(self) -> object:
        return self.reader.mark(), [(file.path.name, file.nbytes) for file in self.reader.files], self.count

    def part(self, numbers: NDArray[np.int64]) -> "TensorRowsPart":
        return TensorRowsPart(self.schema, tuple(numbers.tolist()), self.reader)


@dataclass(frozen=True)
class TensorRowsPart:
    """Some of the records of TensorRows."""

    schema: Schema
    numbers: tuple[int, ...]
    reader: RowReader

    def mark(self) -> object:
        return self.reader.mark(), [file.mark() for file in self.reader.files], self.numbers

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        numbers = np.array(self.numbers, np.int64)
        return read_in_order(np.zeros_like(numbers), numbers * self.reader.shares_chunks, self._read, room)

    def _read(self, records: NDArray[np.int64], room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        with self.reader.open() as read_cell:
            for number in (self.numbers[record] for record in records.tolist()):
                try:
                    record: SourceRecord | RefusedRecord = read_record(self.schema, room, partial(read_cell, number))
                except BadTensorError as error:
                    record = RefusedRecord(f"{error.path.name} row {number}", error.reason)
                yield record


def name_below(root: Path, path: Path) -> str:
    """What refusals call a file of a source."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
