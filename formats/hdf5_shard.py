"""The HDF5 view of a shard: one contiguous data set for the payload, small data sets beside it, the Zarr index last.

Three traps shape this file (all tried with HDF5 1.14):
- Bytes past the end that HDF5 knows of are cut off by any later `r+` open, so the Zarr index is itself a data set. Shards
  are immutable after that: any edit would move the end and break the Zarr view.
- Only what is given room first and alone in a session lands exactly at the end of the file.
- Told of a full disk, HDF5 raises now an OSError and now a RuntimeError, keeps the file open, and writes again whenever one
  of its objects is freed, with a traceback that nobody can catch. So it hears of no failed write: `_Hdf5File` keeps it.
"""

import functools
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import h5py
import numpy as np
from numpy.typing import NDArray

from .checksums import pread_exactly
from .errors import StageinError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Attribute: TypeAlias = str | np.uint64 | tuple[int, ...]
"""Of a shard file; a tuple is the numbers of a version."""
SmallValues: TypeAlias = Mapping[str, NDArray[np.generic]]
"""Of the small data sets of a shard file, by name."""

_ZARR_INDEX = "zarr_index"
_ALIGN_ABOVE_BYTES = 65536
_ALIGNMENT_BYTES = 4096
_KEPT_SKELETONS, _KEPT_BYTES = 8, 4 << 20
"""So many are kept, if their small data sets have no more bytes: shards are often alike, field by field, and HDF5 takes milliseconds
for one, in which no other thread of ours runs."""


class _Hdf5File(io.FileIO):
    """The file that HDF5 writes through; the first write that failed is kept in `failure`, and none is tried after it."""

    failure: OSError | None = None

    def write(self, content: "ReadableBuffer", /) -> int:
        left = memoryview(content)
        nbytes = len(left)
        while left and self.failure is None:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                self.failure = error
        return nbytes


@contextmanager
def _open(file: Path | int, mode: Literal["w", "r+"]) -> Iterator[h5py.File]:
    """A session with a file, or its descriptor, to write to, closed when the block ends. Raises the OSError of the first write that
    failed."""
    with _Hdf5File(file, "w+" if mode == "w" else mode, closefd=isinstance(file, Path)) as raw:
        try:
            with h5py.File(
                raw,
                mode,
                libver=("v110", "v110"),
                alignment_threshold=_ALIGN_ABOVE_BYTES,
                alignment_interval=_ALIGNMENT_BYTES,
            ) as opened:
                yield opened
        finally:
            if raw.failure is not None:
                raise raw.failure


def _create_contiguous(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: str, allocation_time: int
) -> h5py.h5d.DatasetID:
    """Create a data set that HDF5 never fills; it is given room now, or when it is written."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(allocation_time)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)  # the same records must give the same bytes, whenever they are written
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    return h5py.h5d.create(
        file.id,
        name.encode(),
        # numpy's bool is an HDF5 enum in h5py; Zarr stores the same 0 and 1
        h5py.h5t.py_create(np.dtype(dtype), logical=True),
        h5py.h5s.create_simple(shape),
        dcpl=layout,
        lcpl=links,
    )


@dataclass(frozen=True)
class Hdf5Structure:
    """All of a shard file but values: what its payload is, its attributes, and its small data sets, (name, dtype, shape). Files of equal
    structure differ in nothing else.

    `dtypes` are the types of data sets that numpy has not, (name, type): their elements are the bits.
    """

    payload_name: str
    payload_shape: tuple[int, ...]
    payload_dtype: str
    small: tuple[tuple[str, np.dtype[np.generic], tuple[int, ...]], ...]
    attributes: tuple[tuple[str, Attribute], ...]
    dtypes: tuple[tuple[str, str], ...]

    @property
    def small_bytes(self) -> int:
        """Of all small data sets."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.small)

    def write(self, file: h5py.File, values: SmallValues) -> None:
        """Write the attributes and the small data sets."""
        for name, value in self.attributes:
            file.attrs[name] = np.array(value, np.uint16) if isinstance(value, tuple) else value
        for name, _, _ in self.small:
            file.create_dataset(name, data=values[name])

    def name_dtypes(self, file: h5py.File) -> None:
        """Say of which type the elements of data sets are that numpy has no type for."""
        for name, dtype in self.dtypes:
            file[name].attrs["dtype"] = dtype


@dataclass(frozen=True)
class Skeleton:
    """The bytes of a shard file before its payload and behind it; the Zarr index, if it has one, are the last `index_bytes`."""

    head: bytearray
    payload_bytes: int
    tail: bytearray
    index_bytes: int
    places: Mapping[str, int]
    """Where the small data sets start in the file."""

    @property
    def payload_offset(self) -> int:
        return len(self.head)

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(self.head) + self.payload_bytes + len(self.tail)

    def fill(self, values: SmallValues) -> None:
        """Give the small data sets their values."""
        for name, content in values.items():
            if content.size:
                self._put(self.places[name], content.tobytes())

    def fill_index(self, index: bytes) -> None:
        """Give the Zarr index its content."""
        self.tail[len(self.tail) - self.index_bytes :] = index

    def _put(self, offset: int, content: bytes) -> None:
        part = self.head
        if offset >= len(self.head):
            part, offset = self.tail, offset - len(self.head) - self.payload_bytes
        part[offset : offset + len(content)] = content


