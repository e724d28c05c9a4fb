"""What the sources of tensors share: how an array of a file reaches a record, and records that are files or rows of files.

Tensors have one type in all of a source, and one shape, so that the size of every record is known when one has been looked
at; or they may have any shape, and all have been looked at. They are held to it when they are read.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stagein.formats.checksums import pread_exactly
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.schema import Field, Schema, common_shape, make_array_field, make_schema
from stagein.formats.source import RefusedRecord, Room, SourceRecord

from .files import SCAN_THREADS, SourceFile, most_common
from .read_order import read_in_order


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


class RecordPlace:
    """Where the arrays of one record go: each straight into `room`. Those that may have any shape are noted with theirs."""

    def __init__(self, schema: Schema, room: Room) -> None:
        self._schema = schema
        self._room = room
        self._shapes: dict[str, tuple[int, ...]] = {}

    def take(self, name: str, path: Path, what: str, found: Field) -> memoryview:
        """Memory for the array of the field `name`, which is `what` in `path`. Raises BadTensorError when it is not of the type
        and shape that all records have."""
        expected = self._schema.fields[name]
        if found.dtype != expected.dtype or not expected.holds(found.fixed_shape):
            shape = str(expected.shape).replace("None", "any")
            is_alike = _kind_of(found) == _kind_of(expected)
            raise BadTensorError(
                path,
                f"{what} is {found.dtype} of shape {found.shape}, expected {expected.dtype} of shape {shape}"
                f"{': where records may differ in shape, pass --any-shape' * is_alike}",
            )
        if expected.has_shapes:
            self._shapes[name] = found.fixed_shape
        return self._room(name, found.record_bytes)

    def record(self) -> SourceRecord:
        """The record, when all of its arrays are where they belong."""
        return SourceRecord(shapes=self._shapes)


Sample: TypeAlias = tuple[SourceFile, ...]
"""The files of one record: one that holds all of it, or one a field, in the order of the fields."""

_LOOKED_AT = 16
"""Samples that say together what records are."""


class SampleReader(Protocol):
    """Reads one record from the files that hold it. Picklable; JSON tells two of them apart."""

    def mark(self) -> object: ...

    def fields(self, files: Sample) -> dict[str, Field]:
        """What a record of no other than these would be. Raises as `read` does."""

    def read(self, files: Sample, schema: Schema, room: Room) -> SourceRecord:
        """Raises BadTensorError when they hold no such record, SourceError for a file that is missing or has changed."""


def scan_samples(
    kind: str,
    root: Path,
    samples: Sequence[Sample],
    choose_reader: Callable[[Sample], SampleReader],
    *,
    primary: str | None,
    any_shape: bool,
    refused: tuple[RefusedRecord, ...] = (),
) -> "TensorFiles":
    """The records of these samples, but for those with an empty file, which are refused, and for those that are `refused` already.

    What `choose_reader` and its reader find in most of a few samples from all over the source says what records are; others are
    refused when they are read. Where too many of these differ in shape, or with `any_shape`, all are looked at: extents in which
    they differ are free. Raises SourceError when none can be read, UsageError when they make no record, or when that is
    what `choose_reader` says about all that can be read.
    """
    whole, empty = _without_empty_files(root, samples)
    reader, fields, have_one_shape = _describe_most(root, whole, choose_reader)
    sizes: dict[str, NDArray[np.int64]] = {}
    if any_shape or not have_one_shape:
        fields, sizes = _look_at_all(whole, reader, fields)
    schema = make_schema(fields, primary or next(iter(fields)))
    return TensorFiles(kind, root, schema, whole, reader, (*refused, *empty), sizes)


def _without_empty_files(root: Path, samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], tuple[RefusedRecord, ...]]:
    """The samples without an empty file, and the refusals of the others."""
    empty = {sample: file for sample in samples for file in sample if not file.nbytes}
    whole = tuple(sample for sample in samples if sample not in empty)
    return whole, tuple(RefusedRecord(name_below(root, file.path), "the file is empty") for file in empty.values())


def _describe_most(
    root: Path, samples: Sequence[Sample], choose_reader: Callable[[Sample], SampleReader]
) -> tuple[SampleReader, dict[str, Field], bool]:
    """How most of a few samples from all over the source are read, what is in them, and whether they mostly have one shape.

    When none of these can be read, the first sample that can decides.
    """
    if not samples:
        raise SourceError(f"{root}: every record has an empty file: was copying them interrupted?")
    spread = np.unique(np.linspace(0, len(samples) - 1, _LOOKED_AT).astype(int)).tolist()
    described: list[tuple[SampleReader, dict[str, Field]]] = []
    unknown: UsageError | None = None
    for number in spread:
        try:
            reader = choose_reader(samples[number])
            described.append((reader, reader.fields(samples[number])))
        except BadTensorError:
            continue
        except UsageError as error:
            unknown = unknown or error
    if not described:
        if unknown is not None:
            raise unknown
        described = [_describe_first(root, samples, choose_reader)]
    kinds = [repr((reader, _kinds_of(fields))) for reader, fields in described]
    kind = most_common(kinds)
    alike = [each for each, its in zip(described, kinds, strict=True) if its == kind]
    usual = most_common(map(repr, alike))
    same = [each for each in alike if repr(each) == usual]
    return *same[0], 4 * len(same) >= 3 * len(alike)


def _describe_first(
    root: Path, samples: Sequence[Sample], choose_reader: Callable[[Sample], SampleReader]
) -> tuple[SampleReader, dict[str, Field]]:
    first: BadTensorError | None = None
    for sample in samples:
        try:
            reader = choose_reader(sample)
            return reader, reader.fields(sample)
        except BadTensorError as error:
            first = first or error
    raise SourceError(f"none of the {len(samples)} records in {root} can be read, the first of them: {first}")


def _look_at_all(
    samples: Sequence[Sample], reader: SampleReader, expected: Mapping[str, Field]
) -> tuple[dict[str, Field], dict[str, NDArray[np.int64]]]:
    """The fields that hold all samples but those that differ from what is expected in more than extents, and the bytes in every
    sample of the fields whose records differ in size; none in what cannot be read, which reading it will refuse."""

    def look_at(sample: Sample) -> dict[str, Field] | None:
        try:
            found = reader.fields(sample)
        except BadTensorError:
            return None
        return found if _kinds_of(found) == _kinds_of(expected) else None

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        looked_at = list(pool.map(look_at, samples))
    fields, sizes = {}, {}
    for name, usual in expected.items():
        found = [None if each is None else each[name] for each in looked_at]
        shape = common_shape({each.fixed_shape for each in found if each is not None})
        fields[name] = make_array_field(usual.dtype, shape)
        if fields[name].is_variable:
            sizes[name] = np.array([each.record_bytes if each is not None else 0 for each in found], np.int64)
    return fields, sizes


def _kinds_of(fields: Mapping[str, Field]) -> dict[str, tuple[str, int]]:
    return {name: _kind_of(field) for name, field in fields.items()}


def _kind_of(field: Field) -> tuple[str, int]:
    """What arrays have in common that differ in nothing but extents."""
    return field.dtype, len(field.shape)


@dataclass(frozen=True)
class TensorFiles:
    """Records of which each has files of its own: one, or one a field."""

    kind: str
    root: Path
    schema: Schema
    samples: tuple[Sample, ...]
    reader: SampleReader
    refused: tuple[RefusedRecord, ...] = ()
    sizes: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    """Bytes in every record of the fields whose records differ in size."""

    @property
    def name(self) -> str:
        return str(self.root)

    @property
    def nbytes(self) -> NDArray[np.int64]:
        fixed = np.full(len(self.samples), self.schema.primary_field.record_bytes, np.int64)
        return self.sizes.get(self.schema.primary, fixed)

    @property
    def secondary_nbytes(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: nbytes for name, nbytes in self.sizes.items() if name != self.schema.primary}

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


def refuse_any_shape(source: Path, *, any_shape: bool) -> None:
    """Raise UsageError where records are rows, and yet to have any shape."""
    if any_shape:
        raise UsageError(f"{source}: its records are rows of arrays, all of one shape: leave out --any-shape")


class RowReader(Protocol):
    """Opens the files whose rows are the records. Picklable; JSON tells two of them apart."""

    @property
    def files(self) -> tuple[SourceFile, ...]: ...

    @property
    def shares_chunks(self) -> bool:
        """Whether several rows are read, and decompressed, together."""

    def mark(self) -> object: ...

    def open(self) -> AbstractContextManager[Callable[[int, str, memoryview], None]]:
        """What fills memory with the little-endian bytes of the field of this name of the record of this number; it raises
        BadTensorError. Raises SourceError when a file is missing or has changed.
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
                    for name, declared in self.schema.fields.items():
                        read_cell(number, name, room(name, declared.record_bytes))
                    record: SourceRecord | RefusedRecord = SourceRecord()
                except BadTensorError as error:
                    record = RefusedRecord(f"{error.path.name} row {number}", error.reason)
                yield record


def name_below(root: Path, path: Path) -> str:
    """What refusals call a file of a source."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
