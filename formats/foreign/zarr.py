"""Zarr v3 arrays of others: one record a chunk, each in a file of its own or many in a shard; an array, or a group of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, NonNegativeInt, PositiveInt, ValidationError
from pydantic import Field as pydantic_field

from stagein.formats.checksums import crc32c
from stagein.formats.codecs import Codec
from stagein.formats.errors import ChecksumError, SourceError, UsageError, source_error
from stagein.formats.schema import Field

from . import layout
from .layout import ForeignPart, ForeignRecords, ForeignShard, foreign_part, large_names, primary_name, tensor_field

_ABSENT = 2**64 - 1
_CODECS = {"blosc": Codec(name="blosc-lz4"), "zstd": Codec(name="zstd")}
_INSTEAD = "use `stagein convert python MODULE:FUNCTION` with a function of yours that gives its rows"


class _Named(BaseModel):
    """A codec, a grid, … of a metadata document: a name with a configuration, or the name alone."""

    name: str
    configuration: dict[str, Any] = {}

    @property
    def is_little_bytes(self) -> bool:
        return self.name == "bytes" and self.configuration.get("endian", "little") == "little"


_Extension = Annotated[_Named, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)]
_Codecs = Annotated[list[_Extension], pydantic_field(min_length=1)]


class _Grid(BaseModel):
    chunk_shape: tuple[PositiveInt, ...]


class _Sharding(BaseModel):
    """The configuration of the codec `sharding_indexed` (version 1.0)."""

    chunk_shape: tuple[PositiveInt, ...]
    codecs: _Codecs
    index_codecs: _Codecs
    index_location: Literal["start", "end"] = "end"


class _Document(BaseModel):
    """What is used of the metadata of an array (Zarr v3 core specification)."""

    shape: tuple[NonNegativeInt, ...]
    data_type: str | dict[str, Any]
    chunk_grid: _Extension
    chunk_key_encoding: _Extension = _Named(name="default")
    codecs: _Codecs
    storage_transformers: list[Any] = []


@dataclass(frozen=True)
class _Array:
    """An array that is one field: what its records are, and in how many files of how many records each they lie."""

    folder: Path
    document: _Document
    field: Field

    @property
    def num_records(self) -> int:
        return self.document.shape[0]


def scan_foreign_zarr(
    folder: Path, fields: Mapping[str, str] | None = None, primary: str | None = None
) -> ForeignRecords:
    """What lies in the Zarr v3 array `folder`, or in the arrays of the group `folder`; their first axes count records.

    fields   names of fields and the arrays of the group that they are; by default every array right in it, by its name.
    primary  of a group: the field that fills the shards, by default the largest; of an array: what its field is called.

    Large fields are read where they lie, the others copied. Raises UsageError for a layout that cannot be adopted, SourceError
    for what cannot be read, ChecksumError for a damaged index of a shard.
    """
    if _node_type(folder) == "array":
        if fields:
            raise UsageError(f"{folder} is a Zarr array, one field: name it by --primary")
        arrays = {primary or "data": _array(folder)}
    else:
        arrays = {name: _array(folder / place) for name, place in (fields or _arrays_of(folder)).items()}
    rows = {name: array.num_records for name, array in arrays.items()}
    if len(set(rows.values())) != 1:
        raise UsageError(
            f"{folder} has arrays of different lengths, {rows}: name those of one row a record with --field"
        )
    if not next(iter(rows.values())):
        _refuse(folder, "has no records")
    declared = {name: array.field for name, array in arrays.items()}
    large = large_names(declared, primary_name(folder, declared, primary))
    scanned = {name: _LargeArray(arrays[name]) for name in large}
    each = scanned[large[0]].records_a_file
    for name in large:
        if scanned[name].records_a_file != each:
            found = scanned[name].records_a_file
            _refuse(arrays[name].folder, f"has {found} records a file, {arrays[large[0]].folder} has {each}")
    columns = {name: _read_column(array) for name, array in arrays.items() if name not in large}
    shards = tuple(
        ForeignShard(
            {name: scanned[name].part(number) for name in large},
            {name: values[number * each : (number + 1) * each] for name, values in columns.items()},
        )
        for number in range(-(-arrays[large[0]].num_records // each))
    )
    with_codecs = {name: declared[name].model_copy(update={"codec": scanned[name].codec}) for name in large}
    return ForeignRecords("zarr", with_codecs, {name: declared[name] for name in columns}, shards)


def _refuse(what: object, reason: str, instead: str = _INSTEAD) -> NoReturn:
    layout.refuse(what, reason, instead)


def _metadata(folder: Path) -> dict[str, Any]:
    path = folder / "zarr.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{folder} is no array of Zarr v3: it has no zarr.json") from None
    except OSError as error:
        raise source_error(error, "reading", path) from None
    except (ValueError, RecursionError):
        raise SourceError(f"{path} is not JSON: restore it from a good copy") from None
    if not isinstance(content, dict) or content.get("zarr_format") != 3:
        _refuse(folder, "is not of Zarr v3")
    return content


def _node_type(folder: Path) -> Literal["array", "group"]:
    found = _metadata(folder).get("node_type")
    if found not in ("array", "group"):
        _refuse(folder, "is neither an array nor a group of Zarr v3")
    return found  # type: ignore[no-any-return]


def _arrays_of(folder: Path) -> dict[str, str]:
    """The arrays right in a group, by their names."""
    try:
        names = sorted(path.name for path in folder.iterdir() if (path / "zarr.json").exists())
    except OSError as error:
        raise source_error(error, "listing", folder) from None
    arrays = {name: name for name in names if _node_type(folder / name) == "array"}
    if not arrays:
        raise UsageError(
            f"{folder} is a Zarr group without arrays in it: name the group, or the array, that holds the records"
        )
    for name in arrays:
        if not name.isidentifier():
            raise UsageError(f"{folder / name} gives no name to a field: name the fields with --field")
    return arrays


def _array(folder: Path) -> _Array:
    content = _metadata(folder)
    if content.get("node_type") != "array":
        raise UsageError(f"{folder} is no array of Zarr v3 but a group: name an array in it")
    try:
        document = _Document.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SourceError(
            f"{folder / 'zarr.json'} does not describe an array: {place}: {first['msg']}; restore it from a good copy"
        ) from None
    if not document.shape:
        _refuse(folder, "has a single value, no records")
    if document.storage_transformers:
        _refuse(folder, "has storage transformers")
    dtype = document.data_type if isinstance(document.data_type, str) else str(document.data_type.get("name"))
    return _Array(folder, document, tensor_field(folder, dtype, document.shape[1:]))


def _read_column(array: _Array) -> NDArray[np.generic]:
    """A small array, whole, whatever its chunks and codecs."""
    import zarr

    try:
        values = np.asarray(zarr.open_array(array.folder, mode="r")[...])
    except Exception as error:  # the library has no error of its own
        raise SourceError(f"{array.folder} cannot be read as Zarr: {str(error).splitlines()[0]}") from None
    return values.astype(array.field.stored_dtype, copy=False)


class _LargeArray:
    """An array whose records are read where they lie. Raises UsageError, making it, where they cannot be."""

    def __init__(self, array: _Array) -> None:
        self._array = array
        folder, document, shape = array.folder, array.document, array.document.shape
        chunk = self._configured(_Grid, document.chunk_grid, "regular").chunk_shape
        is_sharded = document.codecs[0].name == "sharding_indexed" and len(document.codecs) == 1
        self._sharding = self._configured(_Sharding, document.codecs[0]) if is_sharded else None
        inner = self._sharding.chunk_shape if self._sharding else chunk
        if inner != (1, *shape[1:]) or chunk[1:] != shape[1:]:
            _refuse(folder, f"has chunks of shape {inner} in files of {chunk}, not of one record each")
        self.records_a_file = chunk[0]
        self.codec = self._codec(self._sharding.codecs if self._sharding else document.codecs)

    def part(self, number: int) -> ForeignPart:
        """The records of file `number` of the array."""
        path = self._array.folder / self._key(number)
        count = min(self.records_a_file, self._array.num_records - number * self.records_a_file)
        try:
            size = path.stat().st_size
            places = (
                np.array([[0, size]], np.uint64) if self._sharding is None else self._read_index(path, size)[:count]
            )
        except FileNotFoundError:
            self._refuse_absent(path, "is not there: its records")
        except OSError as error:
            raise source_error(error, "reading", path) from None
        if (places == _ABSENT).any():
            self._refuse_absent(path, "lacks records: they")
        record_bytes = self._array.field.record_bytes
        if self.codec is None and (places[:, 1] != record_bytes).any():
            raise SourceError(
                f"{path} has records of other sizes than {record_bytes} bytes: restore it from a good copy"
            )
        return foreign_part(path, places, size)

    def _configured(self, model: type[Any], named: _Named, only: str | None = None) -> Any:
        if only is not None and named.name != only:
            _refuse(self._array.folder, f"has the grid {named.name} of chunks")
        try:
            return model.model_validate(named.configuration)
        except ValidationError as error:
            first = error.errors()[0]
            raise SourceError(
                f"{self._array.folder / 'zarr.json'} does not describe an array: {named.name}: "
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}; restore it from a good copy"
            ) from None

    def _codec(self, codecs: Sequence[_Named]) -> Codec | None:
        is_known = len(codecs) == 1 or (len(codecs) == 2 and codecs[1].name in _CODECS)
        if not codecs[0].is_little_bytes or not is_known:
            names = " and ".join(codec.name for codec in codecs)
            _refuse(
                self._array.folder,
                f"has the codecs {names}, of which only little-endian bytes, then blosc or zstd, is read",
            )
        if len(codecs) == 1:
            return None
        if codecs[1].configuration.get("cname") == "snappy":
            _refuse(self._array.folder, "is compressed by snappy within blosc")
        return _CODECS[codecs[1].name]

    def _key(self, number: int) -> str:
        encoding = self._array.document.chunk_key_encoding
        is_default = encoding.name == "default"
        separator = str(encoding.configuration.get("separator", "/" if is_default else "."))
        if encoding.name not in ("default", "v2") or separator not in ("/", "."):
            _refuse(self._array.folder, f"has the chunk keys {encoding.name}")
        zeros = ["0"] * (len(self._array.document.shape) - 1)
        return separator.join([*(["c"] if is_default else []), str(number), *zeros])

    def _refuse_absent(self, path: Path, what: str) -> NoReturn:
        _refuse(
            path,
            f"{what} have only the fill value",
            f"write it again with {{'write_empty_chunks': True}} of zarr-python, or {_INSTEAD}",
        )

    def _read_index(self, path: Path, size: int) -> NDArray[np.uint64]:
        """The index of a shard, [records, 2]: offset and size in bytes (Zarr v3 sharding codec 1.0)."""
        assert self._sharding is not None
        codecs = self._sharding.index_codecs
        has_sum = [codec.name for codec in codecs[1:]] == ["crc32c"]
        if not codecs[0].is_little_bytes or (len(codecs) > 1 and not has_sum):
            _refuse(path, "has an index with other codecs than bytes and crc32c")
        nbytes = 16 * self.records_a_file + 4 * has_sum
        with open(path, "rb") as file:
            if self._sharding.index_location == "end":
                file.seek(max(0, size - nbytes))
            content = file.read(nbytes)
        if len(content) != nbytes:
            raise SourceError(f"{path} is shorter than the index of a shard: restore it from a good copy")
        if has_sum and crc32c(content[:-4]) != int.from_bytes(content[-4:], "little"):
            raise ChecksumError(f"the index of the shard {path} is damaged (crc32c): restore it from a good copy")
        return np.frombuffer(content[: 16 * self.records_a_file], "<u8").reshape(-1, 2).astype(np.uint64)
