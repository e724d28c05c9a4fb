"""A folder of class folders of images, as torchvision's ImageFolder has it: one file a record."""

import errno
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from stagein.formats.checksums import pread_exactly
from stagein.formats.errors import SourceError
from stagein.formats.images import IMAGE_SUFFIXES, BadImageError, read_header
from stagein.formats.native_code import NativeKernel
from stagein.formats.schema import Field, Schema
from stagein.formats.source import BatchRoom, RecordBatch, RefusedRecord, Room, SourceRecord

_read_images = NativeKernel("stagein.formats.write_kernels", "read_images")

_BATCH_FILES = 64
_BATCH_BYTES = 16 << 20
_WORTHWHILE_FILES = 64
"""Fewer are read one by one, before the machine code of a kernel is in memory."""
_SCAN_THREADS = 16
"""Folders listed at a time: on a parallel file system a stat is a round trip, on a local one it costs nothing more."""


@dataclass(frozen=True)
class ImageFolder:
    """The images below `root`: paths in record order, with sizes, times of change, and a label for each."""

    root: Path
    schema: Schema
    paths: tuple[str, ...]
    nbytes: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    labels: NDArray[np.int64]
    refused: tuple[RefusedRecord, ...]
    kind: str = "imagefolder"
    secondary_nbytes: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.root)

    def identity(self) -> object:
        return self.paths, self.nbytes.tolist(), self.labels.tolist()

    def part(self, numbers: NDArray[np.int64]) -> "ImageFiles":
        columns = self.nbytes[numbers], self.mtime_ns[numbers], self.labels[numbers]
        paths = tuple(self.paths[number] for number in numbers.tolist())
        return ImageFiles(self.root, paths, *(tuple(column.tolist()) for column in columns))


