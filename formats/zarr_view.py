"""The Zarr v3 view of a data set: metadata documents, the index at the end of a shard, and links to the shards.

A shard is one Zarr `sharding_indexed` chunk whose index stands at its end (Zarr v3 core specification and the
sharding codec, version 1.0). Payload bytes are the same as in the HDF5 view; the documents here only name them.
"""

import json
import struct
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .checksums import crc32c
from .schema import Field

if TYPE_CHECKING:
    from .manifest import Manifest

INNER_CHUNK_BYTES = 65536
"""Inner chunk of the byte array of an `encoded` field; payloads are padded to a multiple of it."""

GROUP_DOCUMENT = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_ABSENT = 2**64 - 1
_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}


def index_nbytes(num_inner_chunks: int) -> int:
    """Size of a shard index: an (offset, nbytes) pair of uint64 an inner chunk, and the crc32c of all pairs."""
    return 16 * num_inner_chunks + 4


def encode_index(offset: NDArray[np.uint64], nbytes: NDArray[np.uint64], num_inner_chunks: int) -> bytes:
    """The index of a shard whose first inner chunks have these offsets and sizes in its file; the rest are absent."""
    pairs = np.full((num_inner_chunks, 2), _ABSENT, dtype="<u8")
    pairs[: len(offset), 0] = offset
    pairs[: len(offset), 1] = nbytes
    content = pairs.tobytes()
    return content + struct.pack("<I", crc32c(content))


def document(content: dict[str, object]) -> bytes:
    """A zarr.json."""
    return json.dumps(content, indent=1).encode() + b"\n"


def _array_document(
    shape: tuple[int, ...],
    dtype: str,
    chunk_shape: tuple[int, ...],
    codecs: list[object],
    dims: tuple[str, ...],
    attributes: dict[str, object],
) -> dict[str, object]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if dtype == "bool" else 0,
        "codecs": codecs,
        "attributes": attributes,
        "dimension_names": dims,  # never null: tensorstore refuses that
    }


def _dims(field: Field) -> tuple[str, ...]:
    return ("record", *(field.dims or tuple(f"axis{axis}" for axis in range(1, len(field.shape) + 1))))


def column_document(field: Field, num_records: int) -> dict[str, object]:
    """Metadata of a small field: one uncompressed chunk that holds the whole column."""
    shape = (num_records, *field.fixed_shape)
    chunk_shape = tuple(max(extent, 1) for extent in shape)
    return _array_document(shape, field.dtype, chunk_shape, [_LITTLE_ENDIAN], _dims(field), dict(field.meta))


def column_chunk_path(name: str, field: Field) -> str:
    """Where the one chunk of a small field lies below the data set."""
    return "/".join([name, "c", *["0"] * (1 + len(field.shape))])


def primary_document(
    field: Field, num_records: int, capacity: int, last_shard_nbytes: int, num_shards: int
) -> dict[str, object]:
    """Metadata of the primary field over all shards.

    `encoded`: a uint8 array of all payloads, each but the last counted as `capacity` bytes; where a record lies in it,
    the index says. `tensor`: the records themselves, `capacity` a shard.
    """
    record_shape: tuple[int, ...] = ()
    dims: tuple[str, ...] = ("byte",)
    dtype = "uint8"
    if field.kind == "encoded":
        total, inner = max(num_shards - 1, 0) * capacity + last_shard_nbytes, INNER_CHUNK_BYTES
    else:
        total, inner, record_shape = num_records, 1, field.fixed_shape
        dtype, dims = field.dtype, _dims(field)
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": (inner, *record_shape),
            "codecs": [_LITTLE_ENDIAN, *([field.codec.zarr_codec(field.stored_dtype.itemsize)] if field.codec else [])],
            "index_codecs": [_LITTLE_ENDIAN, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    attributes = {"encoding": field.encoding, **field.meta} if field.encoding else dict(field.meta)
    shape, shard_shape = (total, *record_shape), (capacity, *record_shape)
    return _array_document(shape, dtype, shard_shape, [sharding], dims, attributes)


def link_paths(manifest: "Manifest") -> list[tuple[str, str]]:
    """The relative links of the Zarr view, as (path below the data set, target): one a shard, none without a Zarr view."""
    if "zarr" not in manifest.container:
        return []
    name, field = manifest.record_schema.primary, manifest.record_schema.primary_field
    inner_axes = 0 if field.kind == "encoded" else len(field.shape)
    links = []
    for number, shard in enumerate(manifest.shards):
        path = "/".join([name, "c", str(number), *["0"] * inner_axes])
        links.append((path, "../" * path.count("/") + shard.file))
    return links


def column_from_chunk(
    content: bytes | memoryview | NDArray[np.uint8], field: Field, num_records: int
) -> NDArray[np.generic]:
    """A small field as an array [num_records, *shape] over the bytes of its chunk."""
    return np.frombuffer(content, dtype=field.stored_dtype).reshape(num_records, *field.fixed_shape)
