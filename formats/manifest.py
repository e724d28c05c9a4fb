"""manifest.json: what a data set is, file by file and chunk by chunk. It is written last and trusted first.

The id is the sha256 of the manifest's own content, so that two data sets that differ in one byte have different ids.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic import Field as pydantic_field

from .checksums import CHUNK_SUM_BYTES
from .errors import SourceError
from .publish import publish_bytes
from .schema import FIRST_VERSION, Schema, column_chunk_path, shape_name

MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "stagein"
FORMAT_VERSION = (1, 1)
"""The newest that is read; a data set has the oldest that says what is in it."""
DEFAULT_CHUNK_BYTES = 8 << 20
MIN_CHUNK_BYTES = 4096
MAX_MANIFEST_BYTES = 1 << 30

Container = Literal["hdf5+zarr", "hdf5", "zarr", "foreign"]
"""What shards are: HDF5 files, Zarr shards, or both; `foreign`: files that others wrote, adopted as they are."""


class FileEntry(BaseModel):
    """One file of the data set: its place under the root, its size and the xxh3_128 of every chunk, as one hex string."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    nbytes: int = pydantic_field(ge=0)
    xxh3_128: str = pydantic_field(pattern=r"^[0-9a-f]*$")

    @field_validator("file")
    @classmethod
    def _stays_below_the_root(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or "\0" in value or str(path) != value or value in ("", "."):
            raise ValueError(f"{value!r} is not a plain path below the data set")
        return value

    def chunk_sum(self, chunk: int) -> bytes:
        """The sum of chunk `chunk`."""
        digits = 2 * CHUNK_SUM_BYTES
        return bytes.fromhex(self.xxh3_128[chunk * digits : (chunk + 1) * digits])

    def num_chunks(self, chunk_bytes: int) -> int:
        return -(-self.nbytes // chunk_bytes)


class ShardEntry(FileEntry):
    """The file of one field in a shard: `records` records from number `first` on; their payload starts at `data_offset`."""

    field: str
    records: int = pydantic_field(ge=0)
    first: int = pydantic_field(ge=0)
    data_offset: int = pydantic_field(ge=0)


class Origin(BaseModel):
    """Where the records came from, as far as it is the same wherever the source lies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    records_sha256: str


class Manifest(BaseModel):
    """The whole data set. `files` are all files but those of shards and the manifest itself.

    Every large field has as many shards, with the same records in them; `shards` are their files, field after field. Only in
    files of others may several fields lie in one file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["stagein"] = "stagein"
    version: tuple[int, int] = FIRST_VERSION
    id: str = ""
    container: Container
    record_schema: Schema = pydantic_field(alias="schema")
    num_records: int = pydantic_field(ge=0)
    capacity: dict[str, Annotated[int, pydantic_field(gt=0)]]
    """Rows of a full shard of each large field: the size of a Zarr shard along its first axis."""
    chunk_bytes: int = pydantic_field(ge=MIN_CHUNK_BYTES)
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...]
    source: Origin

    @model_validator(mode="after")
    def _adds_up(self) -> "Manifest":
        for name, field in self.record_schema.fields.items():
            if field.storage is None:
                raise ValueError(f"field {name!r} does not say how it is stored")
            if field.has_shapes and shape_name(name) not in self.record_schema.fields:
                raise ValueError(f"no field has the shapes of {name!r}")
        large = list(self.record_schema.large_fields)
        if sorted(self.capacity) != sorted(large):
            raise ValueError(f"it has capacities of {sorted(self.capacity)}, the large fields are {sorted(large)}")
        count = len(self.shards) // len(large)
        if [shard.field for shard in self.shards] != [name for name in large for _ in range(count)]:
            raise ValueError("the large fields do not have equally many shards, in the order of the fields")
        for name in large:
            self._refuse_wrong_records(name)
        self._refuse_shared_files()
        names = [entry.file for entry in self.all_files()]
        if MANIFEST_NAME in names or len({name.casefold() for name in names}) != len(names):
            raise ValueError("a file is listed twice, or two names differ only in case")
        for entry in self.all_files():
            if len(entry.xxh3_128) != 2 * CHUNK_SUM_BYTES * entry.num_chunks(self.chunk_bytes):
                raise ValueError(f"{entry.file} has sums for another number of chunks than its size says")
        if self.id and self.id != self.computed_id():
            raise ValueError(f"its id {self.id[:12]}… does not belong to its content: it was edited or damaged")
        return self

    def _refuse_wrong_records(self, name: str) -> None:
        next_record = 0
        for shard, primary in zip(self.shards_of(name), self.shards, strict=False):
            if shard.first != next_record:
                raise ValueError(f"shard {shard.file} starts at record {shard.first}, not at {next_record}")
            if shard.records != primary.records:
                raise ValueError(f"{shard.file} holds {shard.records} records, {primary.file} {primary.records}")
            if shard.data_offset > shard.nbytes:
                raise ValueError(f"the payload of {shard.file} starts behind its end")
            next_record += shard.records
        if next_record != self.num_records:
            raise ValueError(f"the shards hold {next_record} records, the manifest says {self.num_records}")

    def _refuse_shared_files(self) -> None:
        firsts: dict[str, ShardEntry] = {}
        for shard in self.shards:
            first = firsts.setdefault(shard.file, shard)
            if first is shard:
                continue
            if self.container != "foreign" or first.field == shard.field:
                raise ValueError(f"{shard.file} is listed twice")
            if (first.nbytes, first.xxh3_128, first.first) != (shard.nbytes, shard.xxh3_128, shard.first):
                raise ValueError(f"{shard.file} is listed twice, in two ways")

    @property
    def shard_files(self) -> tuple[ShardEntry, ...]:
        """The files of all shards, each once."""
        return tuple({shard.file: shard for shard in reversed(self.shards)}.values())[::-1]

    @property
    def num_shards(self) -> int:
        """Shards of each large field."""
        return len(self.shards_of(self.record_schema.primary))

    def shards_of(self, name: str) -> tuple[ShardEntry, ...]:
        """The shard files of a large field, in the order of their records."""
        return tuple(shard for shard in self.shards if shard.field == name)

    def parts_of(self, name: str) -> tuple[ShardEntry, ...]:
        """The files that hold a field that is read record by record: its shards, or the one file of a ragged column."""
        if name not in self.record_schema.ragged_columns:
            return self.shards_of(name)
        path = column_chunk_path(name, self.record_schema.fields[name])
        return tuple(
            ShardEntry(**entry.model_dump(), field=name, records=self.num_records, first=0, data_offset=0)
            for entry in self.files
            if entry.file == path
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.nbytes for entry in self.all_files())

    def all_files(self) -> Iterator[FileEntry]:
        """Every file but the manifest itself, shards first."""
        yield from self.shard_files
        yield from self.files

    def computed_id(self) -> str:
        """sha256 of the canonical JSON of everything but the id."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"id"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def sealed(self) -> "Manifest":
        """The same manifest with its id filled in."""
        return self.model_copy(update={"id": self.computed_id()})

    def to_bytes(self) -> bytes:
        return self.model_dump_json(by_alias=True, indent=1).encode() + b"\n"

    def save(self, folder: Path) -> None:
        """Publish it as `folder`/manifest.json; until then the folder is no data set."""
        publish_bytes(folder / MANIFEST_NAME, self.to_bytes())

    @classmethod
    def parse(cls, content: bytes, name: Path | str) -> "Manifest":
        """Read a manifest from bytes. Raises SourceError, one sentence, for whatever is wrong; `name` is named in it."""
        version = _version_of(content, name)
        if version[:1] > FORMAT_VERSION[:1]:
            _refuse_newer(name, version)
        try:
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            if version > FORMAT_VERSION:
                _refuse_newer(name, version)
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole"
            reason = first["msg"].removeprefix("Value error, ")
            _refuse(name, f"is not a valid manifest: {place}: {reason}")
        if not manifest.id:
            _refuse(name, "has no id")
        return manifest

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of the data set in `folder`. Raises SourceError where there is none to be trusted."""
        path = folder / MANIFEST_NAME
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # who opens a FIFO otherwise waits for its writer
            with open(descriptor, "rb") as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    _refuse(path, "is not a regular file")
                content = file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError:
            raise SourceError(
                f"{folder} is not a stagein data set: it has no {MANIFEST_NAME} (is the path right, did `stagein convert` finish?)"
            ) from None
        except NotADirectoryError:
            raise SourceError(f"{folder} is not a stagein data set: it is not a folder") from None
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from None
        return cls.parse(content, path)


def _refuse(name: Path | str, reason: str) -> NoReturn:
    raise SourceError(f"{name} {reason}; restore it from a good copy or convert the data set again")


def _refuse_newer(name: Path | str, version: Sequence[int]) -> NoReturn:
    theirs, ours = (".".join(map(str, each)) for each in (version, FORMAT_VERSION))
    raise SourceError(f"{name} has format version {theirs}, this stagein reads {ours}: install a newer stagein")


def _version_of(content: bytes, name: Path | str) -> tuple[int, ...]:
    """The format version it claims; () where it claims none. Says first what a schema error would only hint at: no JSON, another
    format."""
    try:
        header = json.loads(content)
    except (ValueError, RecursionError):
        _refuse(name, "is not JSON: it is damaged or not a manifest")
    if not isinstance(header, dict) or header.get("format") != FORMAT_NAME:
        _refuse(name, f'is not a manifest of this format (no "format": "{FORMAT_NAME}")')
    version = header.get("version")
    if not isinstance(version, list) or not all(isinstance(part, int) for part in version):
        return ()
    return tuple(version)