@dataclass(frozen=True)
class ImageFiles:
    """Some of the images of a folder, and what they were when the folder was listed."""

    root: Path
    paths: tuple[str, ...]
    nbytes: tuple[int, ...]
    mtime_ns: tuple[int, ...]
    labels: tuple[int, ...]

    def mark(self) -> object:
        return str(self.root), self.paths, self.nbytes, self.mtime_ns, self.labels

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)  # names below it are then looked up in fewer steps
        try:
            for path, nbytes, label in zip(self.paths, self.nbytes, self.labels, strict=True):
                content = room("image", nbytes)
                self._read_file(root, path, content)
                try:
                    header = read_header(content)
                except BadImageError as error:
                    yield RefusedRecord(path, str(error))
                else:
                    yield SourceRecord({"label": label, "hw": (header.height, header.width)})
        finally:
            os.close(root)

    def prepare(self) -> None:
        if self._is_worthwhile:
            bytes_, places, numbers = np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.int32)
            _read_images.prepare(0, bytes_, places, places, bytes_, numbers.reshape(0, 2), numbers, places)

    @property
    def _is_worthwhile(self) -> bool:
        """Whether a kernel reads these files."""
        return len(self.paths) >= _WORTHWHILE_FILES

    def read_batches(self, room: BatchRoom) -> Iterator[RecordBatch]:
        nbytes, labels = np.array(self.nbytes, np.int64), np.array(self.labels, np.int64)
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for run in _batches(nbytes):
                content = room("image", nbytes[run])
                sizes = (self._read_together if self._is_worthwhile else self._read_one_by_one)(root, run, content)
                refused = self._judge_others(run, content, sizes)
                kept = sizes[:, 0] > 0
                if refused:
                    _close_gaps(content, nbytes[run], kept)
                columns: dict[str, NDArray[np.generic]] = {"label": labels[run][kept], "hw": sizes[kept]}
                yield RecordBatch({"image": nbytes[run][kept]}, columns, tuple(refused))
        finally:
            os.close(root)

    def _read_together(self, root: int, run: slice, content: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Read a run of files; returns sizes of images, as far as they are known."""
        nbytes, names = np.array(self.nbytes[run], np.int64), [os.fsencode(path) + b"\0" for path in self.paths[run]]
        ends = np.cumsum([len(name) for name in names])
        starts, blob = np.concatenate(([0], ends[:-1])), np.frombuffer(b"".join(names), np.uint8)
        sizes, descriptors = np.empty((len(names), 2), np.int32), np.empty(len(names), np.int32)
        memory = np.zeros(2 * len(names) + 3, np.int64)
        done, trouble = _read_images(root, blob, starts, nbytes, content, sizes, descriptors, memory)
        if trouble:
            self._raise_unreadable(self.paths[run][done], trouble)
        return sizes

    def _read_one_by_one(self, root: int, run: slice, content: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The same, without a kernel."""
        start = 0
        for path, nbytes in zip(self.paths[run], self.nbytes[run], strict=True):
            self._read_file(root, path, memoryview(content)[start : start + nbytes])
            start += nbytes
        return np.zeros((len(self.paths[run]), 2), np.int32)

    def _judge_others(self, run: slice, content: NDArray[np.uint8], sizes: NDArray[np.int32]) -> list[RefusedRecord]:
        """Find the sizes of those files of a run of which nothing is known yet; returns those that are no images."""
        refused = []
        ends = np.cumsum(self.nbytes[run])
        for number in np.flatnonzero(sizes[:, 0] == 0).tolist():
            try:
                header = read_header(memoryview(content)[ends[number] - self.nbytes[run][number] : ends[number]])
            except BadImageError as error:
                refused.append(RefusedRecord(self.paths[run][number], str(error)))
            else:
                sizes[number] = header.height, header.width
        return refused

    def _raise_unreadable(self, path: str, trouble: int) -> NoReturn:
        if trouble > 0:
            raise SourceError(f"{self.root / path} cannot be read: {os.strerror(trouble)}")
        raise SourceError(
            f"{self.root / path} changed its size while it was converted: run the same command again when it is at rest"
        )

    def _read_file(self, root: int, path: str, content: memoryview) -> None:
        """Fill `content` with a file that must be as long as it was when it was listed."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
            try:
                got = pread_exactly(descriptor, content, 0)
                grown = os.pread(descriptor, 1, len(content))
            finally:
                os.close(descriptor)
        except OSError as error:
            self._raise_unreadable(path, error.errno or errno.EIO)
        if got != len(content) or grown:
            self._raise_unreadable(path, 0)


def _batches(nbytes: NDArray[np.int64]) -> Iterator[slice]:
    """Runs of files that are read by one call."""
    first = 0
    while first < len(nbytes):
        ends = np.cumsum(nbytes[first : first + _BATCH_FILES])
        count = max(1, int(np.searchsorted(ends, _BATCH_BYTES, side="right")))
        yield slice(first, first + count)
        first += count


def _close_gaps(content: NDArray[np.uint8], nbytes: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
    """Move what is kept of the records in `content` together."""
    position, start = 0, 0
    for size, is_kept in zip(nbytes.tolist(), kept.tolist(), strict=True):
        if is_kept:
            content[position : position + size] = content[start : start + size]
            position += size
        start += size


@dataclass(frozen=True)
class _FoundFile:
    path: str
    nbytes: int
    mtime_ns: int
    trouble: str = ""
    """Why it is not looked into, if it is not."""


def scan_imagefolder(root: Path) -> ImageFolder:
    """Find the images of ROOT/<class>/**/<image>.

    Labels number the class folders in sorted order; records are ordered by class, then by path. Links are
    followed. Files that are no images by their name, empty, or outside a class folder are refused, and links that lead nowhere
    or in a circle. Raises SourceError when there is no class folder, a folder cannot be read, or the name of a class is no text.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
        classes = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise SourceError(f"{root} cannot be listed: {error.strerror}") from None
    if not classes:
        raise SourceError(f"{root} has no class folders: an image folder is ROOT/<class>/<image>")
    for name in classes:
        _refuse_unreadable_name(root, name)
    refused = [
        RefusedRecord(entry.name, "it lies outside the class folders")
        for entry in entries
        if entry.name not in set(classes)
    ]
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        found = list(pool.map(lambda name: sorted(_walk(root, name), key=lambda file: file.path.split("/")), classes))

    accepted: list[_FoundFile] = []
    labels: list[int] = []
    encodings: set[str] = set()
    for label, files in enumerate(found):
        for file in files:
            suffix = os.path.splitext(file.path)[1].lower()  # noqa: PTH122 (a million of them: Path is ten times slower)
            if file.trouble:
                refused.append(RefusedRecord(file.path, file.trouble))
            elif suffix not in IMAGE_SUFFIXES:
                reason = f"its name does not end in {', '.join(sorted(IMAGE_SUFFIXES))}"
                refused.append(RefusedRecord(file.path, reason))
            elif file.nbytes == 0:
                refused.append(RefusedRecord(file.path, "the file is empty"))
            else:
                encodings.add(IMAGE_SUFFIXES[suffix])
                accepted.append(file)
                labels.append(label)
    return ImageFolder(
        root=root,
        schema=_image_schema(classes, encodings),
        paths=tuple(file.path for file in accepted),
        nbytes=np.array([file.nbytes for file in accepted], np.int64),
        mtime_ns=np.array([file.mtime_ns for file in accepted], np.int64),
        labels=np.array(labels, np.int64),
        refused=tuple(refused),
    )


def _refuse_unreadable_name(root: Path, name: str) -> None:
    """The manifest, which is UTF-8, names the classes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceError(f"{root}: the name of the class folder {name!r} is no UTF-8: rename it") from None


def _image_schema(classes: list[str], encodings: set[str]) -> Schema:
    image = Field(
        kind="encoded",
        dtype="uint8",
        shape=(None, None, 3),
        encoding=encodings.pop() if len(encodings) == 1 else "image",
        dims=("height", "width", "channel"),
    )
    label = Field(kind="tensor", dtype="int64", meta={"classes": classes})
    size = Field(kind="tensor", dtype="int32", shape=(2,), dims=("height_width",))
    return Schema(fields={"image": image, "label": label, "hw": size}, primary="image")


def _walk(root: Path, folder: str) -> Iterator[_FoundFile]:
    """All files below root/folder, by their path below root."""
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(root / current) as entries:
                for entry in entries:
                    path = f"{current}/{entry.name}"
                    if trouble := _link_trouble(root / current, entry):
                        yield _FoundFile(path, 0, 0, trouble)
                    elif entry.is_dir():
                        pending.append(path)
                    else:
                        status = entry.stat()
                        yield _FoundFile(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise SourceError(f"{error.filename or root / current} cannot be read: {error.strerror}") from None


def _link_trouble(folder: Path, entry: os.DirEntry[str]) -> str:
    """Why an entry of `folder` is a link not to follow; nothing when it is none, or a good one."""
    if not entry.is_symlink():
        return ""
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return "it is a link that leads nowhere"
        raise
    above = folder.absolute()
    if S_ISDIR(status.st_mode) and any(os.path.samestat(status, each.stat()) for each in (above, *above.parents)):
        return "it is a link to a folder that it lies in"
    return ""
