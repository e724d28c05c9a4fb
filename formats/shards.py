"""Shards: how records are dealt to them (pure), and how one is written.

A shard is assembled in memory at its final layout, so that its bytes are touched once: summed, hashed, written.
"""

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import hdf5_shard, zarr_view
from .checksums import Buffer, chunk_sums, pread_exactly, pwrite_all
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
    """What goes into a shard: the padded payload, and for each record where in it its bytes are and their crc32c."""

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
    def inner_chunk_bytes(self) -> int:
        field = self.schema.primary_field
        return zarr_view.INNER_CHUNK_BYTES if field.kind == "encoded" else field.record_bytes

    @property
    def inner_chunks(self) -> int:
        """Entries of the Zarr index of a shard."""
        return (
            self.capacity // zarr_view.INNER_CHUNK_BYTES
            if self.schema.primary_field.kind == "encoded"
            else self.capacity
        )


def write_shard(folder: Path, number: int, first: int, content: ShardContent, layout: ShardLayout) -> ShardEntry:
    """Write shard `number` into the data set at `folder` and publish it; returns its manifest entry.

    Raises OSError as the file system does; nothing is left under the final name then.
    """
    relative = shard_path(number, layout.container)
    records = len(content.nbytes)
    with publish_file(folder / relative, mode=SHARD_MODE) as part:
        data_offset, index_offset = _lay_out(part, content, layout)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            for start in range(0, len(content.payload), _WRITE_BYTES):
                pwrite_all(descriptor, content.payload[start : start + _WRITE_BYTES], data_offset + start)
            if index_offset is not None:
                present = (
                    len(content.payload) // layout.inner_chunk_bytes
                    if layout.schema.primary_field.kind == "encoded"
                    else records
                )
                index = zarr_view.encode_index(data_offset, layout.inner_chunk_bytes, present, layout.inner_chunks)
                pwrite_all(descriptor, index, index_offset)
            nbytes = os.fstat(descriptor).st_size
            pieces = _file_pieces(descriptor, nbytes, data_offset, content.payload)
            sums = b"".join(chunk_sums(pieces, layout.chunk_bytes)).hex()
        finally:
            os.close(descriptor)
    return ShardEntry(
        file=relative, nbytes=nbytes, xxh3_128=sums, records=records, first=first, data_offset=data_offset
    )


def _lay_out(part: Path, content: ShardContent, layout: ShardLayout) -> tuple[int, int | None]:
    """Write the HDF5 structure, if any; returns where the payload and the Zarr index (None: there is none) go."""
    if layout.container == "zarr":
        return 0, len(content.payload)
    data_offset = _create_hdf5(part, content, layout)
    if layout.container == "hdf5":
        return data_offset, None
    return data_offset, hdf5_shard.append_zarr_index_room(part, zarr_view.index_nbytes(layout.inner_chunks))


def _create_hdf5(path: Path, content: ShardContent, layout: ShardLayout) -> int:
    name, field = layout.schema.primary, layout.schema.primary_field
    records = len(content.nbytes)
    small: dict[str, NDArray[np.generic]] = {f"{name}/crc32c": content.crc32c}
    if field.kind == "encoded":
        small |= {f"{name}/offset": content.offset, f"{name}/nbytes": content.nbytes.astype(np.uint64)}
        shape: tuple[int, ...] = (len(content.payload),)
        dtype = "uint8"
    else:
        shape, dtype = (records, *field.fixed_shape), field.dtype
    small |= dict(content.columns)
    attributes = {
        "stagein_format": "stagein-shard",
        "stagein_version": np.asarray(FORMAT_VERSION, dtype=np.uint16),
        "schema": json.dumps(layout.schema.model_dump(mode="json"), sort_keys=True),
        "num_records": np.uint64(records),
        "checksum": "crc32c",
    }
    return hdf5_shard.create_skeleton(
        path, payload_name=f"{name}/data", payload_shape=shape, payload_dtype=dtype, small=small, attributes=attributes
    )


def _file_pieces(descriptor: int, nbytes: int, data_offset: int, payload: memoryview) -> Iterator[Buffer]:
    """The bytes of a shard file in order: what HDF5 wrote around the payload is read back, the payload is at hand."""
    yield _read_piece(descriptor, 0, data_offset)
    yield payload
    end = data_offset + len(payload)
    yield _read_piece(descriptor, end, nbytes - end)


def _read_piece(descriptor: int, offset: int, nbytes: int) -> bytearray:
    piece = bytearray(nbytes)
    pread_exactly(descriptor, memoryview(piece), offset)
    return piece


def refuse_large_record(nbytes: int, name: str) -> None:
    """Raise UsageError when a record is larger than the index can say; `name` says which."""
    if nbytes > MAX_RECORD_BYTES:
        raise UsageError(f"{name}: a record of {nbytes} bytes is above the limit of {MAX_RECORD_BYTES}: split it")
