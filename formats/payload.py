"""The bytes of a field in a shard, one record behind the other, until they are written, and where each record is.

Where the file of the shard is there already, they are written as they come, and there are never many in memory. Else they are
collected: large records that come as `bytes` stay where they are, all others are copied, or read, to memory that is used for one
shard after the other.
"""

import mmap
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import zarr_view
from .checksums import crc32c, record_sums
from .errors import SourceError
from .huge_pages import huge_pages
from .payload_file import PayloadFile
from .schema import Field

_STREAMED_BYTES = 1 << 20
"""Written at a time, at least, where payloads are written as they come: it is in the second-level cache."""
_KEPT_BYTES = 16 << 10
"""Smaller records are copied: to write each from where it is would cost more."""


ShardBuffers: TypeAlias = "dict[str, PayloadBuffer]"
"""The memory of the large fields of a shard, by name, kept for the next shard; empty to begin with."""


class PayloadBuffer:
    """Page-aligned memory for the payload of one shard, reused for the next: fresh pages cost more than copying."""

    def __init__(self) -> None:
        self._memory = huge_pages(mmap.PAGESIZE)

    def view(self, nbytes: int) -> memoryview:
        """Room for `nbytes` bytes; what was there before is still in it. Earlier views of this buffer are void."""
        if len(self._memory) < nbytes:
            self._memory = huge_pages(nbytes)
        return memoryview(self._memory)[:nbytes]


