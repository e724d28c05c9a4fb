"""Reading and decoding of many records by one call off the GIL: pread, crc32c and decompression, record by record.

Each record is summed and decompressed right after it was read, while it is in the processor's cache. A kernel stops at the
first record that is not right and says which and why; what to do about it is decided in `record_reader`.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from .blosc_kernel import MOST_BLOCK_BYTES, decode_blosc
from .codecs import LZ4, ZSTD
from .native import fetch_add, kernel, signed
from .native_calls import (
    clock_gettime,
    crc32c_extend,
    errno_location,
    lz4_decompress,
    posix_fadvise,
    pread,
    preadv2,
    zstd_decompress,
)

CUT_OFF, DAMAGED, UNDECODABLE = -1, -2, -3
"""What is wrong with a record, where no error number (above 0) says it: the file ends before it, its crc32c differs, it
is not what the codec makes of a record."""

WORK_BYTES = MOST_BLOCK_BYTES
"""Of memory that a thread needs to decode, of whatever codec."""

_PROBES = 8
_AHEAD_BYTES = 128 << 10
"""A hint of more bytes is cut to the readahead of the device, which may be as little as this."""

_RWF_NOWAIT = 8
_FADV_WILLNEED = 3
_CLOCK_MONOTONIC = 1
_EINTR, _EAGAIN = errno.EINTR, errno.EAGAIN


@kernel
def read_ahead_where_cold(
    descriptors: NDArray[np.int32], offsets: NDArray[np.int64], nbytes: NDArray[np.int64]
) -> None:
    """Let the kernel fetch all these ranges at once, should they not be in memory: a disk serves many requests in the time of
    one. A few ranges are probed, so that this costs nothing where everything is in memory, or cannot be asked."""
    count = len(offsets)
    if count == 0:
        return
    vector = np.ones(3, np.int64)  # the address of its last element, and one byte
    vector[0] = vector.ctypes.data + 16
    step = max(1, count // _PROBES)
    for number in range(0, count, step):
        last_byte = offsets[number] + max(nbytes[number] - 1, 0)
        if preadv2(descriptors[number], vector.ctypes.data, 1, last_byte, _RWF_NOWAIT) >= 0:
            continue
        if errno_location()[0] != _EAGAIN:
            return
        for cold in range(count):
            for ahead in range(0, nbytes[cold], _AHEAD_BYTES):
                length = min(_AHEAD_BYTES, nbytes[cold] - ahead)
                posix_fadvise(descriptors[cold], offsets[cold] + ahead, length, _FADV_WILLNEED)
        return


@kernel
def read_exactly(descriptor: int, target: int, nbytes: int, offset: int) -> int:
    """Fill `nbytes` at the address `target`; returns 0, CUT_OFF or an error number."""
    done = 0
    while done < nbytes:
        got = pread(descriptor, target + done, nbytes - done, offset + done)
        if got > 0:
            done += got
        elif got == 0:
            return CUT_OFF
        elif errno_location()[0] != _EINTR:
            return signed(errno_location()[0])
    return 0


@kernel
def read_record(
    descriptor: int,
    target: int,
    nbytes: int,
    offset: int,
    check: bool,
    before: np.uint32,
    after: np.uint32,
    piece_bytes: int,
) -> int:
    """Read a record to the address `target`, and compare the crc32c that continues `before` with `after`; returns 0 or what is
    wrong."""
    if not check:
        return read_exactly(descriptor, target, nbytes, offset)
    trouble, found = read_and_sum(descriptor, target, nbytes, offset, before, piece_bytes)
    return DAMAGED if trouble == 0 and found != after else trouble


@kernel
def read_and_sum(
    descriptor: int, target: int, nbytes: int, offset: int, before: np.uint32, piece_bytes: int
) -> tuple[int, np.uint32]:
    """Read as `read_exactly` does, piece by piece, each summed while it is in the caches; returns that and the crc32c that continues
    `before`."""
    found = before
    for start in range(0, nbytes, piece_bytes):
        length = min(piece_bytes, nbytes - start)
        trouble = read_exactly(descriptor, target + start, length, offset + start)
        if trouble != 0:
            return trouble, found
        found = crc32c_extend(found, target + start, length)
    return 0, found


@kernel
def read_records(
    counter: NDArray[np.int64],
    share: int,
    piece_bytes: int,
    descriptors: NDArray[np.int32],
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    targets: NDArray[np.int64],
    before: NDArray[np.uint32],
    after: NDArray[np.uint32],
) -> tuple[int, int]:
    """Read records, or ranges of them, to the addresses `targets`; several threads with one `counter` share them out.

    counter        [1], the first record that no thread has taken yet; `share` of them are taken at a time.
    piece_bytes    to read at a time, before it is summed.
    before, after  the crc32c of each record up to where its range starts, and up to where it ends. Nothing for `before`: they
                   start with the record; nothing for `after`: they are not checked.

    Neighbours on disk that are neighbours in memory are read together. Returns how many are there, from the first on, should
    other threads do theirs, and 0 or what is wrong with the next.
    """
    count, check = len(offsets), len(after) > 0
    while True:
        first = fetch_add(counter, share)
        if first == 0:
            read_ahead_where_cold(descriptors, offsets, nbytes)
        stop = min(first + share, count)
        if first >= stop:
            return count, 0
        while first < stop:
            end, run_bytes = first + 1, nbytes[first]
            while (
                end < stop
                and run_bytes + nbytes[end] <= piece_bytes
                and descriptors[end] == descriptors[first]
                and offsets[end] == offsets[first] + run_bytes
                and targets[end] == targets[first] + run_bytes
            ):
                run_bytes += nbytes[end]
                end += 1
            if end == first + 1:
                seed = before[first] if len(before) else np.uint32(0)
                expected = after[first] if check else np.uint32(0)
                trouble = read_record(
                    descriptors[first], targets[first], run_bytes, offsets[first], check, seed, expected, piece_bytes
                )
            else:
                trouble = read_exactly(descriptors[first], targets[first], run_bytes, offsets[first])
            if trouble != 0:
                fetch_add(counter, count)
                return first, trouble
            if check and end > first + 1:
                for number in range(first, end):
                    seed = before[number] if len(before) else np.uint32(0)
                    if crc32c_extend(seed, targets[number], nbytes[number]) != after[number]:
                        fetch_add(counter, count)
                        return number, DAMAGED
            first = end


@kernel
def read_and_decode(
    counter: NDArray[np.int64],
    piece_bytes: int,
    descriptors: NDArray[np.int32],
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    sums: NDArray[np.uint32],
    codec: int,
    scratch: NDArray[np.uint8],
    rows: NDArray[np.uint8],
    decode_nanoseconds: NDArray[np.int64],
) -> tuple[int, int]:
    """Read records and decompress each into its row of `rows`, [records, bytes of a record]; several threads with one
    `counter`, [1], share them out. Returns as `read_records` does.

    piece_bytes  to read at a time, before it is summed.
    scratch      this thread's memory: WORK_BYTES, and behind them room for the stored bytes of a record.
    decode_nanoseconds  [1], is added what decompressing took.
    """
    count, work, stored = len(offsets), scratch[:WORK_BYTES], scratch[WORK_BYTES:]
    clock, elapsed = np.empty(2, np.int64), 0
    source = stored.ctypes.data
    while True:
        number = fetch_add(counter, 1)
        if number == 0:
            read_ahead_where_cold(descriptors, offsets, nbytes)
        if number >= count:
            fetch_add(decode_nanoseconds, elapsed)
            return count, 0
        trouble = read_record(
            descriptors[number], source, nbytes[number], offsets[number], True, np.uint32(0), sums[number], piece_bytes
        )
        began = nanoseconds(clock)
        if trouble == 0 and not decode_record(codec, stored[: nbytes[number]], rows[number], work):
            trouble = UNDECODABLE
        elapsed += nanoseconds(clock) - began
        if trouble != 0:
            fetch_add(counter, count)
            return number, trouble


@kernel
def nanoseconds(clock: NDArray[np.int64]) -> int:
    """The time since some moment; `clock`, [2], is used for it."""
    clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
    return clock[0] * 1_000_000_000 + clock[1]  # type: ignore[no-any-return]


@kernel
def decode_record(codec: int, stored: NDArray[np.uint8], record: NDArray[np.uint8], planes: NDArray[np.uint8]) -> bool:
    """Fill `record` with what `stored` stands for; False when that is not a record of this size, or not all of `stored`.

    planes  memory to work in, WORK_BYTES.
    """
    source, target = stored.ctypes.data, record.ctypes.data
    if codec == LZ4:
        return decode_lz4(stored, record)
    if codec == ZSTD:
        return signed(zstd_decompress(target, len(record), source, len(stored))) == len(record)
    return decode_blosc(stored, record, planes)


@kernel
def decode_lz4(stored: NDArray[np.uint8], record: NDArray[np.uint8]) -> bool:
    """HDF5 filter 32004: u64be size, u32be block size, then for each block u32be size and an LZ4 block."""
    if len(stored) < 12 or big_endian_32(stored, 0) != 0 or big_endian_32(stored, 4) != len(record):
        return False
    block_bytes = big_endian_32(stored, 8)
    if block_bytes == 0 and len(record) > 0:
        return False
    position = 12
    for start in range(0, len(record), max(block_bytes, 1)):
        room = min(block_bytes, len(record) - start)
        if position + 4 > len(stored):
            return False
        nbytes = big_endian_32(stored, position)
        position += 4
        if position + nbytes > len(stored):
            return False
        if nbytes == room:  # stored raw: not by us, but other writers of the filter do that
            record[start : start + room] = stored[position : position + nbytes]
        elif lz4_decompress(stored.ctypes.data + position, record.ctypes.data + start, nbytes, room) != room:
            return False
        position += nbytes
    return position == len(stored)


@kernel
def big_endian_32(content: NDArray[np.uint8], at: int) -> int:
    return (
        signed(content[at]) << 24
        | signed(content[at + 1]) << 16
        | signed(content[at + 2]) << 8
        | signed(content[at + 3])
    )
