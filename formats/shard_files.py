"""Open shards, at most as many as the process may have; those unused for longest are closed first.

Some are mapped into memory as well, as long as they are open. A process that touches a map behind the new end of a file that
was cut is ended by SIGBUS: so only those are mapped that are not to change, published ones that nobody may write to, and not those
of a server, where others may replace them.
"""

import ctypes
import errno
import functools
import mmap
import os
import resource
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import SourceError
from .forks import renew_in_forks
from .free_memory import memory_for_files_bytes

_RESERVED_DESCRIPTORS = 256
"""Descriptors left to the rest of the process: libraries, sockets, the user's own files."""
_PATIENCE_SECONDS = 600
_PIECE_BYTES = 256 << 10
"""To read and sum at a time: what was read is still in the second-level cache when it is summed."""
_LARGE_PIECE_BYTES = 8 << 20
"""The same where every read is a message to a server, which is asked for few large pieces."""
_WORDS_OF_STATFS = 64
_TMPFS, _RAMFS = 0x01021994, 0x858458F6
_CLOSED = -1
_MOST_MAPS = 8192
"""Of 65,530 that the kernel allows a process, for all that it has."""
_KEPT_BYTES = 256 << 20
"""Pages of maps count as memory of this process once they were touched: of all maps of a field, where those together are no
larger than this, and else only while a record is copied."""
_FITTING_SHARE = 0.5
"""Of the memory for files, which what is read may fill: data sets of other loaders, and of neighbours, are read too."""
_NO_MAP = (0, 0)
_MAP_FAILED = ctypes.c_void_p(-1).value


class OpenShards(NamedTuple):
    """Shards in use, and of all shards what there is to read them by: only what belongs to those in use stays as it is.

    numbers      of the shards in use: [entries], one may come several times.
    descriptors  of the files, [shards].
    maps         where each file is mapped: address and nbytes, [shards, 2], 0 where it is not.
    keeps_pages  whether pages of maps that were touched may stay in them.
    fits_in_memory  whether there is memory for the files of all shards.
    """

    numbers: NDArray[np.uint32]
    descriptors: NDArray[np.int32]
    maps: NDArray[np.int64]
    keeps_pages: bool
    fits_in_memory: bool

    def descriptor_of_each(self) -> NDArray[np.int32]:
        """Of the shards in use, [entries]."""
        return self.descriptors[self.numbers]


