"""One chunk at a time between disk and memory: read and checked at the source, checked and written at the destination."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from stagein.formats.checksums import (
    PASSING_TROUBLE,
    RETRY_PAUSES_SECONDS,
    chunk_sum,
    pread_exactly,
    pwrite_all,
)
from stagein.formats.errors import ChecksumError, SourceError, destination_error, source_error

from .stage_plan import BLOCK_BYTES, ChunkTable, Place

_TRIED_CHUNKS = 6
"""So many chunks are read through the page cache, and as many past it, before one way is chosen."""

_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


class OpenFile(threading.local):
    """The file that this thread used last, kept open: chunks come in file order, so one open serves many of them."""

    def __init__(self, open_file: Callable[[int], int]) -> None:
        self._open_file = open_file
        self._file: int | None = None
        self._descriptor = -1

    def descriptor(self, file: int) -> int:
        """Descriptor of file number `file`, opened if the last one was another."""
        if file != self._file:
            self.close()
            self._descriptor = self._open_file(file)
            self._file = file
        return self._descriptor

    def close(self) -> None:
        """Close this thread's file; call it when the thread ends."""
        if self._file is not None:
            os.close(self._descriptor)
            self._file = None


class WayChoice:
    """Through the page cache or past it (O_DIRECT): the first chunks go both ways in turns, then all go the way that was faster.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = 0
        self._bytes, self._seconds, self._chunks = [0, 0], [0.0, 0.0], [0, 0]
        self.direct: bool | None = None
        """What was chosen; None: both are still tried."""

    def next_is_direct(self) -> bool:
        """Which way the next chunk goes."""
        with self._lock:
            self._asked += 1
            return bool(self._asked % 2) if self.direct is None else self.direct

    def note(self, direct: bool, nbytes: int, seconds: float) -> None:
        """How long a chunk took that went this way."""
        with self._lock:
            self._bytes[direct] += nbytes
            self._seconds[direct] += seconds
            self._chunks[direct] += 1
            if self.direct is None and min(self._chunks) >= _TRIED_CHUNKS:
                through, past = (size / (span or 1e-9) for size, span in zip(self._bytes, self._seconds, strict=True))
                self.direct = past > through

    def refuse_direct(self) -> None:
        """This file system cannot do it."""
        self.direct = False


def can_go_direct(buffer: memoryview, offset: int) -> bool:
    """Whether memory, place and length are whole blocks, as O_DIRECT asks for."""
    address = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
    return not (address % BLOCK_BYTES or offset % BLOCK_BYTES or len(buffer) % BLOCK_BYTES)


class ChunkReader:
    """Reads chunks of the source. Safe to use from several threads; each calls `close` when it is done."""

    def __init__(self, root: Path, table: ChunkTable) -> None:
        self._root = root
        self._table = table
        self._open = OpenFile(self._open_source)
        self._open_direct = OpenFile(partial(self._open_source, flags=os.O_DIRECT))
        self._way = WayChoice()

    def read(self, chunk: int, buffer: memoryview) -> None:
        """Fill `buffer` with chunk number `chunk`, verified; wrong bytes are read once more from the disk itself.

        Raises ChecksumError with file, offset and both sums; SourceError when the file is short, changed or unreadable.
        """
        place = self._table.place(chunk)
        self._fill(place, buffer)
        if not self.is_right(chunk, buffer):
            os.posix_fadvise(self._open.descriptor(place.file), place.offset, place.nbytes, os.POSIX_FADV_DONTNEED)
            self._fill(place, buffer)
            if not self.is_right(chunk, buffer):
                check_sum(place, buffer, f"the source {self._root / place.name}")

    def is_right(self, chunk: int, buffer: memoryview) -> bool:
        """Whether a chunk, which may have come over the network, is what the manifest says."""
        return chunk_sum(buffer) == self._table.place(chunk).chunk_sum

    def close(self) -> None:
        self._open.close()
        self._open_direct.close()

    def _fill(self, place: Place, buffer: memoryview) -> None:
        for pause_seconds in (*RETRY_PAUSES_SECONDS, None):
            try:
                got = self._pread(place, buffer)
                break
            except OSError as error:
                if error.errno not in PASSING_TROUBLE or pause_seconds is None:
                    raise source_error(error, "reading", self._root / place.name) from None
                self.close()
                time.sleep(pause_seconds)
        if got < len(buffer):
            status = os.fstat(self._open.descriptor(place.file))
            raise SourceError(
                describe_changed_file(self._root / place.name, status, self._table.files[place.file].nbytes)
            )

    def _pread(self, place: Place, buffer: memoryview) -> int:
        """Fill the buffer, past the page cache where that is faster; the bytes read."""
        if not can_go_direct(buffer, place.offset):
            return pread_exactly(self._open.descriptor(place.file), buffer, place.offset)
        direct, start = self._way.next_is_direct(), time.monotonic()
        try:
            opened = self._open_direct if direct else self._open
            got = pread_exactly(opened.descriptor(place.file), buffer, place.offset)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            self._way.refuse_direct()
            return self._pread(place, buffer)
        self._way.note(direct, got, time.monotonic() - start)
        return got

    def _open_source(self, file: int, flags: int = 0) -> int:
        entry = self._table.files[file]
        path = self._root / entry.file
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | flags)
        status = os.fstat(descriptor)
        if status.st_size != entry.nbytes:  # as that of what is no file
            os.close(descriptor)
            raise SourceError(describe_changed_file(path, status, entry.nbytes))
        return descriptor


class ChunkWriter:
    """Writes chunks below a node's work folder and notes each in the journal of this rank. Safe to use from several threads."""

    def __init__(
        self, root: Path, table: ChunkTable, note: Callable[[int], object] | None, *, direct: bool = False
    ) -> None:
        """`direct`: write past the page cache; `probes.probe_disk` tells what is faster."""
        self._root = root
        self._table = table
        self._note = note
        self._direct = direct
        self._open = OpenFile(self._open_target)
        self._open_direct = OpenFile(partial(self._open_target, flags=os.O_DIRECT))

    def write(self, chunk: int, buffer: memoryview) -> None:
        """Write chunk number `chunk`. Raises NoSpaceError when the disk is full."""
        place = self._table.place(chunk)
        try:
            if self._direct and can_go_direct(buffer, place.offset):
                pwrite_all(self._open_direct.descriptor(place.file), buffer, place.offset)
            else:
                descriptor = self._open.descriptor(place.file)
                pwrite_all(descriptor, buffer, place.offset)
                start_writeback(descriptor, place.offset, place.nbytes)
            if self._note is not None:
                self._note(chunk)
        except OSError as error:
            raise destination_error(error, "writing", self._root / place.name) from None

    def close(self) -> None:
        self._open.close()
        self._open_direct.close()

    def _open_target(self, file: int, flags: int = 0) -> int:
        return os.open(self._root / self._table.files[file].file, os.O_WRONLY | os.O_NOFOLLOW | flags)


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to write this range to the disk now, and do not wait for it.

    Otherwise it gathers dirty pages for many seconds, and all of them are written at the end, when fsync waits for them.
    A hint only: where the call does not exist or fails, the later fsync reports what matters.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


def check_sum(place: Place, buffer: memoryview, what: str) -> None:
    """Raise ChecksumError when `buffer` is not what the manifest says of `place`."""
    found = chunk_sum(buffer)
    if found != place.chunk_sum:
        raise ChecksumError(
            f"{what} differs from the manifest in the {place.nbytes} bytes from {place.offset}: their xxh3_128 is "
            f"{found.hex()}, not {place.chunk_sum.hex()}; restore the file from a good copy or convert the data set again"
        )


def describe_changed_file(path: Path, status: os.stat_result, expected_bytes: int) -> str:
    """Say how a source file is not what the manifest lists."""
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is not a regular file: restore it from a good copy"
    return f"{path} has {status.st_size} bytes, the manifest says {expected_bytes}: it is truncated or was changed"
