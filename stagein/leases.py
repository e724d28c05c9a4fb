"""Who writes and who reads a staged data set: locks that the kernel takes back when their holder dies, however it dies.

A *writer's* lease is an exclusive lock of a file of its own, in which the holder says who it is. A *reader's* lease is a shared
lock of the folder with the copy: nothing has to be written in order to read. Whoever removes a copy takes both exclusively.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from .world import machine_name

_PATIENCE_SECONDS = 2.0
"""Whoever looks whether anybody reads takes the lock for an instant; a reader that meets this tries again for so long."""
_PAUSE_SECONDS = 0.01


class Owner(BaseModel):
    """A process, so that it is known again: its number means something only on that host, since that boot."""

    model_config = ConfigDict(frozen=True)

    pid: int
    host: str
    boot: str
    since: float
    """Unix time."""

    @classmethod
    def this_process(cls) -> Owner:
        return cls(pid=os.getpid(), host=socket.gethostname(), boot=machine_name(), since=time.time())

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """The owner that these bytes name, None when they name none."""
        with contextlib.suppress(ValidationError):
            return cls.model_validate_json(content)
        return None

    def to_bytes(self) -> bytes:
        return self.model_dump_json().encode() + b"\n"

    def is_dead(self) -> bool:
        """Whether it surely runs no more. Of a process on another host only that host knows."""
        if self.host != socket.gethostname():
            return False
        if self.boot != machine_name():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class WriterLease:
    """The right to change one staged data set on this node, until it is closed or its process dies."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    @classmethod
    def take(cls, path: Path) -> WriterLease | None:
        """The lease whose file is `path`; None while another process has it. Raises OSError."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            if not _lock(descriptor, fcntl.LOCK_EX):
                os.close(descriptor)
                return None
            if _is_still(descriptor, path):
                break
            os.close(descriptor)  # whoever had it before has removed it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, Owner.this_process().to_bytes(), 0)
        return cls(path, descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def remove(self) -> None:
        """Close it for good: nothing is left that it was for."""
        self._path.unlink(missing_ok=True)
        self.close()


def writer_of(path: Path) -> Owner | None:
    """The process that holds the writer's lease whose file is `path`, None when nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if _lock(descriptor, fcntl.LOCK_SH):
            return None
        return Owner.parse(os.pread(descriptor, 1024, 0)) or Owner(pid=0, host="an unknown host", boot="", since=0.0)
    finally:
        os.close(descriptor)


class ReaderLease:
    """Keeps a staged copy from being removed for as long as this object lives, here or in a process that inherits it."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError when the copy is gone or going. On a file system without locks nothing is held."""
        self._folder = folder
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        end = time.monotonic() + _PATIENCE_SECONDS
        with contextlib.suppress(OSError):
            while not _lock(self._descriptor, fcntl.LOCK_SH) and time.monotonic() < end:
                time.sleep(_PAUSE_SECONDS)
        if not _is_still(self._descriptor, folder):
            raise FileNotFoundError(f"{folder} is being removed")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it was never opened
            os.close(self._descriptor)

    def __reduce__(self) -> tuple[type[ReaderLease], tuple[Path]]:
        return ReaderLease, (self._folder,)


@contextlib.contextmanager
def no_readers(folder: Path) -> Iterator[bool]:
    """Keep readers out of a folder; yields whether that was possible: nobody has a reader's lease of it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        yield _lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def readers_of(folder: Path) -> list[int]:
    """Processes of this machine that hold a reader's lease of this folder, as far as /proc/locks shows them."""
    try:
        status = folder.stat()
        locks = Path("/proc/locks").read_text()
    except OSError:
        return []
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    rows = (line.split() for line in locks.splitlines())
    return sorted(int(words[4]) for words in rows if len(words) > 5 and words[1] == "FLOCK" and words[5] == place)


def _lock(descriptor: int, kind: int) -> bool:
    """Lock without waiting; whether it was free."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