def create_skeleton(structure: Hdf5Structure, index_bytes: int) -> Skeleton:
    """All of a shard but its payload, with zeros in its small data sets and room for a Zarr index of so many bytes, if any."""
    if structure.small_bytes > _KEPT_BYTES:
        return _make_skeleton(structure, index_bytes)
    kept = _kept_skeleton(structure, index_bytes)
    return replace(kept, head=kept.head.copy(), tail=kept.tail.copy())


def _make_skeleton(structure: Hdf5Structure, index_bytes: int) -> Skeleton:
    zeros = {name: np.zeros(shape, dtype) for name, dtype, shape in structure.small}
    descriptor = os.memfd_create("shard")
    try:
        with _open(descriptor, "w") as file:
            structure.write(file, zeros)
            places = {name: file[name].id.get_offset() for name in zeros}
            payload = _create_contiguous(
                file,
                structure.payload_name,
                structure.payload_shape,
                structure.payload_dtype,
                h5py.h5d.ALLOC_TIME_EARLY,
            )
            structure.name_dtypes(file)
            offset, payload_bytes = int(payload.get_offset()), int(payload.get_storage_size())
        if index_bytes:
            append_zarr_index_room(descriptor, index_bytes)
        head, end = bytearray(offset), offset + payload_bytes
        tail = bytearray(os.fstat(descriptor).st_size - end)
        pread_exactly(descriptor, memoryview(head), 0)
        pread_exactly(descriptor, memoryview(tail), end)
    finally:
        os.close(descriptor)
    return Skeleton(head, payload_bytes, tail, index_bytes, places)


_kept_skeleton = functools.lru_cache(_KEPT_SKELETONS)(_make_skeleton)


def create_chunked(
    path: Path,
    structure: Hdf5Structure,
    values: SmallValues,
    hdf5_filter: tuple[int, tuple[int, ...]],
    records: Iterable[memoryview],
) -> NDArray[np.uint64]:
    """Write all of a shard, its payload as one filtered chunk a record; `records` are the chunks as they are stored.

    Returns the offset of each chunk in the file, in bytes.
    """
    import hdf5plugin  # noqa: F401 (registers the filters of our codecs)

    shape = structure.payload_shape
    with _open(path, "w") as file:
        structure.write(file, values)
        number, parameters = hdf5_filter
        dataset = file.create_dataset(
            structure.payload_name,
            shape,
            np.dtype(structure.payload_dtype),
            chunks=(1, *shape[1:]),
            compression=number,
            compression_opts=parameters,
            fill_time="never",
        )
        inner = (0,) * (len(shape) - 1)
        for row, content in enumerate(records):
            dataset.id.write_direct_chunk((row, *inner), content)
        structure.name_dtypes(file)
    return chunk_places(path, structure.payload_name)[:, 0]


def chunk_places(path: Path, name: str) -> NDArray[np.uint64]:
    """Offset and size in the file of every chunk of a payload of one chunk a record, [records, 2], in bytes."""
    with h5py.File(path, "r", locking=False) as file:
        dataset = file[name]
        places = np.zeros((len(dataset), 2), np.uint64)

        def note(chunk: h5py.h5d.StoreInfo) -> None:
            places[chunk.chunk_offset[0]] = chunk.byte_offset, chunk.size

        dataset.id.chunk_iter(note)  # get_chunk_info(i) walks the whole index for every i
    return places


def append_zarr_index_room(file: Path | int, nbytes: int) -> int:
    """Leave room for the Zarr shard index as the last bytes of a file, or of that of a descriptor; returns its offset in bytes."""
    with _open(file, "r+") as opened:
        _create_contiguous(opened, _ZARR_INDEX, (nbytes,), "uint8", h5py.h5d.ALLOC_TIME_LATE)
    with _open(file, "r+") as opened:
        index = opened[_ZARR_INDEX]
        index[...] = 0
        offset = int(index.id.get_offset())
    if offset + nbytes != os.stat(file).st_size:  # noqa: PTH116 (it may be a descriptor)
        raise StageinError(
            "HDF5 did not place the Zarr index at the end of a shard: report this with the version of h5py"
        )
    return offset


def read_small(path: Path, name: str) -> NDArray[np.generic] | None:
    """A small data set of a shard, whole; None where there is none."""
    with h5py.File(path, "r", locking=False) as file:
        found: NDArray[np.generic] | None = file[name][...] if name in file else None
        return found


def read_attributes(path: Path) -> dict[str, object]:
    """The attributes of a shard file."""
    with h5py.File(path, "r", locking=False) as file:
        return dict(file.attrs)


def payload_offset(path: Path, name: str) -> int:
    """Where the payload of a shard lies in the file, in bytes."""
    with h5py.File(path, "r", locking=False) as file:
        return int(file[name].id.get_offset())
