"""Filling shards, many records by one call off the GIL: files read whole, sizes of images found, payloads written and summed."""

import errno

import numpy as np
from numpy.typing import NDArray

from .native import kernel, signed
from .native_calls import (
    close,
    crc32c_extend,
    errno_location,
    openat,
    pread,
    pwrite,
    pwritev,
    sync_file_range,
    xxh3_create,
    xxh3_digest,
    xxh3_free,
    xxh3_reset,
    xxh3_update,
)
from .read_kernels import read_ahead_where_cold, read_exactly

CHANGED = -4
"""What is wrong with a file, where no error number (above 0) says it: its size is not what it was."""

_PIECE_BYTES = 256 << 10
"""Written and summed at a time: it is still in the second-level cache when it is summed."""
_LARGE_PIECE_BYTES = 2 << 20
"""The same, where records are large: they are read out of memory maps, a tenth faster where a file system keeps in one piece what it was
given in one call, and the piece is a large page (x86-64). To get so much memory in one piece makes writing of other records slower."""
_LARGE_RECORD_BYTES = 1 << 20
"""From that size on, in the mean of those written at once, records are large."""
_DISK_BYTES = 8 << 20
"""So much that is written is sent to the disk at a time, where it goes while we sum and write on: fsync finds little left."""
_SYNC_FILE_RANGE_WRITE = 2
_EINTR, _ENOMEM = errno.EINTR, errno.ENOMEM
_O_RDONLY_CLOEXEC = 0o2000000
_START_OF_SCAN = 0xDA
_OFFSET, _SUMMED_FROM, _SENT, _STATE = range(4)
"""What `write_and_sum` keeps from call to call."""


@kernel
def sum_records(content: NDArray[np.uint8], nbytes: NDArray[np.uint32], sums: NDArray[np.uint32]) -> None:
    """The crc32c of records that lie one behind the other, into `sums`."""
    position = content.ctypes.data
    for number in range(len(nbytes)):
        sums[number] = crc32c_extend(np.uint32(0), position, nbytes[number])
        position += nbytes[number]


@kernel
def write_and_sum(
    descriptor: int,
    addresses: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    record_nbytes: NDArray[np.uint32],
    record_sums: NDArray[np.uint32],
    chunk_bytes: int,
    progress: NDArray[np.int64],
    chunk_sums: NDArray[np.uint64],
    parts: NDArray[np.int64],
    ends: bool,
) -> tuple[int, int]:
    """Write pieces that lie at `addresses` to a file, one behind the other, and sum them.

    record_nbytes  of the records in them, one behind the other; what comes behind the last is padding.
    record_sums    becomes the crc32c of every record.
    progress       kept for the next call, [4]: where to write; the first byte of the first chunk to sum; how much was sent to the
                   disk; the sum of the last chunk, which goes on, 0 to begin with.
    chunk_sums     becomes the xxh3_128 of every chunk that is full, [chunks, 2]: upper half, lower half.
    parts          memory to work in, [parts that are gathered for one call at most, 2]: pieces may be small.
    ends           whether this is the last call: what there is of the last chunk is summed as if it were full.

    Returns 0 or an error number, and how many chunks were summed. What was just written is summed: it comes from memory once.
    """
    if progress[_STATE] == 0:
        progress[_STATE] = xxh3_create()
        if progress[_STATE] == 0:
            return _ENOMEM, 0
        xxh3_reset(progress[_STATE])
    is_large = len(record_nbytes) > 0 and nbytes.sum() >= len(record_nbytes) * _LARGE_RECORD_BYTES
    piece_bytes = _LARGE_PIECE_BYTES if is_large else _PIECE_BYTES
    trouble, chunk, count, gathered, record, summed = 0, 0, 0, 0, 0, 0
    found = np.uint32(0)
    for number in range(len(nbytes)):
        address, left = addresses[number], nbytes[number]
        while left > 0 and trouble == 0:
            behind = progress[_OFFSET] + gathered
            part_bytes = min(piece_bytes - behind % piece_bytes, chunk_bytes - behind % chunk_bytes, left)
            parts[count, 0], parts[count, 1] = address, part_bytes
            address, left = address + part_bytes, left - part_bytes
            count, gathered = count + 1, gathered + part_bytes
            is_full = (behind + part_bytes) % chunk_bytes == 0
            is_last = left == 0 and number == len(nbytes) - 1
            if (behind + part_bytes) % piece_bytes == 0 or is_full or count == len(parts) or is_last:
                trouble = _write_parts(descriptor, parts[:count], gathered, progress)
                record, summed, found = _sum_records(parts[:count], record_nbytes, record, summed, found, record_sums)
                count, gathered = 0, 0
                if is_full and progress[_OFFSET] > progress[_SUMMED_FROM]:
                    chunk_sums[chunk, 1], chunk_sums[chunk, 0] = xxh3_digest(progress[_STATE])
                    xxh3_reset(progress[_STATE])
                    chunk += 1
    while record < len(record_nbytes) and trouble == 0:  # empty ones
        record_sums[record] = found
        record, found = record + 1, np.uint32(0)
    if ends:
        if progress[_OFFSET] > progress[_SUMMED_FROM] and progress[_OFFSET] % chunk_bytes > 0:
            chunk_sums[chunk, 1], chunk_sums[chunk, 0] = xxh3_digest(progress[_STATE])
            chunk += 1
        xxh3_free(progress[_STATE])
        progress[_STATE] = 0
    return trouble, chunk


