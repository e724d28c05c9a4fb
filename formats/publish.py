"""Publication of a file: it has its final name only when every byte of it is on the disk.

The order is restic's and every careful database's: write under a temporary name in the same folder, fsync the file,
rename it, fsync the folder. A crash at any point leaves either the old state or the new one, never half a file.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import destination_error

PART_SUFFIX = ".part"


def refuse_unwritable(folder: Path | None, action: str) -> None:
    """Raise a sentence that begins with `action`, where there is a folder and files cannot be made in it."""
    if folder is not None:
        try:
            check_writable(folder)
        except OSError as error:
            raise destination_error(error, action, folder) from None


def check_writable(folder: Path) -> None:
    """Raise OSError when files cannot be made in `folder`, or it cannot be made itself; better asked before hours of work."""
    folder = folder.absolute()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(there, os.W_OK | os.X_OK):
        trouble = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(trouble, os.strerror(trouble))


def fsync_file(path: Path) -> None:
    """Make the bytes of a file durable, whoever wrote them."""
    _fsync(path, os.O_RDONLY)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def publish_file(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, make it durable and give it its final name.

    When the block raises, the temporary file is removed and `path` is as it was before.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{PART_SUFFIX}")
    try:
        yield part
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def publish_bytes(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Publish a small file whose whole content is in memory."""
    with publish_file(path, mode=mode) as part:
        part.write_bytes(content)
