"""HDF5 files of tensors: a folder of files of one record each, or one file whose rows are the records.

The first is how DeepCAM is published (`climate/data`, `climate/labels_0` in every file), the second how it is repacked
(`data`, `labels`). The library finds the data sets; what lies in one piece is then read past it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import h5py
import numpy as np

from stagein.formats.errors import SourceError, UsageError
from stagein.formats.schema import Field, Schema, make_schema
from stagein.formats.source import Room, SourceRecord

from .files import SourceFile, find_files
from .tensors import (
    BadTensorError,
    RecordPlace,
    Sample,
    StoredArray,
    TensorFiles,
    TensorRows,
    common_row_count,
    refuse_any_shape,
    row_count,
    scan_samples,
    tensor_field,
)

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")

_KNOWN_FIELDS = (
    {"data": "climate/data", "label": "climate/labels_0"},  # DeepCAM
    {"data": "data", "label": "labels"},
)
_CACHE_BYTES = 256 << 20
"""The most memory for the chunks that a row of a data set lies in."""
_CACHE_SLOTS = 521
"""The library's own number of places for chunks, enough for few."""
_CACHE_POLICY = 0.75
"""The library's own; with 1 it keeps more than it may."""


@dataclass(frozen=True)
class Hdf5Samples:
    """Reads files of one record each; `paths` are the data sets of the fields, by the names of the fields."""

    paths: Mapping[str, str]

    def mark(self) -> object:
        return dict(self.paths)

    def fields(self, files: Sample) -> dict[str, Field]:
        (file,) = files
        with file.open(), _opened(file.path) as content:
            datasets = {name: _dataset(content, file.path, path) for name, path in self.paths.items()}
            return {name: _field(file.path, dataset, dataset.shape) for name, dataset in datasets.items()}

    def read(self, files: Sample, schema: Schema, room: Room) -> SourceRecord:
        (file,) = files
        place = RecordPlace(schema, room)
        with file.open() as descriptor, _opened(file.path) as content:
            for name, path in self.paths.items():
                dataset = _dataset(content, file.path, path)
                found = _field(file.path, dataset, dataset.shape)
                target = place.take(name, file.path, f"the data set {path}", found)
                stored = _stored_array(file.path, content, dataset)
                if stored is not None:
                    stored.read(descriptor, target)
                else:
                    _read_through_library(file.path, dataset, (), target)
        return place.record()


@dataclass(frozen=True)
class Hdf5Rows:
    """Reads the rows of the data sets `paths` of one file."""

    file: SourceFile
    paths: Mapping[str, str]
    shares_chunks: bool

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return (self.file,)

    def mark(self) -> object:
        return dict(self.paths)

    @contextmanager
    def open(self) -> Iterator[Callable[[int, str, memoryview], None]]:
        path = self.file.path
        with self.file.open() as descriptor, ExitStack() as stack:
            try:
                content = stack.enter_context(_opened(path))
                datasets = {name: _dataset_of_rows(content, path, wanted) for name, wanted in self.paths.items()}
            except BadTensorError as error:
                raise SourceError(str(error)) from None
            arrays = {name: _stored_array(path, content, dataset) for name, dataset in datasets.items()}

            def read_cell(number: int, name: str, target: memoryview) -> None:
                array = arrays[name]
                if array is not None:
                    array.row(number).read(descriptor, target)
                else:
                    _read_through_library(path, datasets[name], (number,), target)

            yield read_cell


def scan_hdf5(
    source: Path,
    *,
    fields: Mapping[str, str] | None = None,
    primary: str | None = None,
    pattern: str | None = None,
    any_shape: bool = False,
) -> TensorFiles | TensorRows:
    """The records of HDF5 files: of a folder, one a file in the order of their names; of one file, one a row.

    `fields` maps names of fields to data sets in the file, such as {"data": "climate/data", "label": "climate/labels_0"}.
    Without it, DeepCAM's data sets are taken, or `data` and `labels`, or the only one there is. `primary` is the field
    that fills the shards, by default the first. `pattern` narrows down the files of a folder, as `data-*.h5`; by default
    all are taken whose name ends in .h5, .hdf5, .hdf or .he5.

    In a folder most of a few files, from all over it, say what type and shape records have; files that differ are
    refused when they are read. Where more than a quarter of these differ in shape (and not in the number of extents), or with
    `any_shape`, all files are looked at, and records may have any extent where files differ. Raises SourceError when nothing can be read or rows do not match, and UsageError when
    the fields are not to be guessed, not there, or make no record.
    """
    is_wanted = _name_test(pattern)
    files = find_files(source, is_wanted, f"files {pattern or '*.h5, *.hdf5'}")
    if source.is_dir():
        return _scan_folder(source, files, fields, primary, any_shape=any_shape)
    refuse_any_shape(source, any_shape=any_shape)
    return _scan_file(files[0], fields, primary)


def _name_test(pattern: str | None) -> Callable[[str], bool]:
    if pattern is not None:
        return lambda name: fnmatchcase(name, pattern)
    return lambda name: name.lower().endswith(HDF5_SUFFIXES) and not name.startswith(".")


