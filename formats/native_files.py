"""Object files of kernels on disk, and the locks of those who make them."""

import contextlib
import fcntl
import functools
import hashlib
import os
import stat
import tempfile
from pathlib import Path


def read(path: Path) -> bytes | None:
    """The code that `write` kept there, whole; None where there is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    kept, object_file = content[:32], content[32:]
    return object_file if hashlib.sha256(object_file).digest() == kept else None


def write(path: Path, object_file: bytes) -> None:
    """Keep code, with a sum before it: whoever runs what a full disk left of a file is lost."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(hashlib.sha256(object_file).digest() + object_file)
    part.replace(path)


class Lock:
    """The lock of who makes a file, on a file beside it; where the file system has no locks each makes its own.

    It goes with the processes that have its descriptor, however they end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor: int | None = None

    def take(self) -> bool:
        """Whether it is ours now: somebody else is making the file otherwise."""
        try:
            if self.descriptor is None:
                self.descriptor = os.open(_lock_of(self._path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            self.let_go()
        return True

    @property
    def is_removed(self) -> bool:
        """Whether whom we waited for has ended making the file: it is there now, or cannot be made."""
        return self.descriptor is not None and not os.fstat(self.descriptor).st_nlink

    def let_go(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def remove_lock(path: Path) -> None:
    """Tell those who wait for the file that its maker has ended, whether it is there or not."""
    with contextlib.suppress(OSError):
        _lock_of(path).unlink()


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


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
