"""Shards: how records are dealt to them (pure), and how one is written.

A shard is assembled in memory at its final layout, so that its bytes are touched once: summed, hashed, written.
"""

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import hdf5_shard, zarr_view
from .checksums import Buffer, chunk_sums, crc32c, pread_exactly, pwrite_all
from .errors import UsageError
from .manifest import FORMAT_VERSION, Container, ShardEntry
from .publish import publish_file
from .schema import Schema

DEFAULT_SHARD_BYTES = 256 << 20
MAX_RECORD_BYTES = 2**32 - 1
SHARD_MODE = 0o444
_WRITE_BYTES = 16 << 20


@dataclass(frozen=True)
class ShardPlan:
    """Shard `number` holds the `records` records from `first` on, with `payload_bytes` of padded payload."""

    number: int
    first: int
    records: int
    payload_bytes: int


def padded_payload_bytes(nbytes: int) -> int:
    """Payload of an `encoded` field, padded to whole inner chunks of the Zarr view; never empty, so that it is aligned."""
    inner = zarr_view.INNER_CHUNK_BYTES
    return max(inner, -(-nbytes // inner) * inner)


def plan_encoded_shards(nbytes: NDArray[np.int64], shard_bytes: int) -> list[ShardPlan]:
    """Deal records of these sizes to shards in order, as many as fit into `shard_bytes`; a larger one gets its own."""
    ends = np.cumsum(nbytes, dtype=np.int64)
    plans: list[ShardPlan] = []
    first = 0
    while first < len(nbytes):
        start = int(ends[first] - nbytes[first])
        stop = max(first + 1, int(np.searchsorted(ends, start + shard_bytes, side="right")))
        plans.append(ShardPlan(len(plans), first, stop - first, padded_payload_bytes(int(ends[stop - 1]) - start)))
        first = stop
    return plans


def plan_tensor_shards(num_records: int, record_bytes: int, shard_bytes: int) -> list[ShardPlan]:
    """Deal `num_records` of `record_bytes` each to shards in order, equally many to each but the last."""
    each = tensor_shard_records(record_bytes, shard_bytes)
    return [
        ShardPlan(number, first, min(each, num_records - first), min(each, num_records - first) * record_bytes)
        for number, first in enumerate(range(0, num_records, each))
    ]


def plan_shards(schema: Schema, nbytes: NDArray[np.int64], shard_bytes: int) -> tuple[list[ShardPlan], int]:
    """Deal records of these sizes, before compression, to shards; returns the shards and their common capacity."""
    field = schema.primary_field
    if field.kind == "encoded":
        plans = plan_encoded_shards(nbytes, shard_bytes)
        return plans, encoded_capacity(plans, shard_bytes)
    plans = plan_tensor_shards(len(nbytes), field.record_bytes, shard_bytes)
    return plans, tensor_shard_records(field.record_bytes, shard_bytes)


def tensor_shard_records(record_bytes: int, shard_bytes: int) -> int:
    """Records in a full shard of a `tensor` field."""
    return max(1, shard_bytes // max(record_bytes, 1))


def encoded_capacity(plans: list[ShardPlan], shard_bytes: int) -> int:
    """The common capacity of the shards of an `encoded` field in the Zarr view: the largest payload of all."""
    return max([padded_payload_bytes(shard_bytes), *(plan.payload_bytes for plan in plans)])


def shard_path(number: int, container: Container) -> str:
    """Where shard `number` lies below the data set."""
    return f"shards/{number:05d}.{'zarr-shard' if container == 'zarr' else 'h5'}"


class PayloadBuffer:
    """Page-aligned memory for the payload of one shard, reused for the next: fresh pages cost more than copying."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def view(self, nbytes: int) -> memoryview:
        """Room for `nbytes` bytes; what was there before is still in it. Earlier views of this buffer are void."""
        if len(self._memory) < nbytes:
            self._memory = mmap.mmap(-1, nbytes)
        return memoryview(self._memory)[:nbytes]


@dataclass(frozen=True)
class ShardContent:
    """What goes into a shard: the payload as it is stored, and for each record where in it its bytes are, and their crc32c."""

    payload: memoryview
    offset: NDArray[np.uint64]
    nbytes: NDArray[np.uint32]
    crc32c: NDArray[np.uint32]
    columns: Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class ShardLayout:
    """What all shards of a data set have in common."""

    schema: Schema
    container: Container
    capacity: int
    chunk_bytes: int

    @property
    def inner_chunks(self) -> int:
        """Entries of the Zarr index of a shard."""
        encoded = self.schema.primary_field.kind == "encoded"
        return self.capacity // zarr_view.INNER_CHUNK_BYTES if encoded else self.capacity

    def zarr_index(
        self, data_offset: int, payload_bytes: int, offset: NDArray[np.uint64], nbytes: NDArray[np.uint32]
    ) -> bytes:
        """The Zarr index of a shard: of the inner chunks of its payload, or of its records at `offset` in the file."""
        if self.schema.primary_field.kind == "encoded":
            inner = zarr_view.INNER_CHUNK_BYTES
            offset = np.arange(data_offset, data_offset + payload_bytes, inner, dtype=np.uint64)
            return zarr_view.encode_index(offset, np.full(len(offset), inner, np.uint64), self.inner_chunks)
        return zarr_view.encode_index(offset, nbytes.astype(np.uint64), self.inner_chunks)


class ShardBuilder:
    """Collects the records of one shard in memory at their places: read into `room`, then added, then written."""

    def __init__(self, layout: ShardLayout, buffer: PayloadBuffer, records: int, payload_bytes: int) -> None:
        """Room for `records` records of `payload_bytes` in all, before compression; `buffer` is this builder's until the next."""
        field = layout.schema.primary_field
        self._layout = layout
        self._codec = field.codec
        self._payload = buffer.view(
            records * self._codec.most_stored_bytes(field.record_bytes) if self._codec else payload_bytes
        )
        self._record = memoryview(bytearray(field.record_bytes if self._codec else 0))
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._sums: list[int] = []
        self._columns: dict[str, list[ArrayLike]] = {name: [] for name in layout.schema.columns}
        self.used_bytes = 0

    @property
    def records(self) -> int:
        return len(self._sizes)

    def room(self, nbytes: int) -> memoryview:
        """Where the next record's primary field goes, `nbytes` long; asked for again, it is the same place."""
        return self._record if self._codec else self._payload[self.used_bytes : self.used_bytes + nbytes]

    def add(self, nbytes: int, columns: Mapping[str, ArrayLike]) -> None:
        """The record in the room is whole; `columns` are its small fields."""
        field = self._layout.schema.primary_field
        if self._codec:
            stored = self._codec.encode(self._record, field.stored_dtype.itemsize)
            nbytes = len(stored)
            self._payload[self.used_bytes : self.used_bytes + nbytes] = stored
        self._offsets.append(self.used_bytes)
        self._sizes.append(nbytes)
        self._sums.append(crc32c(self._payload[self.used_bytes : self.used_bytes + nbytes]))
        for name, values in self._columns.items():
            values.append(columns[name])
        self.used_bytes += nbytes

    def content(self) -> ShardContent:
        """What has been added, padded as it is stored."""
        encoded = self._layout.schema.primary_field.kind == "encoded"
        payload_bytes = padded_payload_bytes(self.used_bytes) if encoded else self.used_bytes
        self._payload[self.used_bytes : payload_bytes] = bytes(payload_bytes - self.used_bytes)
        return ShardContent(
            self._payload[:payload_bytes],
            np.array(self._offsets, np.uint64),
            np.array(self._sizes, np.uint32),
            np.array(self._sums, np.uint32),
            {
                name: np.array(self._columns[name], field.stored_dtype).reshape(self.records, *field.fixed_shape)
                for name, field in self._layout.schema.columns.items()
            },
        )


@dataclass(frozen=True)
class _Placement:
    """Where things are in the file of a shard, in bytes; `payload_offset` None: HDF5 has written the payload, in chunks."""

    offset: NDArray[np.uint64]
    payload_offset: int | None
    index_offset: int | None

    @property
    def data_offset(self) -> int:
        return int(self.offset.min()) if self.payload_offset is None else self.payload_offset


def write_shard(
    folder: Path, number: int, first: int, content: ShardContent, layout: ShardLayout
) -> tuple[ShardEntry, NDArray[np.uint64]]:
    """Write shard `number` into the data set at `folder` and publish it.

    Returns its manifest entry and the offset of every record in its file. Raises OSError as the file system does;
    nothing is left under the final name then.
    """
    relative = shard_path(number, layout.container)
    with publish_file(folder / relative, mode=SHARD_MODE) as part:
        placement = _lay_out(part, content, layout)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if placement.payload_offset is not None:
                for start in range(0, len(content.payload), _WRITE_BYTES):
                    piece = content.payload[start : start + _WRITE_BYTES]
                    pwrite_all(descriptor, piece, placement.payload_offset + start)
            if placement.index_offset is not None:
                index = layout.zarr_index(placement.data_offset, len(content.payload), placement.offset, content.nbytes)
                pwrite_all(descriptor, index, placement.index_offset)
            nbytes = os.fstat(descriptor).st_size
            pieces = _file_pieces(descriptor, nbytes, placement.payload_offset, content.payload)
            sums = b"".join(chunk_sums(pieces, layout.chunk_bytes)).hex()
        finally:
            os.close(descriptor)
    entry = ShardEntry(
        file=relative,
        nbytes=nbytes,
        xxh3_128=sums,
        records=len(content.nbytes),
        first=first,
        data_offset=placement.data_offset,
    )
    return entry, placement.offset


def _lay_out(part: Path, content: ShardContent, layout: ShardLayout) -> _Placement:
    """Write the HDF5 structure, if any, with a compressed payload; leave room for an uncompressed one and the Zarr index."""
    if layout.container == "zarr":
        return _Placement(content.offset, 0, len(content.payload))
    payload_offset = None
    if layout.schema.primary_field.codec is None:
        payload_offset = hdf5_shard.create_skeleton(part, **_hdf5_structure(content, layout))
        offset = content.offset + np.uint64(payload_offset)
    else:
        offset = _write_chunked(part, content, layout)
    if layout.container == "hdf5":
        return _Placement(offset, payload_offset, None)
    room = zarr_view.index_nbytes(layout.inner_chunks)
    return _Placement(offset, payload_offset, hdf5_shard.append_zarr_index_room(part, room))


def _write_chunked(part: Path, content: ShardContent, layout: ShardLayout) -> NDArray[np.uint64]:
    field = layout.schema.primary_field
    assert field.codec is not None
    records = [
        content.payload[start : start + nbytes]
        for start, nbytes in zip(content.offset.tolist(), content.nbytes.tolist(), strict=True)
    ]
    hdf5_filter = field.codec.hdf5_filter(field.stored_dtype.itemsize, field.record_bytes)
    return hdf5_shard.create_chunked(part, hdf5_filter=hdf5_filter, records=records, **_hdf5_structure(content, layout))


def _hdf5_structure(content: ShardContent, layout: ShardLayout) -> dict[str, Any]:
    """Names, shapes and small data sets of a shard, as hdf5_shard takes them."""
    name, field = layout.schema.primary, layout.schema.primary_field
    records = len(content.nbytes)
    small: dict[str, NDArray[np.generic]] = {f"{name}/crc32c": content.crc32c}
    shape, dtype = (records, *field.fixed_shape), field.dtype
    if field.kind == "encoded":
        small |= {f"{name}/offset": content.offset, f"{name}/nbytes": content.nbytes.astype(np.uint64)}
        shape, dtype = (len(content.payload),), "uint8"
    attributes = {
        "stagein_format": "stagein-shard",
        "stagein_version": np.asarray(FORMAT_VERSION, dtype=np.uint16),
        "schema": json.dumps(layout.schema.model_dump(mode="json"), sort_keys=True),
        "num_records": np.uint64(records),
        "checksum": "crc32c",
    }
    return {
        "payload_name": f"{name}/data",
        "payload_shape": shape,
        "payload_dtype": dtype,
        "small": small | dict(content.columns),
        "attributes": attributes,
    }


def _file_pieces(descriptor: int, nbytes: int, payload_offset: int | None, payload: memoryview) -> Iterator[Buffer]:
    """The bytes of a shard file in order: a payload that we wrote is at hand, what HDF5 wrote is read back."""
    if payload_offset is None:
        for start in range(0, nbytes, _WRITE_BYTES):
            yield _read_piece(descriptor, start, min(_WRITE_BYTES, nbytes - start))
        return
    yield _read_piece(descriptor, 0, payload_offset)
    yield payload
    end = payload_offset + len(payload)
    yield _read_piece(descriptor, end, nbytes - end)


def _read_piece(descriptor: int, offset: int, nbytes: int) -> bytearray:
    piece = bytearray(nbytes)
    pread_exactly(descriptor, memoryview(piece), offset)
    return piece


def refuse_codec(schema: Schema, container: Container) -> None:
    """Raise UsageError for a codec that the container cannot name."""
    codec = schema.primary_field.codec
    if codec is not None and codec.name == "lz4" and container != "hdf5":
        raise UsageError(
            f"Zarr has no codec lz4, so --format {container} cannot have it: take --format hdf5, or blosc-lz4"
        )


def refuse_large_record(nbytes: int, name: str) -> None:
    """Raise UsageError when a record is larger than the index can say; `name` says which."""
    if nbytes > MAX_RECORD_BYTES:
        raise UsageError(f"{name}: a record of {nbytes} bytes is above the limit of {MAX_RECORD_BYTES}: split it")
