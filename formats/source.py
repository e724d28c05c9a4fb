"""What a source of records is: records known in number, order and size before anything is read.

That makes a conversion a pure function of its source: shards can be planned, dealt to processes, redone after a kill,
and come out the same.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .schema import Schema
from .values import Value

Room: TypeAlias = Callable[[str, int], memoryview]
"""Where a field of the next record goes: call it with the field's name and its size in bytes, and fill what it returns.

For `tensor` and `ragged` fields the bytes are little-endian, the last extent varying fastest. Asked again for the same
field before the record is yielded, it gives the same place again, at the size asked for last."""


@dataclass(frozen=True)
class SourceRecord:
    """A record as it is read: the fields for which room was asked are in it; `values` are all others.

    Small fields are easiest given as values; what is large is read into room, where it is not copied again. `counts` are
    added up over all records of a conversion, to be reported at its end. `shapes` are those of the fields in the room whose
    shape does not follow from their size.
    """

    values: Mapping[str, Value] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RefusedRecord:
    """Something in the source that cannot be a record, and why."""

    name: str
    reason: str


class SourcePart(Protocol):
    """Some records of a source: all that a process needs to make one shard of them. Picklable."""

    def mark(self) -> object:
        """What the records are made from, as JSON: equal marks mean equal records."""

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        """The records in the order asked for, each read into `room`. Raises SourceError for what is missing or has changed."""


BatchRoom: TypeAlias = Callable[[str, NDArray[np.int64]], NDArray[np.uint8]]
"""Where a field of the next records goes, one behind the other: call it with the field's name and its size in each, in bytes.

Asked again for the same field before the batch is yielded, it gives a place that starts with the same byte."""


@dataclass(frozen=True)
class RecordBatch:
    """Several records: the bytes in each of the fields that are in the room asked for, the small fields of fixed size as arrays with
    one row a record, and what would have been among these records and is none."""

    nbytes: Mapping[str, NDArray[np.int64]]
    columns: Mapping[str, NDArray[np.generic]]
    refused: tuple[RefusedRecord, ...] = ()


@runtime_checkable
class BatchedPart(SourcePart, Protocol):
    """A part that also reads many records by one call off the GIL."""

    def prepare(self) -> None:
        """Have the kernel for that compiled meanwhile, should it not be."""

    def read_batches(self, room: BatchRoom) -> Iterator[RecordBatch]:
        """The same records as `read` yields, in the same order, in batches. Raises SourceError as `read` does."""


class Source(Protocol):
    """All records of a source, in their order."""

    @property
    def kind(self) -> str:
        """The word that the command line and the manifest have for it."""

    @property
    def name(self) -> str:
        """The path that errors name."""

    @property
    def schema(self) -> Schema: ...

    @property
    def nbytes(self) -> NDArray[np.int64]:
        """Bytes of the primary field of every record."""

    @property
    def secondary_nbytes(self) -> Mapping[str, NDArray[np.int64]]:
        """The same of the other fields whose records differ in size (`encoded`, `ragged`, `text`), by field.

        Such a field that is not in it is kept as a column, whole: its sizes need not be known before it is read.
        """

    @property
    def refused(self) -> tuple[RefusedRecord, ...]:
        """What was found to be no record without reading it."""

    def identity(self) -> object:
        """What tells this source from another with the same schema, as JSON, wherever and whenever it is read."""

    def part(self, numbers: NDArray[np.int64]) -> SourcePart:
        """The records of these numbers, in this order; no number twice."""


@runtime_checkable
class PartialSource(Protocol):
    """A source that may hold more of its records than their fields."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """What is no field though nobody chose the fields, the most frequent first: extensions of members, as `.flac`."""


@runtime_checkable
class PiecewiseSource(Protocol):
    """A source that may have to be read in pieces of many records, from which one alone cannot be had."""

    @property
    def costly_order(self) -> str | None:
        """Why records in another order take all of it for every shard; None where any order is as good."""


def variable_nbytes(source: Source) -> dict[str, NDArray[np.int64]]:
    """Bytes in every record of all fields whose records differ in size, as far as they are known."""
    primary = {source.schema.primary: source.nbytes} if source.schema.primary_field.is_variable else {}
    return primary | dict(source.secondary_nbytes)


def record_nbytes(source: Source) -> NDArray[np.int64]:
    """Bytes of every record of a source, without the fields whose sizes are not known."""
    fixed = sum(each.record_bytes for each in source.schema.fields.values() if not each.is_variable)
    total = np.full(len(source.nbytes), fixed, np.int64)
    for nbytes in variable_nbytes(source).values():
        total += nbytes
    return total
