"""What a source of records is: records known in number, order and size before anything is read.

That makes a conversion a pure function of its source: shards can be planned, dealt to processes, redone after a kill,
and come out the same.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .schema import Schema

Room: TypeAlias = Callable[[int], memoryview]
"""Where the next record's primary field goes: call it with its size in bytes, fill what it returns, yield the record."""


@dataclass(frozen=True)
class SourceRecord:
    """A record as it is read: `nbytes` of its primary field are in the room that was asked for; here are the columns."""

    nbytes: int
    columns: Mapping[str, ArrayLike]


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
    def refused(self) -> tuple[RefusedRecord, ...]:
        """What was found to be no record without reading it."""

    def identity(self) -> object:
        """What tells this source from another with the same schema, as JSON, wherever and whenever it is read."""

    def part(self, numbers: NDArray[np.int64]) -> SourcePart:
        """The records of these numbers, in this order; no number twice."""
