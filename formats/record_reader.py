"""Reading one large field of a data set: (shard, offset, nbytes) from its index, `preadv` into one buffer, crc32c of every record."""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checksums import crc32c, crc32c_extend, pread_exactly
from .errors import ChecksumError, SourceError
from .index import RecordIndex
from .schema import Field

_RESERVED_DESCRIPTORS = 256
"""Descriptors left to the rest of the process: libraries, sockets, the user's own files."""


class RecordReader:
    """The records of one large field, by number. Safe to use from many threads.

    field   what a record of it is.
    index   where each record lies; `index.shard` counts `shards`.
    shards  the files, opened when first needed.
    """

    def __init__(self, field: Field, index: RecordIndex, shards: Sequence[Path]) -> None:
        self.field = field
        self.index = index
        self._shards = tuple(shards)
        self._files = _ShardFiles(self._shards)

    def read_records(self, records: Sequence[int], buffer: memoryview | None = None) -> list[NDArray[np.uint8]]:
        """Read the stored bytes of these records of the field, in this order.

        records  record numbers, 0 … len - 1.
        buffer   where to put the bytes, one record after the other; by default fresh memory of the right size.

        Returns one uint8 array a record, each a view into that one buffer. Every record's crc32c is checked.
        Raises ChecksumError or SourceError, naming shard and record.
        """
        numbers = np.asarray(records, dtype=np.int64)
        shards, offsets = self.index.shard[numbers].tolist(), self.index.offset[numbers].tolist()
        sizes, sums = self.index.nbytes[numbers].tolist(), self.index.crc32c[numbers].tolist()
        target = memoryview(np.empty(sum(sizes), np.uint8)) if buffer is None else buffer.cast("B")
        whole = np.frombuffer(target, np.uint8) if len(target) else np.empty(0, np.uint8)
        views: list[NDArray[np.uint8]] = []
        position = 0
        for record, shard, offset, nbytes, expected in zip(numbers.tolist(), shards, offsets, sizes, sums, strict=True):
            end = position + nbytes
            with self._files.descriptor(shard) as descriptor:
                try:
                    got = pread_exactly(descriptor, target[position:end], offset)
                except OSError as error:
                    raise SourceError(f"{self._place(record, shard)} cannot be read: {error.strerror}") from error
            view = whole[position:end]
            if got != nbytes:
                raise SourceError(
                    f"{self._place(record, shard)} is cut off: the shard has fewer bytes than its manifest says"
                )
            if (found := crc32c(view)) != expected:
                raise ChecksumError(
                    f"{self._place(record, shard)} is damaged: its crc32c is {found:08x}, the index says {expected:08x}; "
                    f"run `stagein verify` on it and restore the shard"
                )
            views.append(view)
            position = end
        return views

    def read_ranges(
        self,
        records: NDArray[np.int64],
        start: NDArray[np.int64],
        nbytes: NDArray[np.int64],
        before: NDArray[np.uint32],
        after: NDArray[np.uint32],
        buffer: NDArray[np.uint8],
    ) -> None:
        """Read bytes `start[i]` to `start[i] + nbytes[i]` of the stored record `records[i]` to `buffer`, one range behind the other.

        before, after  the crc32c of the record up to where the range starts and up to where it ends: they are checked.

        Raises ChecksumError or SourceError, naming shard and record.
        """
        shards, offsets = self.index.shard[records].tolist(), self.index.offset[records].astype(np.int64) + start
        ranges = zip(
            records.tolist(), shards, offsets.tolist(), nbytes.tolist(), before.tolist(), after.tolist(), strict=True
        )
        position = 0
        for record, shard, offset, length, sum_before, sum_after in ranges:
            if length == 0:
                continue
            view = buffer[position : position + length]
            with self._files.descriptor(shard) as descriptor:
                try:
                    got = pread_exactly(descriptor, memoryview(view), offset)
                except OSError as error:
                    raise SourceError(f"{self._place(record, shard)} cannot be read: {error.strerror}") from error
            if got != length:
                raise SourceError(
                    f"{self._place(record, shard)} is cut off: the shard has fewer bytes than its manifest says"
                )
            if crc32c_extend(sum_before, view) != sum_after:
                raise ChecksumError(
                    f"{self._place(record, shard)} is damaged: the crc32c of a part of it is not that of its row table; "
                    f"run `stagein verify` on it and restore the shard"
                )
            position += length

    def read_tensors(self, records: Sequence[int], out: NDArray[np.generic] | None = None) -> NDArray[np.generic]:
        """Read and decode these records of a `tensor` field, in this order: [len(records), *shape].

        out  where to put them, C-contiguous with that shape and the field's dtype; by default a fresh array.

        Uncompressed records are read straight into it. Raises ChecksumError or SourceError, naming shard and record.
        """
        if out is None:
            out = np.empty((len(records), *self.field.fixed_shape), self.field.array_dtype)
        rows = out.reshape(len(records), -1).view(np.uint8)
        if self.field.codec is None:
            self.read_records(records, memoryview(rows.reshape(-1)))
            return out
        for row, stored in zip(rows, self.read_records(records), strict=True):
            self.field.codec.decode_into(stored, row)
        return out

    def decode(self, stored: NDArray[np.uint8]) -> NDArray[np.generic]:
        """One record of a `tensor` field from its stored bytes; a view of them when they are not compressed."""
        content = stored
        if self.field.codec is not None:
            content = np.empty(self.field.record_bytes, np.uint8)
            self.field.codec.decode_into(stored, content)
        return content.view(self.field.array_dtype).reshape(self.field.fixed_shape)

    def close(self) -> None:
        """Close the shards; nothing can be read afterwards."""
        self._files.close()

    def _place(self, record: int, shard: int) -> str:
        return f"record {record} in {self._shards[shard]}"


class _ShardFiles:
    """Open shards, at most as many as the process may have; the one unused for longest is closed first."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._limit = _allowed_descriptors()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._users: dict[int, int] = {}

    @contextmanager
    def descriptor(self, shard: int) -> Iterator[int]:
        """A file descriptor of shard number `shard`, not closed while in use. Raises SourceError when it cannot be opened."""
        with self._lock:
            descriptor = self._open.get(shard)
            if descriptor is None:
                self._make_room()
                descriptor = self._open[shard] = self._open_shard(shard)
            self._open.move_to_end(shard)
            self._users[shard] = self._users.get(shard, 0) + 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[shard] -= 1

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _open_shard(self, shard: int) -> int:
        path = self._paths[shard]
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else error.strerror
            raise SourceError(
                f"shard {path} cannot be opened ({reason}): restore it, or convert or stage the data set again"
            ) from None

    def _make_room(self) -> None:
        if len(self._open) < self._limit:
            return
        for shard in self._open:
            if not self._users.get(shard):
                os.close(self._open.pop(shard))
                return


def _allowed_descriptors() -> int:
    """Raise the soft limit of open files to the hard one (1,024 is common, a data set can have 10,000 shards)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    return max(1, limit - _RESERVED_DESCRIPTORS)
