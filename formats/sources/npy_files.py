"""Arrays in .npy files and in .npz archives: where they lie, what they hold, and nothing unpickled.

The format is described in numpy.lib.format: a magic string, a version, a header that is a Python literal, the elements.
"""

import io
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from stagein.formats.errors import SourceError
from stagein.formats.schema import Field

from .files import SourceFile
from .tensors import BadTensorError, StoredArray, copy_little_endian, make_little_endian, row_count, tensor_field

_PIECE_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 17
_BAD_HEADER = (ValueError, TypeError, SyntaxError, tokenize.TokenError)
"""What numpy raises for headers that are none."""
_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises for archives that are none, damaged, encrypted, or compressed in a way of their own."""


def stored_array(file: SourceFile, descriptor: int) -> StoredArray:
    """The array of a .npy file. Raises BadTensorError unless the file is what its header says, whole and with nothing behind."""
    if not file.nbytes:
        raise BadTensorError(file.path, "the file is empty")
    with os.fdopen(descriptor, "rb", closefd=False) as stream:
        array = _read_header(file.path, stream)
    _refuse_other_size(array, file.nbytes)
    return array


def stored_rows(file: SourceFile, descriptor: int) -> StoredArray:
    """The array of rows of a .npy file. Raises SourceError when it is none."""
    try:
        array = stored_array(file, descriptor)
        row_count(file.path, array.shape)
    except BadTensorError as error:
        raise SourceError(str(error)) from None
    return array


def array_in(content: bytes | memoryview) -> NDArray[np.generic]:
    """The array of an .npy file in memory, over its bytes. Raises ValueError for anything that is no whole array of numbers."""
    stream = io.BytesIO(content[:_MAX_HEADER_BYTES])
    try:
        array = _read_header(Path(), stream)
    except BadTensorError as error:
        raise ValueError(error.reason) from None
    if array.offset + array.nbytes != len(content) and not array.dtype.hasobject:
        raise ValueError(f"it has {len(content)} bytes, its header promises {array.offset + array.nbytes}")
    return np.frombuffer(content, array.dtype, offset=array.offset).reshape(array.shape, order=array.order)


def array_field(array: StoredArray) -> Field:
    """The field for records that are such arrays. Raises BadTensorError when it holds no numbers."""
    return tensor_field(array.path, "its array", array.dtype, array.shape)


@contextmanager
def opened_npz(file: SourceFile) -> Iterator[zipfile.ZipFile]:
    """The archive of arrays in a .npz file. Raises BadTensorError when it is none, SourceError when it has changed."""
    with file.open() as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except _BAD_ARCHIVE as error:
            raise BadTensorError(file.path, f"it cannot be opened as .npz: {error}") from None
        with archive:
            yield archive


def npz_members(archive: zipfile.ZipFile) -> list[str]:
    """The names of the arrays in an archive."""
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


@contextmanager
def opened_member(path: Path, archive: zipfile.ZipFile, name: str) -> Iterator[tuple[StoredArray, IO[bytes]]]:
    """Array `name` of the archive in `path`: what it is, and a stream of its elements. Raises BadTensorError."""
    if name not in npz_members(archive):
        raise BadTensorError(path, f"it has no array {name}: it has {', '.join(npz_members(archive)) or 'none'}")
    try:
        with archive.open(f"{name}.npy") as stream:
            array = _read_header(path, stream)
            _refuse_other_size(array, archive.getinfo(f"{name}.npy").file_size)
            yield array, stream
    except _BAD_ARCHIVE as error:
        raise BadTensorError(path, f"its array {name} cannot be read: {error}") from None


def read_stream(array: StoredArray, stream: IO[bytes], target: memoryview) -> None:
    """Fill `target` with the elements of `array` that `stream` gives, as StoredArray.read does."""
    content = memoryview(bytearray(array.nbytes)) if array.fortran_order else target
    for start in range(0, array.nbytes, _PIECE_BYTES):
        piece = stream.read(min(_PIECE_BYTES, array.nbytes - start))
        content[start : start + len(piece)] = piece
    if array.fortran_order:
        copy_little_endian(np.frombuffer(content, array.dtype).reshape(array.shape, order="F"), target)
    else:
        make_little_endian(target, array.dtype)


def _read_header(path: Path, stream: IO[bytes]) -> StoredArray:
    try:
        version = npy_format.read_magic(stream)
        if version == (1, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran_order, dtype = npy_format.read_array_header_2_0(stream)
        else:  # 3.0 is for named columns
            raise ValueError(f"version {version[0]}.{version[1]} of the format holds no plain numbers")
    except _BAD_HEADER as error:
        raise BadTensorError(path, f"it has no .npy header: {str(error).splitlines()[0]}") from None
    return StoredArray(path, dtype, shape, stream.tell(), fortran_order)


def _refuse_other_size(array: StoredArray, nbytes: int) -> None:
    """An array of objects has no size to check: it is refused for what it is."""
    if array.dtype.hasobject or array.offset + array.nbytes == nbytes:
        return
    raise BadTensorError(
        array.path,
        f"it has {nbytes} bytes, its header promises {array.offset + array.nbytes}: "
        f"an array of shape {array.shape} of {array.dtype}",
    )
