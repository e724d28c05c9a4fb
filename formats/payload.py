"""The bytes of a field in a shard, one record behind the other: collected, summed, and where each record is.

Large records that come as `bytes` stay where they are until they are written; all others are copied, or read, to their places
in memory that is used for one shard after the other.
"""

import contextlib
import mmap
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import zarr_view
from .checksums import crc32c, crc32c_unlocked
from .errors import SourceError
from .schema import Field
from .source import ReadField

_SUMMED_BYTES = 512 << 10
"""Summed at a time, at least: many records by one call, which are still in the second-level cache."""
_WORTHWHILE_RECORDS = 64
"""Fewer records are summed one by one."""
_KEPT_BYTES = 16 << 10
"""Smaller records are copied: to write each from where it is would cost more."""


ShardBuffers: TypeAlias = "dict[str, PayloadBuffer]"
"""The memory of the large fields of a shard, by name, kept for the next shard; empty to begin with."""


class PayloadBuffer:
    """Page-aligned memory for the payload of one shard, reused for the next: fresh pages cost more than copying."""

    def __init__(self) -> None:
        self._memory = _huge_pages(mmap.PAGESIZE)

    def view(self, nbytes: int) -> memoryview:
        """Room for `nbytes` bytes; what was there before is still in it. Earlier views of this buffer are void."""
        if len(self._memory) < nbytes:
            self._memory = _huge_pages(nbytes)
        return memoryview(self._memory)[:nbytes]


def _huge_pages(nbytes: int) -> mmap.mmap:
    """Fresh memory, in huge pages where the system has them for private memory: it is filled a fifth faster."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@dataclass(frozen=True)
class FieldContent:
    """A field in a shard: its payload as it is stored, and for each record where in it its bytes are, and their crc32c.

    The payload is in pieces, one behind the other, each of whole records or padding: `payload_bytes` in all. There are none any
    more when they have been written.
    """

    pieces: list[bytes | memoryview]
    payload_bytes: int
    offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint32]
    crc32c: NDArray[np.uint32]

    @classmethod
    def packed(
        cls, pieces: list[bytes | memoryview], nbytes: NDArray[np.uint32], crc32c: NDArray[np.uint32]
    ) -> "FieldContent":
        """Of records that lie one behind the other."""
        return cls(pieces, sum(map(len, pieces)), packed_starts(nbytes), nbytes, crc32c)

    def records(self) -> Iterator[memoryview]:
        """The stored bytes of every record, where they lie one behind the other."""
        pieces, left = iter(self.pieces), memoryview(b"")
        for nbytes in self.nbytes.tolist():
            if len(left) < nbytes:
                left = memoryview(next(pieces))
            yield left[:nbytes]
            left = left[nbytes:]


def packed_starts(nbytes: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Where records of these sizes start that lie one behind the other."""
    return np.cumsum(nbytes, dtype=np.uint64) - nbytes


class _Places:
    """The records of a field, one behind the other: those in `room`, those kept elsewhere, the size and the sum of each."""

    def __init__(self, room: memoryview) -> None:
        self._room = room
        self.used_bytes = 0
        """Of the room."""
        self._sizes = array("I")
        self._sums = array("I")
        self._summed_bytes = self._cut_bytes = 0
        """How far the room is summed, and how far it is in pieces."""
        self._pieces: list[bytes | memoryview] = []

    def add(self, nbytes: int) -> None:
        """A record of so many bytes is in the room, behind all that is used of it."""
        self._sizes.append(nbytes)
        self.used_bytes += nbytes
        if self.used_bytes - self._summed_bytes >= _SUMMED_BYTES:
            self._sum_up()

    def extend(self, added: ReadField) -> None:
        """Several records are in the room, with their sums."""
        self._sum_up()
        self._sizes.frombytes(added.nbytes.astype(np.uint32).tobytes())
        self._sums.frombytes(added.crc32c.tobytes())
        self.used_bytes += int(added.nbytes.sum())
        self._summed_bytes = self.used_bytes

    def keep(self, record: bytes) -> None:
        """A record that stays where it is comes next."""
        self._sum_up()
        self._cut()
        self._pieces.append(record)
        self._sizes.append(len(record))
        self._sums.append(crc32c_unlocked(record))

    def content(self) -> FieldContent:
        self._sum_up()
        self._cut()
        return FieldContent.packed(self._pieces, np.array(self._sizes, np.uint32), np.array(self._sums, np.uint32))

    def _sum_up(self) -> None:
        """Sum the records in the room that are not yet: the last of them are still in the processor's cache."""
        sizes = np.array(self._sizes[len(self._sums) :], np.uint32)
        if len(sizes):
            content = np.asarray(self._room[self._summed_bytes : self.used_bytes])
            self._sums.frombytes(record_sums(content, sizes).tobytes())
            self._summed_bytes = self.used_bytes

    def _cut(self) -> None:
        if self.used_bytes > self._cut_bytes:
            self._pieces.append(self._room[self._cut_bytes : self.used_bytes])
            self._cut_bytes = self.used_bytes


