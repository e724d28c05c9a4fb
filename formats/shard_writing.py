"""The file of one large field in one shard: laid out, its payload written, then all else, then published."""

import contextlib
import json
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import hdf5_shard, zarr_view
from .checksums import pwrite_all
from .hdf5_shard import Attribute, Hdf5Structure, Skeleton, SmallValues
from .manifest import ShardEntry
from .payload import FieldContent
from .payload_file import PayloadFile, first_sums
from .publish import publish_file
from .schema import BFLOAT16, Field, Schema
from .shards import ShardContent, ShardLayout, shard_path

SHARD_MODE = 0o444


class ShardFile:
    """The file of the large field `name` in shard `number` of the data set at `folder`: written, then published or discarded, in any
    thread, mostly off the GIL. Raises OSError as the file system does.
    """

    def __init__(self, folder: Path, number: int, first: int, name: str, layout: ShardLayout) -> None:
        self._relative = shard_path(number, name, layout.schema, layout.container)
        self._path = folder / self._relative
        self._first = first
        self._name = name
        self._layout = layout
        self._laid_out: _LaidOut | None = None
        self._publication = contextlib.ExitStack()
        self._sums = ""
        self._offset = np.empty(0, np.uint64)
        self._data_offset = self._nbytes = self._records = 0

    def lay_out(self, expected: ShardContent) -> PayloadFile:
        """Begin with the file before its content is known: the payload may be written from now on, and stays where it is if
        `expected` differs from the content in nothing but values. There is no codec."""
        self._laid_out = _LaidOut(self._open(), self._name, expected, self._layout)
        return self._laid_out.file

    def write(self, content: ShardContent) -> None:
        """Write all that is not written; the memory of the payload is not needed any more then."""
        mine = content.large_fields[self._name]
        if self._layout.schema.fields[self._name].codec is not None and "hdf5" in self._layout.container:
            self._write_chunked(content)
        else:
            self._write_plainly(content)
        self._records = content.records
        mine.pieces.clear()

    def publish(self) -> tuple[ShardEntry, NDArray[np.uint64]]:
        """Have the file on the disk, and give it its name. Returns its manifest entry and the offset of every record in it."""
        self._publication.close()
        entry = ShardEntry(
            file=self._relative,
            nbytes=self._nbytes,
            xxh3_128=self._sums,
            field=self._name,
            records=self._records,
            first=self._first,
            data_offset=self._data_offset,
        )
        return entry, self._offset

    def discard(self) -> None:
        """Leave nothing of it, unless it is published."""
        if self._laid_out is not None:
            self._laid_out.close()
        with contextlib.suppress(_DiscardedError), self._publication:
            raise _DiscardedError

    def _open(self) -> int:
        """Make the file, under a temporary name; its descriptor."""
        self._path.parent.mkdir(exist_ok=True)
        self._part = self._publication.enter_context(publish_file(self._path, mode=SHARD_MODE))
        return os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def _write_plainly(self, content: ShardContent) -> None:
        """The payload, which HDF5 only knows of, is written by us."""
        mine = content.large_fields[self._name]
        laid_out = self._laid_out
        if laid_out is None:
            laid_out = self._laid_out = _LaidOut(self._open(), self._name, content, self._layout)
        elif not laid_out.is_for(content):
            payload = laid_out.written_payload(mine.payload_bytes)
            self.discard()
            laid_out = self._laid_out = _LaidOut(self._open(), self._name, content, self._layout)
            laid_out.file.append([payload], mine.nbytes)
        self._offset = mine.offset + np.uint64(laid_out.skeleton.payload_offset)
        self._data_offset, self._nbytes = laid_out.skeleton.payload_offset, laid_out.skeleton.nbytes
        self._sums = laid_out.finish(content, self._offset).hex()
        laid_out.close()

    def _write_chunked(self, content: ShardContent) -> None:
        """HDF5 writes the payload, a chunk a record."""
        name, layout, mine = self._name, self._layout, content.large_fields[self._name]
        field = layout.schema.fields[name]
        assert field.codec is not None
        hdf5_filter = field.codec.hdf5_filter(field.stored_dtype.itemsize, field.record_bytes)
        descriptor = self._open()
        try:
            structure, values = _structure(name, content, layout.schema), _small_values(name, content, layout.schema)
            self._offset = hdf5_shard.create_chunked(self._part, structure, values, hdf5_filter, mine.records())
            self._data_offset = int(self._offset.min())
            if "zarr" in layout.container:
                room = zarr_view.index_nbytes(layout.inner_chunks(name))
                place = hdf5_shard.append_zarr_index_room(self._part, room)
                index = layout.zarr_index(name, self._data_offset, mine.payload_bytes, self._offset, mine.nbytes)
                pwrite_all(descriptor, index, place)
            self._nbytes = os.fstat(descriptor).st_size
            self._sums = b"".join(first_sums(descriptor, self._nbytes, layout.chunk_bytes)).hex()
        finally:
            os.close(descriptor)