@kernel
def _sum_records(
    parts: NDArray[np.int64],
    record_nbytes: NDArray[np.uint32],
    record: int,
    summed: int,
    found: np.uint32,
    record_sums: NDArray[np.uint32],
) -> tuple[int, int, np.uint32]:
    """Add parts of records that follow one another, [parts, (address, nbytes)], to their crc32c.

    Of the record of number `record` so many bytes are `summed`, to `found`: the three as they are afterwards, too.
    """
    for number in range(len(parts)):
        address, left = parts[number, 0], parts[number, 1]
        while record < len(record_nbytes) and (left > 0 or record_nbytes[record] == summed):
            some = min(left, signed(record_nbytes[record]) - summed)
            found = crc32c_extend(found, address, some)
            address, left, summed = address + some, left - some, summed + some
            if summed == record_nbytes[record]:
                record_sums[record] = found
                record, summed, found = record + 1, 0, np.uint32(0)
    return record, summed, found


@kernel
def _write_parts(descriptor: int, parts: NDArray[np.int64], nbytes: int, progress: NDArray[np.int64]) -> int:
    """Write parts, [parts, (address, nbytes)], `nbytes` together, one behind the other, add them to the sum of their chunk, if it is to
    be summed, and have so much of the file that was written sent to the disk; returns 0 or an error number."""
    start = progress[_OFFSET]
    if pwritev(descriptor, parts.ctypes.data, len(parts), start) != nbytes:
        offset = start
        for number in range(len(parts)):  # not all of it: one by one, which says why
            trouble = _write_exactly(descriptor, parts[number, 0], parts[number, 1], offset)
            if trouble != 0:
                return trouble
            offset += parts[number, 1]
    if start >= progress[_SUMMED_FROM]:
        for number in range(len(parts)):
            xxh3_update(progress[_STATE], parts[number, 0], parts[number, 1])
    progress[_OFFSET] = start + nbytes
    if progress[_OFFSET] - progress[_SENT] >= _DISK_BYTES:  # a hint: what goes wrong, fsync says
        sync_file_range(descriptor, progress[_SENT], progress[_OFFSET] - progress[_SENT], _SYNC_FILE_RANGE_WRITE)
        progress[_SENT] = progress[_OFFSET]
    return 0


@kernel
def _write_exactly(descriptor: int, source: int, nbytes: int, offset: int) -> int:
    """Write `nbytes` from the address `source`; returns 0 or an error number."""
    done = 0
    while done < nbytes:
        written = pwrite(descriptor, source + done, nbytes - done, offset + done)
        if written >= 0:
            done += written
        elif errno_location()[0] != _EINTR:
            return signed(errno_location()[0])
    return 0


@kernel
def read_images(
    folder: int,
    paths: NDArray[np.uint8],
    path_starts: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    target: NDArray[np.uint8],
    sizes: NDArray[np.int32],
    descriptors: NDArray[np.int32],
    memory: NDArray[np.int64],
) -> tuple[int, int]:
    """Read whole files to `target`, one behind the other, and find how large the images in them are.

    folder       the descriptor of the folder that `paths` count from.
    paths        names that end in a zero byte, one behind the other; `path_starts` says where each starts.
    nbytes       what every file must have.
    sizes        becomes the (height, width) of each, [files, 2], as `jpeg_size` knows it.
    descriptors  memory to work in, [files].
    memory       the same, zeros, [2 * files + 3].

    All are opened first, and what is not in memory is asked for at once. Returns how many are there, from the first, and 0 or
    what is wrong with the next: CHANGED or an error number.
    """
    count = len(path_starts)
    from_start, numbers, vector = memory[:count], memory[count : 2 * count], memory[2 * count :]
    opened, read, trouble = 0, 0, 0
    while opened < count and trouble == 0:
        descriptors[opened] = openat(folder, paths.ctypes.data + path_starts[opened], _O_RDONLY_CLOEXEC)
        if descriptors[opened] < 0:
            trouble = errno_location()[0]
        else:
            numbers[opened] = opened
            opened += 1
    if trouble == 0:
        read_ahead_where_cold(numbers, descriptors, from_start, nbytes, vector)
    start = 0
    while read < opened:
        end = start + nbytes[read]
        wrong = read_exactly(descriptors[read], target.ctypes.data + start, nbytes[read], 0)
        if wrong < 0 or (wrong == 0 and pread(descriptors[read], vector.ctypes.data, 1, nbytes[read]) > 0):
            wrong = CHANGED
        if wrong != 0:
            trouble = wrong
            break
        sizes[read, 0], sizes[read, 1] = jpeg_size(target[start:end])
        start = end
        read += 1
    for number in range(opened):
        close(descriptors[number])
    return read, trouble


@kernel
def jpeg_size(content: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width) of a JPEG file, from its frame header (ITU-T T.81 annex B).

    (0, 0) for what is none or does not end with its end marker: `images.read_header` says what is to be said about it.
    """
    count, height, width = len(content), 0, 0
    if count < 4 or content[0] != 0xFF or content[1] != 0xD8 or content[2] != 0xFF:
        return 0, 0
    if content[count - 2] != 0xFF or content[count - 1] != 0xD9:
        return 0, 0
    position = 2
    while position + 4 <= count and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker < 0xD8:  # markers without a segment
            position += 2
            continue
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            if position + 9 > count:
                return 0, 0
            height = (content[position + 5] << 8) + content[position + 6]
            width = (content[position + 7] << 8) + content[position + 8]
        if marker == _START_OF_SCAN:
            return (height, width) if height != 0 and width != 0 else (0, 0)
        position += 2 + (content[position + 2] << 8) + content[position + 3]
    return 0, 0