def record_sums(content: NDArray[np.uint8], nbytes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The crc32c of records of these sizes that lie one behind the other."""
    if len(nbytes) >= _WORTHWHILE_RECORDS:
        from .write_kernels import sum_records  # numba takes a third of a second to load

        sums = np.empty(len(nbytes), np.uint32)
        sum_records(content, nbytes, sums)
        return sums
    edges = [0, *np.cumsum(nbytes, dtype=np.int64).tolist()]
    return np.array([crc32c(content[start:end]) for start, end in pairwise(edges)], np.uint32)


class PayloadBuilder:
    """Collects the records of a large field in a shard."""

    def __init__(self, name: str, field: Field, buffer: PayloadBuffer, payload_bytes: int) -> None:
        self._name = name
        self._field = field
        self._codec = field.codec
        self._room = buffer.view(payload_bytes)
        self._record = memoryview(bytearray(field.record_bytes if self._codec else 0))
        self._places = _Places(self._room)

    def room(self, nbytes: int) -> memoryview:
        return self._record if self._codec else self.batch_room(nbytes)

    def batch_room(self, nbytes: int) -> memoryview:
        """Room for several records, which is there when they are not compressed."""
        start = self._places.used_bytes
        if start + nbytes > len(self._room):
            raise SourceError(
                f"field {self._name!r} has more bytes than were planned: did the source change meanwhile?"
            )
        return self._room[start : start + nbytes]

    def extend(self, added: ReadField) -> None:
        self._places.extend(added)

    def add(self, nbytes: int) -> None:
        if self._codec:
            self.put(self._record)
        else:
            self._places.add(nbytes)

    def put(self, record: bytes | memoryview) -> None:
        """Add a record of which the bytes are elsewhere."""
        if self._codec:
            record = bytes(self._codec.encode(record, self._field.stored_dtype.itemsize))
        start, nbytes = self._places.used_bytes, len(record)
        grew = self._codec and start + nbytes > len(self._room)  # what cannot be compressed has more bytes than before
        if isinstance(record, bytes) and (nbytes >= _KEPT_BYTES or grew):
            self._places.keep(record)
            return
        self._room[start : start + nbytes] = record
        self._places.add(nbytes)

    def content(self) -> FieldContent:
        content = self._places.content()
        if self._codec:
            return content
        padding = zarr_view.padded_bytes(self._field, content.payload_bytes) - content.payload_bytes
        return replace(content, pieces=[*content.pieces, bytes(padding)], payload_bytes=content.payload_bytes + padding)


class RaggedColumnBuilder:
    """Collects the records of a ragged column."""

    def __init__(self) -> None:
        self._room = memoryview(b"")
        self._records: list[bytes | memoryview] = []
        self._sizes = array("I")

    def room(self, nbytes: int) -> memoryview:
        self._room = memoryview(bytearray(nbytes))
        return self._room

    def batch_room(self, nbytes: int) -> memoryview:
        return self.room(nbytes)

    def extend(self, added: ReadField) -> None:
        self._records.append(self._room[: int(added.nbytes.sum())])
        self._sizes.frombytes(added.nbytes.astype(np.uint32).tobytes())

    def add(self, nbytes: int) -> None:
        self.put(self._room)

    def put(self, record: bytes | memoryview) -> None:
        """Add a record; its memory stays as it is."""
        self._records.append(record)
        self._sizes.append(len(record))

    def content(self) -> FieldContent:
        """All of it, in one piece."""
        payload, sizes = b"".join(self._records), np.array(self._sizes, np.uint32)
        sums = record_sums(np.frombuffer(payload, np.uint8), sizes)
        return FieldContent.packed([payload], sizes, sums)
