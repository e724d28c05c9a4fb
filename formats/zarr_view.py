"""The Zarr v3 view of a data set: metadata documents, the index at the end of a shard, and links to the shards.

A shard is one Zarr `sharding_indexed` chunk whose index stands at its end (Zarr v3 core specification and the
sharding codec, version 1.0). Payload bytes are the same as in the HDF5 view; the documents here only name them.
"""

import json
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .checksums import crc32c
from .schema import Field

if TYPE_CHECKING:
    from .manifest import Manifest

INNER_CHUNK_BYTES = 65536
"""An inner chunk of a field whose records differ in size has at least as many bytes; its payloads are padded to whole ones."""

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
    field: Field,
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    codecs: list[object],
    dims: tuple[str, ...],
) -> dict[str, object]:
    dtype = field.stored_dtype
    attributes = dict(field.meta)
    if field.encoding:
        attributes["encoding"] = field.encoding
    if field.kind == "text":
        attributes["kind"] = "text"
    if field.array_dtype_name != dtype.name:
        attributes["dtype"] = field.array_dtype_name
    fill_values: dict[str, object] = {"b": False, "c": [0.0, 0.0]}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_values.get(dtype.kind, 0),
        "codecs": codecs,
        "attributes": attributes,
        "dimension_names": dims,  # never null: tensorstore refuses that
    }


def _dims(field: Field) -> tuple[str, ...]:
    """Names of the axes of a field's rows, the rows themselves first."""
    if field.kind in ("encoded", "text"):
        return ("byte",)
    names = field.dims or tuple(f"axis{axis}" for axis in range(1, len(field.shape) + 1))
    if field.kind == "tensor":
        return ("record", *names)
    num_free = len(field.shape) - len(field.row_shape)
    return (field.dims[0] if field.dims and num_free == 1 else "row", *names[num_free:])


def inner_rows(field: Field) -> int:
    """Rows of an inner chunk of a field in shards: one record of a tensor, 64 KiB or little more of what differs in size."""
    return -(-INNER_CHUNK_BYTES // field.row_bytes) if field.is_variable else 1


def padded_bytes(field: Field, nbytes: int) -> int:
    """A payload of `nbytes`, padded to whole inner chunks; of what differs in size never empty, so that it is aligned."""
    if not field.is_variable:
        return nbytes
    inner = inner_rows(field) * field.row_bytes
    return max(inner, -(-nbytes // inner) * inner)


def column_document(field: Field, num_rows: int) -> dict[str, object]:
    """Metadata of a small field: one uncompressed chunk that holds the whole column."""
    shape = (num_rows, *field.row_shape)
    chunk_shape = tuple(max(extent, 1) for extent in shape)
    return _array_document(field, shape, chunk_shape, [_LITTLE_ENDIAN], _dims(field))


def shards_document(field: Field, capacity: int, shard_rows: Sequence[int]) -> dict[str, object]:
    """Metadata of a field in shards: its rows, `capacity` a shard, in shards that have so many.

    A shard counts as `capacity` rows, whatever is in it, unless it is the last: where in the array a record is, the index says.
    """
    rows = max(len(shard_rows) - 1, 0) * capacity + (shard_rows[-1] if shard_rows else 0)
    codecs = [_LITTLE_ENDIAN, *([field.codec.zarr_codec(field.stored_dtype.itemsize)] if field.codec else [])]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": (inner_rows(field), *field.row_shape),
            "codecs": codecs,
            "index_codecs": [_LITTLE_ENDIAN, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    return _array_document(field, (rows, *field.row_shape), (capacity, *field.row_shape), [sharding], _dims(field))


def starting_rows(field: Field, offset: NDArray[np.uint64], data_offset: int, first_row: int) -> NDArray[np.uint64]:
    """At which row of the Zarr array of a field each record of a shard starts.

    `offset` are the places of the records in the file, whose payload starts at `data_offset` and with row `first_row`.
    """
    if not field.is_variable:
        return np.arange(first_row, first_row + len(offset), dtype=np.uint64)
    return (offset - np.uint64(data_offset)) // np.uint64(field.row_bytes) + np.uint64(first_row)


def link_paths(manifest: "Manifest") -> list[tuple[str, str]]:
    """The relative links of the Zarr view, as (path below the data set, target): one a shard file, none without a Zarr view."""
    if "zarr" not in manifest.container:
        return []
    links = []
    for name, field in manifest.record_schema.large_fields.items():
        for number, shard in enumerate(manifest.shards_of(name)):
            path = "/".join([name, "c", str(number), *["0"] * len(field.row_shape)])
            links.append((path, "../" * path.count("/") + shard.file))
    return links


def column_from_chunk(
    content: bytes | memoryview | NDArray[np.uint8], field: Field, num_rows: int
) -> NDArray[np.generic]:
    """A column as an array of its rows, [num_rows, *row_shape], over the bytes of its chunk."""
    return np.frombuffer(content, field.stored_dtype).view(field.array_dtype).reshape(num_rows, *field.row_shape)
