"""Reading one large field of a data set: (shard, offset, nbytes) from its index, many records by one call off the GIL.

Bytes go from the page cache straight to where they are wanted, by `pread` or out of a memory map (`read_kernels` says when).
O_DIRECT is not used: asking the kernel for a whole batch at once is 1.4 times as fast, from a cold disk, as reading around the
page cache one record at a time.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from .checksums import PASSING_TROUBLE, RETRY_PAUSES_SECONDS, crc32c, pread_exactly
from .codecs import WORK_BYTES
from .errors import ChecksumError, SourceError, UsageError
from .helper_threads import HelperThreads
from .index import RecordIndex
from .kernel_crew import KernelCrew
from .located import LocatedRecords
from .native_code import NativeKernel
from .plain_reads import read_and_decode_plainly, read_plainly
from .read_troubles import CUT_OFF, DAMAGED, UNDECODABLE
from .read_turns import new_jobs, new_turns
from .schema import Field
from .scratch import Scratch
from .shard_files import OpenShards, ShardFiles

RecordNumbers: TypeAlias = Sequence[int] | NDArray[np.integer]
_Read: TypeAlias = Callable[[slice, OpenShards, int], tuple[int, int]]
"""Reads some of the records, so many bytes at a time; returns how many are there, from the first on, and 0 or what is wrong with the next."""
_read_records = NativeKernel(f"{__package__}.read_kernels", "read_records")
_read_and_decode = NativeKernel(f"{__package__}.read_kernels", "read_and_decode")
_are_in_memory = NativeKernel(f"{__package__}.read_kernels", "are_in_memory")
_COUNTER_WORDS = 4
_ALIGNMENT_BYTES = 4096
_NO_SUMS = np.empty(0, np.uint32)
_SHARES_OF_A_THREAD = 8
"""A thread takes so many records at a time that its part is done in about so many steps: none is left alone with the rest."""


@dataclass(frozen=True)
class _Sums:
    """The crc32c of records up to the start of what is read of each (nothing: it is read from its first byte), and up to the
    end (nothing: it is not checked)."""

    before: NDArray[np.uint32]
    after: NDArray[np.uint32]


@dataclass(frozen=True)
class PackedRecords(Sequence[NDArray[np.uint8]]):
    """Bytes of records, one after the other in one buffer: entry i is the `nbytes[i]` bytes from `start[i]` on, a view."""

    buffer: NDArray[np.uint8]
    start: NDArray[np.int64]
    nbytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, number: int) -> NDArray[np.uint8]: ...

    @overload
    def __getitem__(self, number: slice) -> "PackedRecords": ...

    def __getitem__(self, number: int | slice) -> "NDArray[np.uint8] | PackedRecords":
        if isinstance(number, slice):
            return PackedRecords(self.buffer, self.start[number], self.nbytes[number])
        start = self.start[number]
        return self.buffer[start : start + self.nbytes[number]]

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        for start, nbytes in zip(self.start.tolist(), self.nbytes.tolist(), strict=True):
            yield self.buffer[start : start + nbytes]


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
        self._files = ShardFiles(shards)
        self._helpers = HelperThreads()
        self._crew = KernelCrew()
        self._scratch = Scratch()

    def read_records(self, records: RecordNumbers, buffer: memoryview | None = None) -> list[NDArray[np.uint8]]:
        """The stored bytes of these records, in this order, as a list of views into one buffer; see `read_packed`."""
        return list(self.read_packed(records, buffer))

    def read_packed(
        self, records: RecordNumbers, buffer: memoryview | None = None, *, check: bool = True
    ) -> PackedRecords:
        """Read the stored bytes of these records, in this order, one after the other into one buffer.

        records  record numbers, 0 … len - 1; the same one may come several times.
        buffer   where to put the bytes; by default fresh memory of the right size.
        check    compare the crc32c of every record; False only for bytes that were verified lately.

        Raises ChecksumError or SourceError, naming shard and record; UsageError for a buffer that is too small.
        """
        numbers = np.asarray(records, np.int64)
        sums = _Sums(_NO_SUMS, self.index.crc32c[numbers] if check else _NO_SUMS)
        return self._read(numbers, self.index.offset[numbers], self.index.nbytes[numbers], buffer, sums, threads=1)

    def locate(self, records: RecordNumbers) -> LocatedRecords | None:
        """Where these records lie, for kernels that read them; None where they would have to wait for it: for a disk or a server, for
        descriptors, or for a kernel of ours."""
        numbers = np.asarray(records, np.int64)
        shards = self.index.shard[numbers]
        with ExitStack() as stack:
            opened = stack.enter_context(self._files.use(shards))
            descriptors = opened.descriptor_of_each()
            offset, nbytes = self.index.offset[numbers].view(np.int64), self.index.nbytes[numbers].astype(np.int64)
            asked = opened.numbers, opened.descriptors, opened.maps, offset, nbytes, np.zeros(3, np.int64)
            are_in_memory = _are_in_memory.call_with(*asked)
            if not self._files.are_all_open or are_in_memory is None or not are_in_memory():
                return None
            piece_bytes = int(self._files.piece_bytes[shards[0]]) if len(shards) else 1
            places = numbers, descriptors, offset, nbytes, self.index.crc32c[numbers], piece_bytes
            return LocatedRecords(*places, self, stack.pop_all())
        return None

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

        A record may come several times. Raises ChecksumError or SourceError, naming shard and record; UsageError for a range
        that is not all in its record, or a buffer that is too small.
        """
        outside = (start < 0) | (nbytes < 0) | (start + nbytes > self.index.nbytes[records])
        if outside.any():
            first = int(np.argmax(outside))
            raise UsageError(
                f"bytes {start[first]} to {start[first] + nbytes[first]} are not all in {self._place(records[first])}, "
                f"which has {self.index.nbytes[records[first]]}: its row table does not belong to it"
            )
        offset = self.index.offset[records] + start.view(np.uint64)
        self._read(records, offset, nbytes, buffer, _Sums(before, np.where(nbytes == 0, before, after)), threads=1)

    def read_tensors(
        self,
        records: RecordNumbers,
        out: NDArray[np.generic] | None = None,
        *,
        threads: int = 1,
        decode_nanoseconds: NDArray[np.int64] | None = None,
    ) -> NDArray[np.generic]:
        """Read and decode these records of a `tensor` field, in this order: [len(records), *shape].

        out      where to put them, C-contiguous with that shape and the field's dtype; by default a fresh array.
        threads  that share the work, the caller's among them.
        decode_nanoseconds  [1], is added the time that all of them spent on decompressing.

        Uncompressed records are read straight into it. Raises ChecksumError or SourceError, naming shard and record;
        UsageError for an array that does not fit.
        """
        threads = max(1, min(threads, len(records)))
        if threads > 1 and self.field.codec is not None:
            self._crew.wake(threads - 1)
        numbers = np.asarray(records, np.int64)
        if out is None:
            out = np.empty((len(numbers), *self.field.fixed_shape), self.field.array_dtype)
        if not out.flags.c_contiguous or out.nbytes != len(numbers) * self.field.record_bytes:
            raise UsageError(
                f"{len(numbers)} records of {self.field.record_bytes} bytes need an array in C order of as many bytes, not "
                f"{out.dtype} {out.shape} with strides {out.strides}"
            )
        rows = out.reshape(-1).view(np.uint8).reshape(len(numbers), self.field.record_bytes)
        offset, nbytes, sums = self.index.offset[numbers], self.index.nbytes[numbers], self.index.crc32c[numbers]
        if self.field.codec is None:
            self._read(numbers, offset, nbytes, rows.reshape(-1), _Sums(_NO_SUMS, sums), threads)
        else:
            spent = np.zeros(1, np.int64) if decode_nanoseconds is None else decode_nanoseconds
            self._read_and_decode(numbers, offset, nbytes, sums, rows, threads, spent)
        return out

    def decode(self, stored: NDArray[np.uint8]) -> NDArray[np.generic]:
        """One record of a `tensor` field from its stored bytes; a view of them when they are not compressed."""
        content = stored
        if self.field.codec is not None:
            content = np.empty(self.field.record_bytes, np.uint8)
            self.field.codec.decode_into(stored, content)
        return content.view(self.field.array_dtype).reshape(self.field.fixed_shape)

    def largest_read_bytes(self) -> int:
        """The most bytes that one read asks for: more where the file system is shared.

        Raises SourceError when the first shard cannot be opened.
        """
        with self._files.use(np.zeros(1, np.uint32)):
            return int(self._files.piece_bytes[0])

    def close(self) -> None:
        """Close the shards and end the threads; nothing can be read afterwards."""
        self._helpers.close()
        self._crew.close()
        self._files.close()

    def _read(
        self,
        numbers: NDArray[np.int64],
        offset: NDArray[np.uint64],
        sizes: NDArray[np.integer],
        buffer: memoryview | NDArray[np.uint8] | None,
        sums: _Sums,
        threads: int,
    ) -> PackedRecords:
        nbytes = sizes.astype(np.int64)
        ends = nbytes.cumsum()
        total = int(ends[-1]) if len(ends) else 0
        packed = np.empty(total, np.uint8) if buffer is None else _as_array(buffer)
        if len(packed) < total:
            raise UsageError(f"a buffer of {len(packed)} bytes cannot take records of {total} bytes: make it larger")
        start, places = ends - nbytes, offset.view(np.int64)
        share = len(numbers) if threads == 1 else 1 + len(numbers) // (threads * _SHARES_OF_A_THREAD)

        def read(some: slice, shards: OpenShards, piece_bytes: int) -> tuple[int, int]:
            before, after, counter = sums.before[some], sums.after[some], np.zeros(_COUNTER_WORDS, np.int64)
            records = places[some], nbytes[some], start[some], before, after
            call = _read_records.call_with(counter, share, piece_bytes, *shards, packed, *records)
            if call is None:
                targets = list(PackedRecords(packed, start[some], nbytes[some]))
                turns, descriptors = iter(range(len(targets))), shards.descriptor_of_each()
                call = functools.partial(read_plainly, turns, descriptors, places[some], targets, before, after)
            return self._together(call, threads)

        self._read_all(numbers, read)
        return PackedRecords(packed, start, nbytes)

    def _read_and_decode(
        self,
        numbers: NDArray[np.int64],
        offset: NDArray[np.uint64],
        sizes: NDArray[np.integer],
        sums: NDArray[np.uint32],
        rows: NDArray[np.uint8],
        threads: int,
        decode_nanoseconds: NDArray[np.int64],
    ) -> None:
        """Fill `rows`, [records, bytes of a record], with these records as they were before compression."""
        codec, places, nbytes = self.field.codec, offset.view(np.int64), sizes.astype(np.int64)
        assert codec is not None
        room = -(-(WORK_BYTES + int(nbytes.max(initial=0))) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        scratch = self._scratch.of(threads * room).reshape(threads, room)

        def read(some: slice, shards: OpenShards, piece_bytes: int) -> tuple[int, int]:
            records = places[some], nbytes[some], sums[some]
            shared = new_turns(), new_jobs(threads), piece_bytes, *shards, *records, codec.kernel_number
            arguments = *shared, scratch, rows[some], decode_nanoseconds
            if threads > 1 and (done := self._crew.call(_read_and_decode, arguments, threads - 1)) is not None:
                return done[0], done[1]
            call = _read_and_decode.call_with(*arguments)
            if call is None:
                left, descriptors = iter(range(len(records[0]))), shards.descriptor_of_each()
                plainly = left, descriptors, *records, codec, rows[some], decode_nanoseconds
                return self._together(functools.partial(read_and_decode_plainly, *plainly), threads)
            self._helpers.begin(call, threads - 1)
            return call()  # type: ignore[no-any-return]

        self._read_all(numbers, read)

    def _together(self, read: Callable[[], tuple[int, int]], threads: int) -> tuple[int, int]:
        """What `read` returns, called by so many threads at once, which share the records out."""
        return read() if threads == 1 else min(self._helpers.run(read, threads))

    def _read_all(self, numbers: NDArray[np.int64], read: "_Read") -> None:
        """Read entry after entry of `numbers`, past what a retry can heal."""
        shards = self.index.shard[numbers]
        done, troubled, attempts = 0, -1, 0
        while done < len(numbers):
            with self._files.use(shards[done:]) as opened:
                some = slice(done, done + len(opened.numbers))
                piece_bytes = int(self._files.piece_bytes[shards[done]])
                count, trouble = read(some, opened, piece_bytes)
            done += count
            if trouble == 0:
                continue
            attempts = attempts + 1 if done == troubled else 0
            troubled = done
            self._heal_or_raise(int(numbers[done]), trouble, attempts)

    def _heal_or_raise(self, record: int, trouble: int, attempts: int) -> None:
        """Do what may make the next attempt succeed, or raise what is wrong with this record."""
        place, shard = self._place(record), int(self.index.shard[record])
        if trouble == CUT_OFF:
            raise SourceError(f"{place} is cut off: the shard has fewer bytes than its manifest says")
        if trouble == UNDECODABLE:
            self._raise_undecodable(record)
        if trouble == DAMAGED:
            found, expected = self._sum_from_disk(record), int(self.index.crc32c[record])
            if found != expected:
                raise ChecksumError(
                    f"{place} is damaged: its crc32c is {found:08x}, the index says {expected:08x}; run `stagein verify` on it "
                    f"and restore the shard"
                )
            if attempts > 0:
                raise ChecksumError(
                    f"{place} is whole, but the crc32c of a part of it is not that of its row table (or the memory of this "
                    f"machine is at fault): run `stagein verify` on it"
                )
            return
        if trouble not in PASSING_TROUBLE or attempts == len(RETRY_PAUSES_SECONDS):
            raise SourceError(f"{place} cannot be read: {os.strerror(trouble)}")
        time.sleep(RETRY_PAUSES_SECONDS[attempts])
        self._files.forget(shard)

    def _sum_from_disk(self, record: int) -> int:
        """The crc32c of a record, read from the disk itself: memory can be damaged too. What is mapped stays in memory."""
        shard = int(self.index.shard[record])
        self._files.forget(shard)
        content = np.empty(self.index.nbytes[record], np.uint8)
        offset = int(self.index.offset[record])
        with self._files.use(self.index.shard[record : record + 1]) as opened:
            descriptor = int(opened.descriptors[shard])
            os.posix_fadvise(descriptor, offset, len(content), os.POSIX_FADV_DONTNEED)
            pread_exactly(descriptor, memoryview(content), offset)
        return crc32c(content)

    def _raise_undecodable(self, record: int) -> None:
        (stored,) = self.read_packed([record])
        try:
            self.decode(stored)
        except ChecksumError as error:
            raise ChecksumError(f"{self._place(record)}: {error}") from None
        raise ChecksumError(f"{self._place(record)} cannot be decoded: it is damaged")

    def _place(self, record: int | np.integer) -> str:
        return f"record {record} in {self._shards[self.index.shard[record]]}"


def _as_array(buffer: memoryview | NDArray[np.uint8]) -> NDArray[np.uint8]:
    if isinstance(buffer, np.ndarray):
        return buffer
    return np.frombuffer(buffer.cast("B"), np.uint8) if buffer.nbytes else np.empty(0, np.uint8)