class ShardFiles:
    """The shards of a field, opened when first needed. Safe to use from many threads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._limit = _allowed_descriptors()
        self.piece_bytes = np.full(len(paths), _PIECE_BYTES, np.int64)
        """How much of each to read at a time, known once it was opened."""
        self._descriptors = np.full(len(paths), _CLOSED, np.int32)
        self.are_all_open = False
        """Whether nobody has to wait for a descriptor. Said apart, as it is asked for every batch: looking through descriptors takes some
        microseconds."""
        self._maps = np.zeros((len(paths), 2), np.int64)
        self._keeps_pages, self._fits_in_memory = True, False
        self._used_at = np.zeros(len(paths), np.int64)
        self._clock = 0
        self._is_closed = False
        self.renew()
        renew_in_forks(self)

    def renew(self) -> None:
        """Forget the users: in a process that was forked there are none."""
        self._changed = threading.Condition()
        self._in_use: dict[int, NDArray[np.uint32]] = {}

    @contextmanager
    def use(self, shards: NDArray[np.uint32]) -> Iterator[OpenShards]:
        """These shards, not closed while in use: the first of them only, when the limit is short.

        Raises SourceError when a shard cannot be opened. Waits while other threads use all descriptors; whoever waits uses
        none, so that somebody is always at work.
        """
        with self._changed:
            self._clock += 1
            use = self._clock
            # Where all are open, none is closed for another. With caches full of records, it counts what is done here.
            if not self.are_all_open:
                if _CLOSED in self._descriptors[shards]:
                    shards = self._open_all(shards)
                self._used_at[shards] = use
            self._in_use[use] = shards
        try:
            yield OpenShards(shards, self._descriptors, self._maps, self._keeps_pages, self._fits_in_memory)
        finally:
            with self._changed:
                self._in_use.pop(use, None)
                if self._is_closed:
                    self._close_idle()
                self._changed.notify_all()

    def forget(self, shard: int) -> None:
        """Open this shard anew when it is next used, if nobody uses it now."""
        with self._changed:
            if self._is_idle()[shard]:
                self._close(shard)

    def close(self) -> None:
        """Open no shard any more, and close each as soon as nobody uses it."""
        with self._changed:
            self._is_closed = True
            self._close_idle()

    def __del__(self) -> None:
        if hasattr(self, "_in_use"):
            self.close()

    def _open_all(self, shards: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Open what is closed of these; the first of them, as many as are open now."""
        needed, first_seen = np.unique(shards, return_index=True)
        if len(needed) > self._limit:
            shards = shards[: np.sort(first_seen)[self._limit]]
            needed = np.unique(shards)
        if not self._changed.wait_for(lambda: self._make_room(needed), _PATIENCE_SECONDS):
            raise SourceError(
                f"{self.paths[needed[0]]} cannot be opened: for {_PATIENCE_SECONDS} s reads of other threads have held all "
                f"{self._limit} file descriptors; raise the limit (`ulimit -n`), or see whether the file system hangs"
            )
        for shard in needed[self._descriptors[needed] == _CLOSED].tolist():
            self._descriptors[shard] = descriptor = self._open(shard)
            is_shared = _is_shared(descriptor)
            self.piece_bytes[shard] = _LARGE_PIECE_BYTES if is_shared else _PIECE_BYTES
            if not is_shared and np.count_nonzero(self._maps[:, 1]) < _MOST_MAPS:
                self._maps[shard] = _map(descriptor)
        self.are_all_open = _CLOSED not in self._descriptors
        mapped_bytes = self._maps[:, 1]
        self._keeps_pages = bool(mapped_bytes.sum() <= _KEPT_BYTES)
        all_bytes = int(mapped_bytes.max(initial=0)) * len(self.paths)  # shards are alike in size, but for the last
        self._fits_in_memory = 0 < all_bytes <= _FITTING_SHARE * self._memory_bytes
        return shards

    @functools.cached_property
    def _memory_bytes(self) -> int:
        """For files, when the first was opened: where descriptors are short, files are opened in every batch."""
        return memory_for_files_bytes()

    def _make_room(self, needed: NDArray[np.uint32]) -> bool:
        """Close what is in the way of opening `needed`; False when too much of it is in use."""
        if np.all(self._descriptors[needed] != _CLOSED):
            return True
        is_open = self._descriptors != _CLOSED
        in_the_way = np.count_nonzero(is_open) + np.count_nonzero(~is_open[needed]) - self._limit
        if in_the_way <= 0:
            return True
        is_idle = is_open & self._is_idle()
        is_idle[needed] = False
        idle = np.flatnonzero(is_idle)
        for shard in idle[np.argsort(self._used_at[idle])][:in_the_way].tolist():
            self._close(shard)
        return bool(len(idle) >= in_the_way)

    def _is_idle(self) -> NDArray[np.bool_]:
        is_idle = np.ones(len(self.paths), np.bool_)
        for shards in list(self._in_use.values()):  # a use may end while a collector of garbage runs
            is_idle[shards] = False
        return is_idle

    def _close_idle(self) -> None:
        for shard in np.flatnonzero(self._is_idle()).tolist():
            self._close(shard)

    def _close(self, shard: int) -> None:
        if self._descriptors[shard] != _CLOSED:
            _unmap(*self._maps[shard].tolist())
            os.close(self._descriptors[shard])
            self._descriptors[shard], self._maps[shard], self.are_all_open = _CLOSED, _NO_MAP, False

    def _open(self, shard: int) -> int:
        path = self.paths[shard]
        if self._is_closed:
            raise SourceError(f"{path} cannot be read: its data set was closed")
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would be waited for
        except OSError as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else error.strerror
            raise SourceError(
                f"shard {path} cannot be opened ({reason}): restore it, or convert or stage the data set again"
            ) from None


def _allowed_descriptors() -> int:
    """Raise the soft limit of open files to the hard one (1,024 is common, a data set can have 10,000 shards)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    return max(1, limit - _RESERVED_DESCRIPTORS)


def _is_shared(descriptor: int) -> bool:
    """Shared file systems (Lustre, GPFS, BeeGFS, FUSE) are those that cannot say whether bytes are in memory, and are not memory
    themselves: their own reading ahead begins late, or knows only one client at a time."""
    try:
        os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            statistics = (ctypes.c_long * _WORDS_OF_STATFS)()  # a struct statfs begins with the type of the file system
            if _c_library().fstatfs(descriptor, statistics) == 0:
                return statistics[0] not in (_TMPFS, _RAMFS)
    return False


def _map(descriptor: int) -> tuple[int, int]:
    """Address and nbytes of a memory map of this file, on no shared file system; _NO_MAP where it is better read.

    Of a file of others, or one that this process may not write to, the kernel says that all of it is in memory, whatever is
    (mincore(2)): so that nobody learns what others read. Where memory is rationed by addresses, maps would eat it up.
    """
    status = os.fstat(descriptor)
    is_published = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o222
    is_told = status.st_uid == os.geteuid()
    is_rationed = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if not is_published or not is_told or is_rationed or status.st_size == 0:
        return _NO_MAP
    address = _c_library().mmap(None, status.st_size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        return _NO_MAP
    for advice in (
        mmap.MADV_HUGEPAGE,
        mmap.MADV_RANDOM,
    ):  # who touches a byte fetches the large page around it, not the next as well
        _c_library().madvise(address, status.st_size, advice)
    return address, status.st_size


def _unmap(address: int, nbytes: int) -> None:
    if nbytes:
        _c_library().munmap(address, nbytes)


@functools.cache
def _c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library