class _DiscardedError(Exception):
    """The file is not to be published."""


class _LaidOut:
    """The file behind `descriptor`, which is this one's, laid out for content like `expected` without a codec."""

    def __init__(self, descriptor: int, name: str, expected: ShardContent, layout: ShardLayout) -> None:
        self._descriptor = descriptor
        self._name = name
        self._layout = layout
        self._structure = _structure(name, expected, layout.schema)
        payload_bytes = expected.large_fields[name].payload_bytes
        index_bytes = zarr_view.index_nbytes(layout.inner_chunks(name)) if "zarr" in layout.container else 0
        if layout.container == "zarr":
            self.skeleton = Skeleton(bytearray(), payload_bytes, bytearray(index_bytes), index_bytes, {})
        else:
            self.skeleton = hdf5_shard.create_skeleton(self._structure, index_bytes)
        self.file = PayloadFile(descriptor, self.skeleton.payload_offset, payload_bytes, layout.chunk_bytes)
        pwrite_all(descriptor, self.skeleton.head, 0)  # the disk then has the file in one run

    def is_for(self, content: ShardContent) -> bool:
        """Whether the content is like what was expected."""
        return self._structure == _structure(self._name, content, self._layout.schema)

    def written_payload(self, nbytes: int) -> memoryview:
        """The payload that was written, also when this is closed and the file removed."""
        start = self.skeleton.payload_offset
        return memoryview(mmap.mmap(self._descriptor, start + nbytes, prot=mmap.PROT_READ))[start:]

    def finish(self, content: ShardContent, offset: NDArray[np.uint64]) -> bytes:
        """Write what there is of the payload in memory, and all else; `offset` are those of the records in the file. Returns the sums
        of its chunks."""
        name, mine = self._name, content.large_fields[self._name]
        if mine.pieces:
            mine.crc32c[:] = self.file.append(mine.pieces, mine.nbytes)
        if self.skeleton.places:
            self.skeleton.fill(_small_values(name, content, self._layout.schema))
        if self.skeleton.index_bytes:
            start = self.skeleton.payload_offset
            self.skeleton.fill_index(self._layout.zarr_index(name, start, mine.payload_bytes, offset, mine.nbytes))
        return self.file.finish(self.skeleton.head, self.skeleton.tail)

    def close(self) -> None:
        """Nothing is written any more; may be called again."""
        self.file.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _structure(name: str, content: ShardContent, schema: Schema) -> Hdf5Structure:
    """The file of a large field; the columns stand in that of the primary one."""
    field = schema.fields[name]
    data_names = {name: f"{name}/data"}
    if name == schema.primary:
        data_names |= {column: column for column in content.columns}
        data_names |= {column: f"{column}/data" for column in content.ragged_columns}
    return Hdf5Structure(
        f"{name}/data",
        (content.rows(name, field), *field.row_shape),
        field.stored_dtype.name,
        tuple((path, values.dtype, values.shape) for path, values in _small_values(name, content, schema).items()),
        tuple(shard_attributes(schema, name, content.records).items()),
        tuple(
            (path, BFLOAT16) for each, path in data_names.items() if schema.fields[each].array_dtype_name == BFLOAT16
        ),
    )


def _small_values(name: str, content: ShardContent, schema: Schema) -> SmallValues:
    """The small data sets in the file of a large field."""
    field, mine = schema.fields[name], content.large_fields[name]
    small: dict[str, NDArray[np.generic]] = {f"{name}/crc32c": mine.crc32c, **_hdf5_places(name, field, mine)}
    if name == schema.primary:
        small |= content.columns
        for column, values in content.ragged_columns.items():
            declared = schema.fields[column]
            small[f"{column}/data"] = np.frombuffer(values.pieces[0], declared.stored_dtype).reshape(
                -1, *declared.row_shape
            )
            small |= _hdf5_places(column, declared, values)
    return small


def shard_attributes(schema: Schema, name: str, records: int) -> dict[str, Attribute]:
    """The HDF5 attributes of a shard file of the field `name`."""
    return {
        "stagein_format": "stagein-shard",
        "stagein_version": schema.format_version,
        "schema": json.dumps(schema.model_dump(mode="json"), sort_keys=True),
        "field": name,
        "num_records": np.uint64(records),
        "checksum": "crc32c",
    }


def _hdf5_places(name: str, field: Field, content: FieldContent) -> dict[str, NDArray[np.generic]]:
    """Where the records of a field are in its data set, and how long, in rows; of bytes it is their number."""
    if not field.is_variable:
        return {}
    row_bytes = np.uint64(field.row_bytes)
    return {
        f"{name}/offset": content.offset // row_bytes,
        hdf5_count_name(name, field): content.nbytes.astype(np.uint64) // row_bytes,
    }


def hdf5_count_name(name: str, field: Field) -> str:
    """The data set with the rows of every record of a field whose records differ in size."""
    return f"{name}/{'count' if field.kind == 'ragged' else 'nbytes'}"
