"""Filling shards, many records by one call off the GIL: files read whole, records summed, sizes of images found."""

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
from .read_kernels import read_ahead_where_cold, read_and_sum

CHANGED = -4
"""What is wrong with a file, where no error number (above 0) says it: its size is not what it was."""

_PIECE_BYTES = 256 << 10
"""Read or written, and summed, at a time: it is still in the second-level cache when it is summed."""
_MOST_PARTS = 64
"""Gathered for one call, at most: those of a piece that is made of smaller ones."""
_DISK_BYTES = 8 << 20
"""So much that is written is sent to the disk at a time, where it goes while we sum and write on: fsync finds little left."""
_SYNC_FILE_RANGE_WRITE = 2
_EINTR, _ENOMEM = errno.EINTR, errno.ENOMEM
_O_RDONLY_CLOEXEC = 0o2000000
_START_OF_SCAN = 0xDA


def load() -> None:
    """Have the kernels in memory, for the types of arguments that filling shards gives them: they run on nothing."""
    content, frozen, sizes = np.empty(0, np.uint8), np.frombuffer(b"", np.uint8), np.empty(0, np.int64)
    sum_records(content, np.empty(0, np.uint32), np.empty(0, np.uint32))
    read_files(-1, frozen, sizes, sizes, content, np.empty(0, np.uint32))
    jpeg_sizes(content, sizes, np.empty((0, 2), np.int32))
    write_and_sum(-1, sizes, sizes, 1, np.empty((0, 2), np.uint64))


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
    chunk_bytes: int,
    sums: NDArray[np.uint64],
) -> int:
    """Write a file from pieces that lie at `addresses`, and sum its chunks; the first and the last piece are in it already.

    sums  becomes the xxh3_128 of every `chunk_bytes` of the file, [chunks, 2]: upper half, lower half.

    Returns 0 or an error number. What was just written is summed, so that it comes from memory once.
    """
    state = xxh3_create()
    if state == 0:
        return _ENOMEM
    xxh3_reset(state)
    parts = np.empty((_MOST_PARTS, 2), np.int64)
    trouble, chunk, filled, offset, sent, count, gathered = 0, 0, 0, 0, 0, 0, 0
    last = len(nbytes) - 1
    for number in range(len(nbytes)):
        address, left = addresses[number], nbytes[number]
        while left > 0 and trouble == 0:
            part_bytes = min(_PIECE_BYTES - gathered, chunk_bytes - filled, left)
            parts[count, 0], parts[count, 1] = address, part_bytes
            address, left, filled = address + part_bytes, left - part_bytes, filled + part_bytes
            count, gathered = count + 1, gathered + part_bytes
            if gathered == _PIECE_BYTES or filled == chunk_bytes or count == _MOST_PARTS:
                trouble = _write_parts(descriptor, state, parts[:count], offset, 0 < number < last)
                offset, count, gathered = offset + gathered, 0, 0
                if 0 < number < last and offset - sent >= _DISK_BYTES:  # a hint: what goes wrong, fsync says
                    sync_file_range(descriptor, sent, offset - sent, _SYNC_FILE_RANGE_WRITE)
                    sent = offset
            if filled == chunk_bytes:
                sums[chunk, 1], sums[chunk, 0] = xxh3_digest(state)
                xxh3_reset(state)
                chunk, filled = chunk + 1, 0
        if count > 0 and trouble == 0 and (number == 0 or number >= last - 1):
            trouble = _write_parts(descriptor, state, parts[:count], offset, 0 < number < last)
            offset, count, gathered = offset + gathered, 0, 0
    if filled > 0 and trouble == 0:
        sums[chunk, 1], sums[chunk, 0] = xxh3_digest(state)
    xxh3_free(state)
    return trouble


@kernel
def _write_parts(descriptor: int, state: int, parts: NDArray[np.int64], offset: int, is_written: bool) -> int:
    """Write parts, [parts, (address, nbytes)], one behind the other if they are to be written, and add them to the sum; returns 0
    or an error number."""
    if is_written and pwritev(descriptor, parts.ctypes.data, len(parts), offset) != parts[:, 1].sum():
        for number in range(len(parts)):  # not all of it: one by one, which says why
            trouble = _write_exactly(descriptor, parts[number, 0], parts[number, 1], offset)
            if trouble != 0:
                return trouble
            offset += parts[number, 1]
    for number in range(len(parts)):
        xxh3_update(state, parts[number, 0], parts[number, 1])
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
def read_files(
    folder: int,
    paths: NDArray[np.uint8],
    path_starts: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    target: NDArray[np.uint8],
    sums: NDArray[np.uint32],
) -> tuple[int, int]:
    """Read whole files to `target`, one behind the other; `sums` become their crc32c.

    folder       the descriptor of the folder that `paths` count from.
    paths        names that end in a zero byte, one behind the other; `path_starts` says where each starts.
    nbytes       what every file must have.

    All are opened first, and what is not in memory is asked for at once. Returns how many are there, from the first, and 0 or
    what is wrong with the next: CHANGED or an error number.
    """
    count = len(path_starts)
    descriptors = np.empty(count, np.int32)
    opened, read, trouble = 0, 0, 0
    while opened < count and trouble == 0:
        descriptors[opened] = openat(folder, paths.ctypes.data + path_starts[opened], _O_RDONLY_CLOEXEC)
        if descriptors[opened] < 0:
            trouble = errno_location()[0]
        else:
            opened += 1
    if trouble == 0:
        read_ahead_where_cold(descriptors, np.zeros(count, np.int64), nbytes, np.empty(3, np.int64))
    beyond = np.empty(1, np.uint8)
    position = target.ctypes.data
    while read < opened:
        wrong, found = read_and_sum(descriptors[read], position, nbytes[read], 0, np.uint32(0), _PIECE_BYTES)
        if wrong < 0 or (wrong == 0 and pread(descriptors[read], beyond.ctypes.data, 1, nbytes[read]) > 0):
            wrong = CHANGED
        if wrong != 0:
            trouble = wrong
            break
        sums[read] = found
        position += nbytes[read]
        read += 1
    for number in range(opened):
        close(descriptors[number])
    return read, trouble


@kernel
def jpeg_sizes(content: NDArray[np.uint8], nbytes: NDArray[np.int64], sizes: NDArray[np.int32]) -> None:
    """The (height, width) of JPEG files that lie one behind the other, into `sizes`, [files, 2].

    0, 0 for what is none or does not end with its end marker: `images.read_header` says what is to be said about it.
    """
    start = 0
    for number in range(len(nbytes)):
        end = start + nbytes[number]
        sizes[number, 0], sizes[number, 1] = _jpeg_size(content[start:end])
        start = end


@kernel
def _jpeg_size(content: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width), from the frame header (ITU-T T.81 annex B), or (0, 0)."""
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
