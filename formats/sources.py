"""Sources: which records a data set will have, in which order, found out before anything is read."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import SourceError
from .images import IMAGE_SUFFIXES
from .schema import Field, Schema

_SCAN_THREADS = 16
"""Folders listed at a time: on a parallel file system a stat is a round trip, on a local one it costs nothing more."""


@dataclass(frozen=True)
class FilePlan:
    """One file a record: paths below `root` in record order, with sizes and times of change, and a label for each.

    `refused` are files that cannot be records, with the reason for each.
    """

    kind: str
    root: Path
    schema: Schema
    paths: tuple[str, ...]
    nbytes: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    labels: NDArray[np.int64]
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _FoundFile:
    path: str
    nbytes: int
    mtime_ns: int


def plan_imagefolder(root: Path) -> FilePlan:
    """Plan the records of ROOT/<class>/**/<image>, as torchvision's ImageFolder has them.

    Labels number the class folders in sorted order; records are ordered by class, then by path. Files that are no
    images by their name, empty, or outside a class folder are refused. Raises SourceError when there is no class folder
    or a folder cannot be read.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
        classes = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise SourceError(f"{root} cannot be listed: {error.strerror}") from None
    if not classes:
        raise SourceError(f"{root} has no class folders: an image folder is ROOT/<class>/<image>")
    stray = [(entry.name, "it lies outside the class folders") for entry in entries if entry.name not in set(classes)]
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        found = list(pool.map(lambda name: sorted(_walk(root, name), key=lambda file: file.path.split("/")), classes))

    accepted: list[_FoundFile] = []
    labels: list[int] = []
    refused = stray
    encodings: set[str] = set()
    for label, files in enumerate(found):
        for file in files:
            suffix = os.path.splitext(file.path)[1].lower()  # noqa: PTH122 (a million of them: Path is ten times slower)
            if suffix not in IMAGE_SUFFIXES:
                refused.append((file.path, f"its name does not end in {', '.join(sorted(IMAGE_SUFFIXES))}"))
            elif file.nbytes == 0:
                refused.append((file.path, "the file is empty"))
            else:
                encodings.add(IMAGE_SUFFIXES[suffix])
                accepted.append(file)
                labels.append(label)
    return FilePlan(
        kind="imagefolder",
        root=root,
        schema=_image_schema(classes, encodings),
        paths=tuple(file.path for file in accepted),
        nbytes=np.array([file.nbytes for file in accepted], np.int64),
        mtime_ns=np.array([file.mtime_ns for file in accepted], np.int64),
        labels=np.array(labels, np.int64),
        refused=tuple(refused),
    )


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
                    if entry.is_dir():
                        pending.append(path)
                    else:
                        status = entry.stat()
                        yield _FoundFile(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise SourceError(f"{error.filename or root / current} cannot be read: {error.strerror}") from None
