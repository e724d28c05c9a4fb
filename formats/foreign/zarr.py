"""Zarr v3 arrays of others: one record a chunk, each in a file of its own or many in a shard."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.checksums import crc32c
from stagein.formats.codecs import Codec
from stagein.formats.errors import ChecksumError, SourceError, source_error
from stagein.formats.schema import Field

from .layout import ForeignFile, ForeignRecords, refuse, tensor_field

_ABSENT = 2**64 - 1
_LITTLE_BYTES = (
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "bytes"},
    {"name": "bytes", "configuration": {}},
)
_CODECS = {"blosc": Codec(name="blosc-lz4"), "zstd": Codec(name="zstd")}


def scan_foreign_zarr(folder: Path, name: str = "data") -> ForeignRecords:
    """What lies in the Zarr v3 array `folder`, whose first axis counts records; its field is called `name`.

    Raises UsageError for a layout that cannot be adopted, SourceError for what cannot be read, ChecksumError for a damaged
    index of a shard.
    """
    document = _document(folder)
    shape = tuple(document["shape"])
    field = tensor_field(folder, _dtype(folder, document), shape[1:])
    if not shape or shape[0] == 0 or field.record_bytes == 0:
        refuse(folder, "has no records")
    chunk = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
    codecs = document["codecs"]
    sharding = codecs[0]["configuration"] if codecs[0]["name"] == "sharding_indexed" and len(codecs) == 1 else None
    inner = tuple(sharding["chunk_shape"]) if sharding else chunk
    if inner != (1, *shape[1:]) or chunk[1:] != shape[1:]:
        refuse(folder, f"has chunks of shape {inner} in files of {chunk}, not of one record each")
    codec = _codec(folder, sharding["codecs"] if sharding else codecs)
    files = [
        _scan_file(folder / _key(document, number, len(shape)), field, codec, sharding, chunk[0], shape[0], number)
        for number in range(-(-shape[0] // chunk[0]))
    ]
    return ForeignRecords("zarr", name, field.model_copy(update={"codec": codec}), {}, tuple(files))


def _document(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / "zarr.json").read_bytes())
    except OSError as error:
        raise source_error(error, "reading", folder / "zarr.json") from None
    except ValueError:
        raise SourceError(f"{folder / 'zarr.json'} is not JSON: restore it from a good copy") from None
    if not isinstance(document, dict) or (document.get("zarr_format"), document.get("node_type")) != (3, "array"):
        refuse(folder, "is not an array of Zarr v3")
    return document


def _dtype(folder: Path, document: dict[str, Any]) -> np.dtype[np.generic]:
    try:
        dtype: np.dtype[np.generic] = np.dtype(document["data_type"])
    except TypeError:
        refuse(folder, f"has elements of type {document['data_type']}")
    return dtype


def _key(document: dict[str, Any], number: int, axes: int) -> str:
    encoding = document.get("chunk_key_encoding", {"name": "default"})
    is_default = encoding["name"] == "default"
    separator: str = encoding.get("configuration", {}).get("separator", "/" if is_default else ".")
    return separator.join([*(["c"] if is_default else []), str(number), *["0"] * (axes - 1)])


def _codec(folder: Path, codecs: list[dict[str, Any]]) -> Codec | None:
    if codecs[0] not in _LITTLE_BYTES or len(codecs) > 2 or (len(codecs) == 2 and codecs[1]["name"] not in _CODECS):
        names = " and ".join(codec["name"] for codec in codecs)
        refuse(folder, f"has the codecs {names}, of which only little-endian bytes, then blosc or zstd, is read")
    return _CODECS[codecs[1]["name"]] if len(codecs) == 2 else None


def _scan_file(
    path: Path,
    field: Field,
    codec: Codec | None,
    sharding: dict[str, Any] | None,
    capacity: int,
    total: int,
    number: int,
) -> ForeignFile:
    """File `number` of the array, `capacity` records a file."""
    count = min(capacity, total - number * capacity)
    try:
        size = path.stat().st_size
        if sharding is None:
            places = np.array([[0, size]], np.uint64)
        else:
            places = _read_index(path, size, sharding, capacity)[:count]
    except FileNotFoundError:
        refuse(path, "is not there: its records have only the fill value")
    except OSError as error:
        raise source_error(error, "reading", path) from None
    if (places == _ABSENT).any():
        refuse(path, "has records with only the fill value")
    ends = places[:, 0] + places[:, 1]
    if (ends > size).any() or (codec is None and (places[:, 1] != field.record_bytes).any()):
        raise SourceError(f"{path} has {size} bytes, too few for its records: restore it from a good copy")
    return ForeignFile(path, places[:, 0].copy(), places[:, 1].astype(np.uint32), {})


def _read_index(path: Path, size: int, sharding: dict[str, Any], capacity: int) -> NDArray[np.uint64]:
    """The index of a shard, [records, 2]: offset and size in bytes (Zarr v3 sharding codec 1.0)."""
    index_codecs = sharding["index_codecs"]
    has_sum = len(index_codecs) == 2 and index_codecs[1]["name"] == "crc32c"
    if index_codecs[0] not in _LITTLE_BYTES or (len(index_codecs) > 1 and not has_sum):
        refuse(path, "has an index with other codecs than bytes and crc32c")
    nbytes = 16 * capacity + 4 * has_sum
    with open(path, "rb") as file:
        if sharding.get("index_location", "end") == "end":
            file.seek(max(0, size - nbytes))
        content = file.read(nbytes)
    if len(content) != nbytes:
        raise SourceError(f"{path} is shorter than the index of a shard: restore it from a good copy")
    if has_sum and crc32c(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise ChecksumError(f"the index of the shard {path} is damaged (crc32c): restore it from a good copy")
    return np.frombuffer(content[: 16 * capacity], "<u8").reshape(capacity, 2).astype(np.uint64)
