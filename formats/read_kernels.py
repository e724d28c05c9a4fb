"""Reading and decoding of many records by one call off the GIL: pread, crc32c and decompression, record by record.

Large records are copied from memory maps of the shards instead, where they are in memory, and summed on the way. Their pages are
left soon, or a process would seem to hold all that it has read; not record by record, as each time all threads of the process forget
where their pages are. Where all that is mapped is little they are kept. To touch a page that is not there waits
for the disk, again and again, and if the disk fails, or the file was cut, the process is ended by SIGBUS without a word; so before
each piece the kernel is asked whether all of it is there. Whoever cuts a file between that and the copy, some 0.2 ms later, still
ends its readers: hence the choice of what is mapped at all (`shard_files`).
What is copied stays in the caches for who reads it next, unless all that is read is too much for that: then it is stored past them.

Each record is summed and decompressed right after it was read, while it is in the processor's cache. A kernel stops at the
first record that is not right and says which and why; what to do about it is decided in `record_reader`.
"""

import errno
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from .blosc_kernel import decode_blosc
from .codecs import BLOSC, LZ4, WORK_BYTES, ZSTD
from .huge_pages import HUGE_PAGE_BYTES
from .native import bytes_on_stack, fetch_add, fetch_min, kernel, signed
from .native_calls import (
    clock_gettime,
    crc32c_copy,
    crc32c_extend,
    crc32c_stream,
    errno_location,
    lseek,
    lz4_decompress,
    madvise,
    memcpy,
    mincore,
    posix_fadvise,
    pread,
    preadv2,
    sched_yield,
    usleep,
    zstd_decompress,
)
from .read_troubles import CUT_OFF, DAMAGED, UNDECODABLE
from .read_turns import AT_WORK, BEGUN, CLOCK, NO_TROUBLE, TROUBLE, TROUBLE_BITS
from .shared_decoding import decode_together, help_with

_PROBES = 8
_PRESENT, _ABSENT, _UNKNOWN = range(3)
_AHEAD_BYTES = 128 << 10
"""A hint of more bytes is cut to the readahead of the device, which may be as little as this."""

MAPPED_BYTES = 256 << 10
"""What is smaller is not worth finding its pages, and leaving them again: the question alone takes some 5 µs."""
_ASKED_BYTES = 2 << 20
"""Of a map whose pages are there, to be copied after one question."""
_LEFT_BYTES = 16 << 20
"""Pages of maps that were touched are left once they are so much, and at the end."""
STREAMED_BYTES = 16 << 20
"""What is read at once, and as large as this, is stored past the caches: two workers keep six such batches going, more than caches hold,
and who copies each batch is faster as well."""
NOT_MAPPED = 0
_PAGE_BYTES = mmap.PAGESIZE
_PAGES_AT_ONCE = 4096

_TROUBLE_MASK = (1 << TROUBLE_BITS) - 1
_QUICK_LOOKS, _PAUSE_MICROSECONDS = 1000, 50

_RWF_NOWAIT = 8
_FADV_WILLNEED = 3
_CLOCK_MONOTONIC = 1
_SEEK_END = os.SEEK_END
_MADV_DONTNEED = mmap.MADV_DONTNEED
_MADV_POPULATE_READ = 22
"""Of the Linux headers; the module mmap does not name it."""
_EINTR, _EAGAIN = errno.EINTR, errno.EAGAIN


@kernel
def read_ahead_where_cold(
    files: NDArray[np.integer],
    descriptors: NDArray[np.int32],
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    vector: NDArray[np.int64],
) -> None:
    """Let the kernel fetch all these ranges at once, should they not be in memory: a disk serves many requests in the time of
    one.

    files   which of `descriptors` each range is of.
    vector  memory to work in, three words.
    """
    for number in range(0, len(offsets), _step_of_probes(len(offsets))):
        last_byte = offsets[number] + max(nbytes[number] - 1, 0)
        if _presence(descriptors[files[number]], NOT_MAPPED, last_byte, vector) == _ABSENT:
            _read_ahead(files, descriptors, offsets, nbytes)
            return


@kernel
def fetch_where_cold(
    shards: NDArray[np.uint32],
    descriptors: NDArray[np.int32],
    maps: NDArray[np.int64],
    fits_in_memory: bool,
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    vector: NDArray[np.int64],
) -> None:
    """The same for records of shards. Where all of these fit into memory it is not ranges that are fetched, but the large pages that they
    lie in, each as a whole: what lies around them is wanted soon too, and what is in memory in large pieces is read out of it in
    two thirds of the time, in every epoch."""
    if _presence_of_some(shards, descriptors, maps, offsets, nbytes, vector) != _ABSENT:
        return
    if not fits_in_memory or not _fetch_large_pages(shards, descriptors, maps, offsets, nbytes):
        _read_ahead(shards, descriptors, offsets, nbytes)


