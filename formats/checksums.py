"""The sums that guard every byte: crc32c a record (when it is read), xxh3_128 a chunk of a file (when it is staged)."""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from .native_code import NativeKernel

_sum_records = NativeKernel(f"{__package__}.write_kernels", "sum_records")

Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[np.uint8]

CHUNK_SUM_BYTES = 16
_WORTHWHILE_RECORDS = 4096
"""Fewer records are summed one by one, before the machine code of a kernel is in memory."""

PASSING_TROUBLE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""A server of a parallel file system that fails over answers reads with these for a while."""
RETRY_PAUSES_SECONDS = (0.1, 0.4, 1.6, 6.4)


def crc32c(data: Buffer) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of `data`; the sum that Zarr's `crc32c` codec and iSCSI use."""
    # The library takes no writable memoryview; an array over the same memory it does take.
    return int(google_crc32c.value(data if isinstance(data, bytes) else np.asarray(data)))


def record_sums(pieces: Sequence[Buffer], nbytes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The crc32c of records of these sizes that lie one behind the other, each whole in one of the pieces."""
    ends, sums = np.cumsum(nbytes, dtype=np.int64), np.zeros(len(nbytes), np.uint32)
    first = start = 0
    for piece in pieces:
        stop = int(np.searchsorted(ends, start + len(piece), side="right"))
        sums[first:stop] = _sums_in(np.frombuffer(piece, np.uint8), nbytes[first:stop])
        first, start = stop, start + len(piece)
    return sums


def _sums_in(content: NDArray[np.uint8], nbytes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    sums = np.empty(len(nbytes), np.uint32)
    if len(nbytes) >= _WORTHWHILE_RECORDS and not _sum_records.is_awaited(content, nbytes, sums):
        _sum_records(content, nbytes, sums)
        return sums
    edges = [0, *np.cumsum(nbytes, dtype=np.int64).tolist()]
    return np.array([crc32c(content[start:end]) for start, end in pairwise(edges)], np.uint32)


def crc32c_extend(before: int, data: Buffer) -> int:
    """The crc32c of `data` behind bytes whose crc32c is `before`."""
    return int(google_crc32c.extend(before, data if isinstance(data, bytes) else np.asarray(data)))


def chunk_sum(data: Buffer) -> bytes:
    """The 16 bytes of xxh3_128 of one chunk of a file, big-endian as the xxHash specification prints it."""
    return xxhash.xxh3_128_digest(data)


def chunk_sums(pieces: Iterable[Buffer], chunk_bytes: int) -> Iterator[bytes]:
    """Sums of each `chunk_bytes` of the concatenation of `pieces`; the last chunk may be short, an empty file has none."""
    hasher, filled = xxhash.xxh3_128(), 0
    for piece in pieces:
        view = memoryview(piece)
        while len(view):
            part = view[: chunk_bytes - filled]
            hasher.update(part)
            filled += len(part)
            view = view[len(part) :]
            if filled == chunk_bytes:
                yield hasher.digest()
                hasher, filled = xxhash.xxh3_128(), 0
    if filled:
        yield hasher.digest()


def pread_exactly(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; returns the bytes read, fewer than asked only at the end of the file."""
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def pwrite_all(descriptor: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at `offset`, however many calls it takes."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