def _scan_folder(
    root: Path,
    files: tuple[SourceFile, ...],
    fields: Mapping[str, str] | None,
    primary: str | None,
    *,
    any_shape: bool,
) -> TensorFiles:
    def choose_reader(sample: Sample) -> Hdf5Samples:
        (file,) = sample
        with file.open(), _opened(file.path) as content:
            return Hdf5Samples(_choose_fields(file.path, content, fields))

    return scan_samples("hdf5", root, [(file,) for file in files], choose_reader, primary=primary, any_shape=any_shape)


def _scan_file(file: SourceFile, fields: Mapping[str, str] | None, primary: str | None) -> TensorRows:
    try:
        with file.open(), _opened(file.path) as content:
            paths = _choose_fields(file.path, content, fields)
            datasets = {name: _dataset(content, file.path, path) for name, path in paths.items()}
            shares_chunks = any(dataset.chunks is not None and dataset.chunks[0] > 1 for dataset in datasets.values())
            rows = {paths[name]: row_count(file.path, dataset.shape) for name, dataset in datasets.items()}
            found = {name: _field(file.path, dataset, dataset.shape[1:]) for name, dataset in datasets.items()}
    except BadTensorError as error:
        raise SourceError(str(error)) from None
    schema = make_schema(found, primary or next(iter(found)))
    reader = Hdf5Rows(file, paths, shares_chunks)
    return TensorRows("hdf5", file.path, schema, common_row_count(file.path, rows), reader)


def _choose_fields(path: Path, content: h5py.File, fields: Mapping[str, str] | None) -> dict[str, str]:
    """The data sets to read: those asked for, or those that are recognised."""
    if fields:
        return dict(fields)
    found = _dataset_paths(content)
    for known in _KNOWN_FIELDS:
        if set(known.values()) <= set(found):
            return dict(known)
    if len(found) == 1:
        return {"data": found[0]}
    if not found:
        raise BadTensorError(path, "it holds no data sets")
    listed = ", ".join(f"{name} {content[name].shape}" for name in found)
    raise UsageError(f"{path} holds {listed}: say by --field NAME=DATASET which of them are the fields of a record")


def _dataset_paths(content: h5py.File) -> list[str]:
    """All data sets in a file, however deep, sorted."""
    found: list[str] = []

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(name)

    content.visititems(note)
    return sorted(found)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The file, read without locks: parallel file systems often have none, and nobody writes what is converted.

    Raises BadTensorError when the library cannot make sense of it.
    """
    try:
        content = h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError) as error:
        raise BadTensorError(path, f"it cannot be opened as HDF5: {_first_line(error)}") from None
    with content:
        yield content


def _dataset(content: h5py.File, path: Path, wanted: str) -> h5py.Dataset:
    try:
        dataset = content.get(wanted)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise BadTensorError(path, f"its data set {wanted} cannot be opened: {_first_line(error)}") from None
    if not isinstance(dataset, h5py.Dataset):
        raise BadTensorError(
            path, f"it has no data set {wanted}: it has {', '.join(_dataset_paths(content)) or 'none'}"
        )
    if dataset.shape is None:
        raise BadTensorError(path, f"its data set {wanted} is empty: it has no shape")
    return dataset


def _dataset_of_rows(content: h5py.File, path: Path, wanted: str) -> h5py.Dataset:
    """The data set, with memory for the chunks of a row, so that those in which several rows lie are decompressed once."""
    dataset = _dataset(content, path, wanted)
    if dataset.chunks is None:
        return dataset
    row_chunks = math.prod(
        -(-extent // chunk) for extent, chunk in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)
    )
    row_bytes = row_chunks * math.prod(dataset.chunks) * dataset.dtype.itemsize
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_chunk_cache(max(_CACHE_SLOTS, 2 * row_chunks), min(row_bytes, _CACHE_BYTES), _CACHE_POLICY)
    del dataset  # while it is open, opening it again changes nothing
    return h5py.Dataset(h5py.h5d.open(content.id, wanted.encode(), access))


def _field(path: Path, dataset: h5py.Dataset, shape: tuple[int, ...]) -> Field:
    return tensor_field(path, f"the data set {dataset.name.lstrip('/')}", dataset.dtype, shape)


def _stored_array(path: Path, content: h5py.File, dataset: h5py.Dataset) -> StoredArray | None:
    """Where the elements lie in the file, None unless they lie there in one piece and exactly as numpy would have them."""
    if dataset.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS or dataset.file != content:
        return None
    offset = dataset.id.get_offset()
    as_numpy_has_it = dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype, logical=True))
    if offset is None or not as_numpy_has_it:  # never written, or in a raw file; or a type that the library converts
        return None
    return StoredArray(path, dataset.dtype, dataset.shape, offset)


def _read_through_library(path: Path, dataset: h5py.Dataset, row: tuple[int, ...], target: memoryview) -> None:
    """Fill `target` with the data set, or a row of it, by the library: it finds, decompresses and converts."""
    dtype = dataset.dtype.newbyteorder("<")
    try:
        dataset.read_direct(np.frombuffer(target, dtype).reshape(dataset.shape[len(row) :]), row or None)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadTensorError(
            path, f"its data set {dataset.name.lstrip('/')} cannot be read: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    """What the library says, without its later lines and the quotes of a KeyError."""
    return str(error.args[0] if error.args else error).splitlines()[0]
