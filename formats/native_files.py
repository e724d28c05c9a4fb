"""Object files of kernels on disk: each is made once a machine, by a process of its own, however many ask for it at once."""

import contextlib
import enum
import fcntl
import functools
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from .forks import renew_in_forks

_COMPILE_SECONDS = 300
_NICENESS = 10
"""Of compilers that nobody waits for: those that somebody does, and what the caller does meanwhile, come first."""


class _Maker(enum.Enum):
    """Who makes a file."""

    AT_WORK = enum.auto()
    ENDED = enum.auto()
    NOBODY = enum.auto()


class ObjectFile:
    """The object file of a kernel, found on disk or made by a process of our own, or by one of those who ask for the same file.

    Who makes it holds a lock on a file beside it, which goes with that process however it ends; it is removed by who ends in peace.
    For one thread at a time.
    """

    def __init__(self, path: Path, about: Sequence[str]) -> None:
        """about  what `native_compiler.main` is told of the kernel."""
        self._path, self._about = path, about
        self.content = _read(path)
        """What is in it; None as long as it is not there."""
        self._lock: int | None = None
        self._compiler: subprocess.Popen[bytes] | None = None
        self._patient_until = time.monotonic() + _COMPILE_SECONDS
        renew_in_forks(self)

    def renew(self) -> None:
        """Wait for the compiler as for that of any other process: it is the parent's."""
        if self._compiler is not None:
            self._compiler.returncode = 0  # or it were ended with this process
        self._compiler = None
        self._let_go()

    def is_settled(self, *, waits: bool) -> bool:
        """Whether it is there, or cannot be made. Until then somebody is making it: who asks again learns when that is done.

        waits  the caller does nothing until then.
        """
        if self.content is not None:
            return True
        maker = self._maker()
        if maker is _Maker.AT_WORK:
            return False
        self.content = _read(self._path)  # after that look: it may have come since the last one
        if self.content is not None or maker is _Maker.ENDED:
            self._let_go()
            return True
        return not self._start_compiler(0 if waits else _NICENESS)

    def _maker(self) -> _Maker:
        if time.monotonic() > self._patient_until:
            _end(self._compiler)
            return _Maker.ENDED
        if self._compiler is not None:
            return _Maker.AT_WORK if self._compiler.poll() is None else _Maker.ENDED
        try:
            if self._lock is None:
                self._lock = os.open(_lock_of(self._path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _Maker.NOBODY if os.fstat(self._lock).st_nlink else _Maker.ENDED
        except BlockingIOError:
            return _Maker.AT_WORK
        except OSError:  # a file system without locks: each makes its own
            return _Maker.NOBODY

    def _start_compiler(self, niceness: int) -> bool:
        """Whether it could be started. It sees the modules that this process sees, and has the lock from now on."""
        script = f"import os, sys; os.nice({niceness}); sys.path[:] = {sys.path!r}; from {__package__}.native_compiler import main; main()"
        try:
            self._compiler = subprocess.Popen(
                [sys.executable, "-c", script, *self._about, str(self._path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=() if self._lock is None else (self._lock,),
            )
        except OSError:
            return False
        finally:
            self._let_go()
        weakref.finalize(self, _end, self._compiler)  # also when the interpreter exits
        return True

    def _let_go(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def write(path: Path, object_file: bytes) -> None:
    """Keep code, with a sum before it: whoever runs what a full disk left of a file is lost."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(hashlib.sha256(object_file).digest() + object_file)
    part.replace(path)


def remove_lock(path: Path) -> None:
    """Tell those who wait for the file that its maker has ended, whether it is there or not."""
    with contextlib.suppress(OSError):
        _lock_of(path).unlink()


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    kept, object_file = content[:32], content[32:]
    return object_file if hashlib.sha256(object_file).digest() == kept else None


def _end(compiler: "subprocess.Popen[bytes] | None") -> None:
    if compiler is not None:
        compiler.kill()
        compiler.wait()


@functools.cache
def cache_folder() -> Path | None:
    """Where numba keeps its own: where it is told to, else beside our bytecode, else in the cache of the user; where that is not
    possible, among temporary files. None: nowhere."""
    if told := os.environ.get("NUMBA_CACHE_DIR"):
        folders = [Path(told)]
    else:
        of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "stagein"
        folders = [Path(__file__).parent / "__pycache__", of_user]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return _temporary_folder()


def _temporary_folder() -> Path | None:
    """A folder that only this user may write to, as what lies there is run; None: someone else was there first."""
    folder = Path(tempfile.gettempdir()) / f"stagein-kernels-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return folder if is_ours else None