@kernel
def _presence_of_some(
    shards: NDArray[np.uint32],
    descriptors: NDArray[np.int32],
    maps: NDArray[np.int64],
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    vector: NDArray[np.int64],
) -> int:
    """Of some of these ranges, looked at by their last bytes: _ABSENT where one is not in memory, else _UNKNOWN where that cannot be asked of
    one, else _PRESENT."""
    found = _PRESENT
    for number in range(0, len(offsets), _step_of_probes(len(offsets))):
        shard, last_byte = shards[number], offsets[number] + max(nbytes[number] - 1, 0)
        presence = _presence(descriptors[shard], _place_in(maps[shard], last_byte), last_byte, vector)
        if presence == _ABSENT:
            return _ABSENT
        if presence == _UNKNOWN:
            found = _UNKNOWN
    return found


@kernel
def _step_of_probes(count: int) -> int:
    """Of so many ranges, one in so many is probed: it costs nothing where all are in memory."""
    return max(1, count // _PROBES)


@kernel
def _place_in(memory_map: NDArray[np.int64], byte: int) -> int:
    """The address of a byte of a file in its memory map, [address, nbytes]; NOT_MAPPED where it is not in it."""
    return memory_map[0] + byte if 0 <= byte < memory_map[1] else NOT_MAPPED


@kernel
def _presence(descriptor: int, source: int, byte: int, vector: NDArray[np.int64]) -> int:
    """Whether a byte of a file is in memory: _PRESENT, _ABSENT, or _UNKNOWN where that cannot be asked, as on shared file systems.

    source  its address in a memory map, where it is asked for without a trace, 2 µs for one that no cache has; or NOT_MAPPED: to ask by
            a read fetches its page.
    """
    if source != NOT_MAPPED:
        return _PRESENT if is_in_memory(descriptor, source, 1, byte) else _ABSENT
    vector[0], vector[1] = vector.ctypes.data + 16, 1  # the address of its last word, and one byte
    if preadv2(descriptor, vector.ctypes.data, 1, byte, _RWF_NOWAIT) >= 0:
        return _PRESENT
    return _ABSENT if errno_location()[0] == _EAGAIN else _UNKNOWN


@kernel
def _read_ahead(
    files: NDArray[np.integer],
    descriptors: NDArray[np.int32],
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
) -> None:
    for number in range(len(offsets)):
        for ahead in range(0, nbytes[number], _AHEAD_BYTES):
            length = min(_AHEAD_BYTES, nbytes[number] - ahead)
            posix_fadvise(descriptors[files[number]], offsets[number] + ahead, length, _FADV_WILLNEED)


@kernel
def _fetch_large_pages(
    shards: NDArray[np.uint32],
    descriptors: NDArray[np.int32],
    maps: NDArray[np.int64],
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
) -> bool:
    """Have the large pages in memory that these ranges lie in. False where there is no map, a disk fails, or Linux, before 5.18, does not
    fetch a large page when one byte of it is touched in a map: then the rest of a range is not there. Nor is it always where Linux does,
    but found no memory for it in one piece: the rest is on its way then."""
    complete, incomplete = 0, 0
    for number in range(len(offsets)):
        shard, stop = shards[number], offsets[number] + nbytes[number]
        address, mapped_bytes = maps[shard]
        if stop > mapped_bytes:
            return False
        start = offsets[number]
        while start < stop:
            large_page = start // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
            end = min(large_page + HUGE_PAGE_BYTES, stop)
            if not is_in_memory(descriptors[shard], address + start, end - start, start):
                last_page = address + (end - 1) // _PAGE_BYTES * _PAGE_BYTES
                if madvise(last_page, 1, _MADV_POPULATE_READ) != 0:
                    return False
                madvise(address + large_page, min(HUGE_PAGE_BYTES, mapped_bytes - large_page), _MADV_DONTNEED)
                if is_in_memory(descriptors[shard], address + start, end - start, start):
                    complete += 1
                else:
                    incomplete += 1
                    if incomplete > complete + 1:
                        return False
            start = end
    return True


@kernel
def are_in_memory(
    shards: NDArray[np.uint32],
    descriptors: NDArray[np.int32],
    maps: NDArray[np.int64],
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    vector: NDArray[np.int64],
) -> bool:
    """Whether some of these ranges can be read without a wait, and so most likely nearly all. False where that cannot be asked, as on shared
    file systems.

    shards, descriptors, maps  as for `read_records`. Where there is a map nothing is read.
    vector                     memory to work in, three words.
    """
    return _presence_of_some(shards, descriptors, maps, offsets, nbytes, vector) == _PRESENT


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
def find_in_map(memory_map: NDArray[np.int64], keeps_pages: bool, check: bool, offset: int, nbytes: int) -> int:
    """The address of these bytes of a file in its memory map, [address, nbytes]; NOT_MAPPED where they are not in it, or better
    read: where they are few, or their pages are left again and not even a sum is made on the way."""
    if nbytes < MAPPED_BYTES or offset < 0 or offset > memory_map[1] - nbytes:
        return NOT_MAPPED
    if not keeps_pages and (not check or crc32c_copy is None):
        return NOT_MAPPED
    return memory_map[0] + offset  # type: ignore[no-any-return]


@kernel
def is_in_memory(descriptor: int, source: int, nbytes: int, offset: int) -> bool:
    """Whether these bytes of a file can be taken from its memory map, at `source`, without a wait for the disk or a failure there.

    mincore counts pages behind the end of a file that was cut as well, when they share a folio with some before it.
    """
    first_page = source // _PAGE_BYTES * _PAGE_BYTES
    length = source + nbytes - first_page
    pages = bytes_on_stack(_PAGES_AT_ONCE)
    for start in range(0, length, _PAGES_AT_ONCE * _PAGE_BYTES):
        nbytes_at_once = min(length - start, _PAGES_AT_ONCE * _PAGE_BYTES)
        if mincore(first_page + start, nbytes_at_once, pages) != 0:
            return False
        for page in range((nbytes_at_once + _PAGE_BYTES - 1) // _PAGE_BYTES):
            if pages[page] & 1 == 0:
                return False
    return not is_cut(descriptor, offset + nbytes)


@kernel
def leave_maps(shards: NDArray[np.uint32], maps: NDArray[np.int64]) -> None:
    """Give back the pages of the memory maps of these shards; `maps` has address and nbytes of each of all. They stay in memory, but
    count no longer as that of this process, which some batch systems limit. All of a map, as Linux maps more than was touched; it takes
    no longer, some 15 µs."""
    for shard in shards:
        if maps[shard, 1] > 0:
            madvise(maps[shard, 0], maps[shard, 1], _MADV_DONTNEED)


@kernel
def copy_and_sum(check: bool, before: np.uint32, source: int, nbytes: int, target: int, streams: bool) -> np.uint32:
    """Copy memory, past the caches if it `streams`; returns the crc32c of it that continues `before`, of no meaning when it is not
    checked."""
    if crc32c_stream is not None and streams:
        return crc32c_stream(before, source, nbytes, target)  # type: ignore[no-any-return]
    if crc32c_copy is not None:
        return crc32c_copy(before, source, nbytes, target)  # type: ignore[no-any-return]
    memcpy(target, source, nbytes)
    return crc32c_extend(before, target, nbytes) if check else before


@kernel
def is_cut(descriptor: int, end: int) -> bool:
    """Whether a file has fewer bytes than that."""
    return lseek(descriptor, 0, _SEEK_END) < end  # type: ignore[no-any-return]


@kernel
def read_record(
    descriptor: int,
    source: int,
    target: int,
    nbytes: int,
    offset: int,
    check: bool,
    before: np.uint32,
    after: np.uint32,
    piece_bytes: int,
    streams: bool,
) -> int:
    """Read a record to the address `target`, and compare the crc32c that continues `before` with `after`; returns 0 or what is
    wrong.

    source   where it is in a memory map of the file, or NOT_MAPPED.
    streams  copy it from there past the caches.
    """
    found = before
    if source != NOT_MAPPED:
        trouble, found = copy_or_read(descriptor, source, target, nbytes, offset, check, before, piece_bytes, streams)
    elif check:
        trouble, found = read_and_sum(descriptor, target, nbytes, offset, before, piece_bytes)
    else:
        trouble = read_exactly(descriptor, target, nbytes, offset)
    is_wrong = check and found != after
    if trouble == 0 and (is_wrong or not check) and source != NOT_MAPPED and is_cut(descriptor, offset + nbytes):
        return CUT_OFF
    return DAMAGED if trouble == 0 and is_wrong else trouble


@kernel
def copy_or_read(
    descriptor: int,
    source: int,
    target: int,
    nbytes: int,
    offset: int,
    check: bool,
    before: np.uint32,
    piece_bytes: int,
    streams: bool,
) -> tuple[int, np.uint32]:
    """As `read_and_sum`, but what is in memory is copied from there: `source` is the address of the bytes in a memory map. Zeros
    come behind the end of a file that is cut meanwhile."""
    found = before
    for start in range(0, nbytes, _ASKED_BYTES):
        length = min(_ASKED_BYTES, nbytes - start)
        if is_in_memory(descriptor, source + start, length, offset + start):
            found = copy_and_sum(check, found, source + start, length, target + start, streams)
            continue
        trouble, found = read_and_sum(descriptor, target + start, length, offset + start, found, piece_bytes)
        if trouble != 0:
            return trouble, found
    return 0, found


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
def read_neighbours(
    descriptor: int,
    source: int,
    offset: int,
    nbytes: NDArray[np.int64],
    target: int,
    before: NDArray[np.uint32],
    after: NDArray[np.uint32],
    streams: bool,
) -> tuple[int, int]:
    """Read records that are neighbours on disk and in memory at once, from `offset` or the memory map on, to the address `target`;
    `before` and `after` as for `read_records`. Returns how many of them are right, and 0 or what is wrong with the next."""
    run_bytes, check = nbytes.sum(), len(after) > 0
    is_mapped = source != NOT_MAPPED and is_in_memory(descriptor, source, run_bytes, offset)
    if not is_mapped:
        trouble = read_exactly(descriptor, target, run_bytes, offset)
        if trouble != 0:
            return 0, trouble
    done = 0
    for number in range(len(nbytes)):
        seed = before[number] if len(before) else np.uint32(0)
        if is_mapped:
            found = copy_and_sum(check, seed, source + done, nbytes[number], target + done, streams)
        elif check:
            found = crc32c_extend(seed, target + done, nbytes[number])
        done += nbytes[number]
        if check and found != after[number]:
            return number, CUT_OFF if is_mapped and is_cut(descriptor, offset + run_bytes) else DAMAGED
    return 0, CUT_OFF if is_mapped and not check and is_cut(descriptor, offset + run_bytes) else 0


@kernel
def read_records(
    counter: NDArray[np.int64],
    share: int,
    piece_bytes: int,
    shards: NDArray[np.uint32],
    descriptors: NDArray[np.int32],
    maps: NDArray[np.int64],
    keeps_pages: bool,
    fits_in_memory: bool,
    packed: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    start: NDArray[np.int64],
    before: NDArray[np.uint32],
    after: NDArray[np.uint32],
) -> tuple[int, int]:
    """Read records, or ranges of them, to where they `start` in `packed`; several threads with one `counter` share them out.

    counter        [4], the first record that no thread has taken yet, of which `share` are taken at a time, and memory to work in.
    piece_bytes    to read at a time, before it is summed.
    shards         which shard each record is in, [records].
    descriptors, maps  of all shards: the file, [shards], and its memory map, [shards, 2]: address and nbytes, 0 without one.
    keeps_pages    whether pages of maps that were touched stay in them, or are left when a record was copied.
    fits_in_memory  whether there is memory for all that is mapped.
    before, after  the crc32c of each record up to where its range starts, and up to where it ends. Nothing for `before`: they
                   start with the record; nothing for `after`: they are not checked.

    Neighbours on disk that are neighbours in memory are read together. Returns how many are there, from the first on, should
    other threads do theirs, and 0 or what is wrong with the next.
    """
    count, check, streams = len(offsets), len(after) > 0, nbytes.sum() >= STREAMED_BYTES
    while True:
        first = fetch_add(counter, share)
        if first == 0:
            fetch_where_cold(shards, descriptors, maps, fits_in_memory, offsets, nbytes, counter[1:])
        stop = min(first + share, count)
        if first >= stop:
            return count, 0
        touched_from, touched_bytes = first, 0
        while first < stop:
            shard, target = shards[first], packed.ctypes.data + start[first]
            end, run_bytes = first + 1, nbytes[first]
            while (
                end < stop
                and run_bytes + nbytes[end] <= piece_bytes
                and shards[end] == shard
                and offsets[end] == offsets[first] + run_bytes
                and start[end] == start[first] + run_bytes
            ):
                run_bytes += nbytes[end]
                end += 1
            source, right = find_in_map(maps[shard], keeps_pages, check, offsets[first], run_bytes), 0
            if end == first + 1:
                seed = before[first] if len(before) else np.uint32(0)
                expected = after[first] if check else np.uint32(0)
                trouble = read_record(
                    descriptors[shard],
                    source,
                    target,
                    run_bytes,
                    offsets[first],
                    check,
                    seed,
                    expected,
                    piece_bytes,
                    streams,
                )
            else:
                right, trouble = read_neighbours(
                    descriptors[shard],
                    source,
                    offsets[first],
                    nbytes[first:end],
                    target,
                    before[first:end],
                    after[first:end],
                    streams,
                )
            if source != NOT_MAPPED:
                touched_bytes += run_bytes
            if not keeps_pages and (
                touched_bytes >= _LEFT_BYTES or trouble != 0 or (end == stop and touched_bytes > 0)
            ):
                leave_maps(shards[touched_from:end], maps)
                touched_from, touched_bytes = end, 0
            if trouble != 0:
                fetch_add(counter, count)
                return first + right, trouble
            first = end


@kernel
def read_and_decode(
    turns: NDArray[np.int64],
    jobs: NDArray[np.int64],
    piece_bytes: int,
    shards: NDArray[np.uint32],
    descriptors: NDArray[np.int32],
    maps: NDArray[np.int64],
    keeps_pages: bool,
    fits_in_memory: bool,
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    sums: NDArray[np.uint32],
    codec: int,
    scratch: NDArray[np.uint8],
    rows: NDArray[np.uint8],
    decode_nanoseconds: NDArray[np.int64],
) -> tuple[int, int]:
    """Read records and decompress each into its row of `rows`, [records, bytes of a record]; several threads called with the same
    arguments share them out. Returns, when all is done, what all of them did, as `read_records` does for one.

    turns, jobs  what `new_turns` and `new_jobs` made.
    piece_bytes  to read at a time, before it is summed.
    shards, descriptors, maps, keeps_pages, fits_in_memory  as for `read_records`.
    scratch      memory of each thread, [threads, WORK_BYTES and behind them room for the stored bytes of a record].
    decode_nanoseconds  [1], is added what decompressing took.
    """
    fetch_add(turns[AT_WORK:], 1)
    me = fetch_add(turns[BEGUN:], 1)
    count, work, stored, clock = len(offsets), scratch[me, :WORK_BYTES], scratch[me, WORK_BYTES:], jobs[me, CLOCK:]
    target = stored.ctypes.data
    while True:
        number = fetch_add(turns, 1)
        if number == 0:
            fetch_where_cold(shards, descriptors, maps, fits_in_memory, offsets, nbytes, turns[1:])
        if number >= count:
            break
        shard = shards[number]
        source = find_in_map(maps[shard], keeps_pages, True, offsets[number], nbytes[number])
        trouble = read_record(
            descriptors[shard],
            source,
            target,
            nbytes[number],
            offsets[number],
            True,
            np.uint32(0),
            sums[number],
            piece_bytes,
            False,
        )
        if source != NOT_MAPPED and not keeps_pages:
            leave_maps(shards[number : number + 1], maps)
        began = nanoseconds(clock)
        if trouble == 0 and codec == BLOSC:
            is_decoded = decode_together(jobs[me], scratch[me], nbytes[number], number, rows)
        else:
            is_decoded = trouble == 0 and decode_record(codec, stored[: nbytes[number]], rows[number], work)
        fetch_add(decode_nanoseconds, nanoseconds(clock) - began)
        if not is_decoded:
            trouble = UNDECODABLE if trouble == 0 else trouble
            fetch_min(turns[TROUBLE:], number << TROUBLE_BITS | trouble & _TROUBLE_MASK)
            fetch_add(turns, count)
            break
    fetch_add(turns[AT_WORK:], -1)
    looks = 0
    # To be woken would take a tenth of a millisecond, and others end just about now.
    while fetch_add(turns[AT_WORK:], 0) > 0:
        for other in range(len(jobs)):
            help_with(jobs[other], scratch[other], rows, work)
        if looks < _QUICK_LOOKS:
            sched_yield()
        else:
            usleep(_PAUSE_MICROSECONDS)
        looks += 1
    first = turns[TROUBLE]
    if first == NO_TROUBLE:
        return count, 0
    return first >> TROUBLE_BITS, signed(np.int16(first & _TROUBLE_MASK))


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
            memcpy(record.ctypes.data + start, stored.ctypes.data + position, nbytes)
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