@dataclass(frozen=True)
class FieldContent:
    """A field in a shard: its payload as it is stored, and for each record where in it its bytes are, and their crc32c.

    The payload is in pieces, one behind the other, each of whole records or padding: `payload_bytes` in all. There are none any
    more when they have been written. What is not compressed is summed then: until then `crc32c` is zeros.
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


class PayloadCollector:
    """Collects the records of a large field in a shard."""

    def __init__(self, name: str, field: Field, buffer: PayloadBuffer, payload_bytes: int) -> None:
        self._name = name
        self._field = field
        self._codec = field.codec
        self._room = buffer.view(payload_bytes)
        self._record = memoryview(bytearray(field.record_bytes if self._codec else 0))
        self._used_bytes = self._cut_bytes = 0
        """How far the room is used, and how far it is in pieces."""
        self._pieces: list[bytes | memoryview] = []
        self._sizes = array("I")

    def room(self, nbytes: int) -> memoryview:
        return self._record if self._codec else self.batch_room(nbytes)

    def batch_room(self, nbytes: int) -> memoryview:
        """Room for several records, which is there when they are not compressed."""
        start = self._used_bytes
        if start + nbytes > len(self._room):
            raise _more_than_planned(self._name)
        return self._room[start : start + nbytes]

    def extend(self, nbytes: NDArray[np.int64]) -> None:
        """Records of these sizes are in the room."""
        self._sizes.frombytes(nbytes.astype(np.uint32).tobytes())
        self._used_bytes += int(nbytes.sum())

    def add(self, nbytes: int) -> None:
        """A record of this size is in the room."""
        if self._codec:
            self.put(self._record)
        else:
            self._sizes.append(nbytes)
            self._used_bytes += nbytes

    def put(self, record: bytes | memoryview) -> None:
        """Add a record of which the bytes are elsewhere."""
        if self._codec:
            record = bytes(self._codec.encode(record, self._field.stored_dtype.itemsize))
        start, nbytes = self._used_bytes, len(record)
        self._sizes.append(nbytes)
        grew = self._codec and start + nbytes > len(self._room)  # what cannot be compressed has more bytes than before
        if isinstance(record, bytes) and (nbytes >= _KEPT_BYTES or grew):
            self._cut()
            self._pieces.append(record)
        else:
            self._room[start : start + nbytes] = record
            self._used_bytes += nbytes

    def content(self) -> FieldContent:
        self._cut()
        sizes = np.array(self._sizes, np.uint32)
        content = FieldContent.packed(self._pieces, sizes, np.zeros(len(sizes), np.uint32))
        if self._codec:
            return replace(content, crc32c=np.array([crc32c(record) for record in content.records()], np.uint32))
        padding = _padding(self._field, content.payload_bytes)
        return replace(content, pieces=[*content.pieces, padding], payload_bytes=content.payload_bytes + len(padding))

    def _cut(self) -> None:
        if self._used_bytes > self._cut_bytes:
            self._pieces.append(self._room[self._cut_bytes : self._used_bytes])
            self._cut_bytes = self._used_bytes


class PayloadStream:
    """Writes the records of a large field in a shard as they come; they are not compressed."""

    def __init__(self, name: str, field: Field, buffer: PayloadBuffer, payload_bytes: int, file: "PayloadFile") -> None:
        self._name = name
        self._field = field
        self._buffer = buffer
        self._file = file
        self._left_bytes = payload_bytes
        """What may come and is not written yet."""
        self._room = buffer.view(_STREAMED_BYTES)
        self._used_bytes = self._asked_bytes = 0
        """How far the room is used, and how much was asked for behind that."""
        self._sizes = array("I")
        self._sums: list[NDArray[np.uint32]] = []
        self._summed = 0
        """How many records are written."""

    def room(self, nbytes: int) -> memoryview:
        return self.batch_room(nbytes)

    def batch_room(self, nbytes: int) -> memoryview:
        """Room for several records."""
        if self._used_bytes + nbytes > self._left_bytes:
            raise _more_than_planned(self._name)
        if self._used_bytes + nbytes > len(self._room):
            asked = bytes(self._room[self._used_bytes : self._used_bytes + self._asked_bytes])
            self._write()
            self._room = self._buffer.view(max(nbytes, _STREAMED_BYTES))
            self._room[: len(asked)] = asked  # asked for again, it is as if it were the same place
        self._asked_bytes = nbytes
        return self._room[self._used_bytes : self._used_bytes + nbytes]

    def extend(self, nbytes: NDArray[np.int64]) -> None:
        """Records of these sizes are in the room."""
        self._sizes.frombytes(nbytes.astype(np.uint32).tobytes())
        self._use(int(nbytes.sum()))

    def add(self, nbytes: int) -> None:
        """A record of this size is in the room."""
        self._sizes.append(nbytes)
        self._use(nbytes)

    def put(self, record: bytes | memoryview) -> None:
        """Add a record of which the bytes are elsewhere."""
        self.room(len(record))[:] = record
        self.add(len(record))

    def content(self) -> FieldContent:
        self._write()
        sizes = np.array(self._sizes, np.uint32)
        content = FieldContent.packed([], sizes, np.concatenate([np.empty(0, np.uint32), *self._sums]))
        nbytes = int(sizes.sum(dtype=np.int64))
        padding = _padding(self._field, nbytes)
        self._file.append([padding], np.empty(0, np.uint32))
        return replace(content, payload_bytes=nbytes + len(padding))

    def _use(self, nbytes: int) -> None:
        self._used_bytes += nbytes
        self._asked_bytes = 0
        if self._used_bytes >= _STREAMED_BYTES:
            self._write()

    def _write(self) -> None:
        """Write what is in the room."""
        sizes = np.array(self._sizes[self._summed :], np.uint32)
        self._sums.append(self._file.append([self._room[: self._used_bytes]], sizes))
        self._left_bytes -= self._used_bytes
        self._summed, self._used_bytes = len(self._sizes), 0


def _more_than_planned(name: str) -> SourceError:
    return SourceError(f"field {name!r} has more bytes than were planned: did the source change meanwhile?")


def _padding(field: Field, nbytes: int) -> bytes:
    return bytes(zarr_view.padded_bytes(field, nbytes) - nbytes)


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

    def extend(self, nbytes: NDArray[np.int64]) -> None:
        self._records.append(self._room[: int(nbytes.sum())])
        self._sizes.frombytes(nbytes.astype(np.uint32).tobytes())

    def add(self, nbytes: int) -> None:
        self.put(self._room)

    def put(self, record: bytes | memoryview) -> None:
        """Add a record; its memory stays as it is."""
        self._records.append(record)
        self._sizes.append(len(record))

    def content(self) -> FieldContent:
        """All of it, in one piece."""
        payload, sizes = b"".join(self._records), np.array(self._sizes, np.uint32)
        return FieldContent.packed([payload], sizes, record_sums([payload], sizes))
