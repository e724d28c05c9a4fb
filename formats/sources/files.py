"""The files of a source: found once, with size and time of change, and opened later only if they are still the same."""

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import SourceError, source_error

AnyFile = TypeVar("AnyFile")
AnyValue = TypeVar("AnyValue", bound=Hashable)

SCAN_THREADS = 16
"""Files looked at at a time: on a parallel file system each look is a round trip, on a local one it costs nothing more."""


@dataclass(frozen=True)
class SourceFile:
    """A file and what it was when it was found."""

    path: Path
    nbytes: int
    mtime_ns: int

    def mark(self) -> object:
        """What it was, as JSON."""
        return str(self.path), self.nbytes, self.mtime_ns

    @contextmanager
    def open(self) -> Iterator[int]:
        """A descriptor to read it by.

        Raises SourceError when it is gone, is not what it was when it was found, or cannot be read (which may turn out
        inside, too).
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                if (status.st_size, status.st_mtime_ns) != (self.nbytes, self.mtime_ns):
                    raise self.changed()
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise source_error(error, "reading", self.path) from None

    def changed(self) -> SourceError:
        """The error for a file that is not what it was."""
        return SourceError(f"{self.path} changed while it was converted: run the same command again when it is at rest")


def find_files(source: Path | Sequence[Path], is_wanted: Callable[[str], bool], wanted: str) -> tuple[SourceFile, ...]:
    """The files of a source: one file, a list of files as it is, or a folder's files with a wanted name, sorted by it.

    `wanted` says in words which names are wanted. Raises SourceError when there is none or one cannot be looked at.
    """
    try:
        paths = _paths(source, is_wanted)
    except OSError as error:
        raise source_error(error, "listing", source_name(source)) from None
    if not paths:
        raise SourceError(f"{source_name(source)} holds no {wanted}: name the folder that holds them, or the files")
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        return tuple(pool.map(_look_at, paths))


def used_files(
    files: Sequence[AnyFile], file_numbers: NDArray[np.int64]
) -> tuple[tuple[AnyFile, ...], NDArray[np.int64]]:
    """Those of `files` that the records with these file numbers lie in, and the number of each record's among them."""
    used, renumbered = np.unique(file_numbers, return_inverse=True)
    return tuple(files[number] for number in used.tolist()), renumbered.astype(np.int64)


def most_common(values: Iterable[AnyValue]) -> AnyValue:
    """The value that is there most often, of several such the first. Raises ValueError when there is none."""
    return max(Counter(values).items(), key=lambda counted: counted[1])[0]


def source_name(source: Path | Sequence[Path]) -> str:
    """What errors call a source that is one path or a list of them."""
    if isinstance(source, Path):
        return str(source)
    if not source:
        return "the list of files"
    return str(source[0]) if len(source) == 1 else f"{source[0]} … {source[-1]}"


def _paths(source: Path | Sequence[Path], is_wanted: Callable[[str], bool]) -> list[Path]:
    if not isinstance(source, Path):
        return list(source)
    if not source.is_dir():
        return [source]
    return [source / name for name in sorted(os.listdir(source)) if is_wanted(name)]  # noqa: PTH208 (names, not paths)


def _look_at(path: Path) -> SourceFile:
    try:
        status = path.stat()
    except OSError as error:
        raise source_error(error, "reading", path) from None
    if not S_ISREG(status.st_mode):
        raise SourceError(f"{path} is no file: name the files themselves, or the folder they lie in")
    return SourceFile(path, status.st_size, status.st_mtime_ns)
