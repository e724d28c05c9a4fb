"""LMDB databases: a record a key, or several keys whose names say that they belong together.

Layouts in use: keys "0" … "n-1" and "length" (OC20), `image-000000001` and `label-000000001` (text recognition), any other keys in
their order (LSUN). Values are files, arrays as numpy.save writes them, or texts. Pickles are never opened: they run code.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import SourceError, UsageError, source_error
from stagein.formats.images import BadImageError
from stagein.formats.schema import Field, Schema, make_schema
from stagein.formats.source import RefusedRecord, Room, SourceRecord
from stagein.formats.values import BadValueError, Value, infer_field

from .fields import SIZE_FIELD, file_field, image_size
from .files import SourceFile, find_files, source_name, used_files
from .npy_files import array_in
from .read_order import read_in_order

_DATA_NAME = "data.mdb"
_NPY_MAGIC = b"\x93NUMPY"
_LOOKED_AT = 64
_COUNT_KEYS = (b"length", b"num-samples", b"__len__", b"__keys__")
_IMAGES = ("jpeg", "png", "image")
_MAX_READERS = 512

Content: TypeAlias = Literal["file", "npy", "number", "text"]


@dataclass(frozen=True)
class LmdbField:
    """What the keys of a field look like (`*` stands for what its records have in common) and what their values are."""

    pattern: str
    content: Content
    field: Field


@dataclass(frozen=True)
class LmdbRecords:
    """The records of LMDB databases: for each its file, and what `*` stands for in the keys of its fields."""

    name: str
    schema: Schema
    fields: Mapping[str, LmdbField]
    files: tuple[SourceFile, ...]
    file_numbers: NDArray[np.int64]
    stems: tuple[bytes, ...]
    sizes: Mapping[str, NDArray[np.int64]]
    refused: tuple[RefusedRecord, ...]
    kind: str = "lmdb"

    @property
    def nbytes(self) -> NDArray[np.int64]:
        fixed = self.schema.primary_field.record_bytes
        return self.sizes.get(self.schema.primary, np.full(len(self.stems), fixed, np.int64))

    @property
    def secondary_nbytes(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: nbytes for name, nbytes in self.sizes.items() if name != self.schema.primary}

    def identity(self) -> object:
        sizes = {name: nbytes.tolist() for name, nbytes in self.sizes.items()}
        patterns = {name: each.pattern for name, each in self.fields.items()}
        files = [(_visible_path(file).name, file.nbytes) for file in self.files]
        return files, self.file_numbers.tolist(), [stem.hex() for stem in self.stems], sizes, patterns

    def part(self, numbers: NDArray[np.int64]) -> "LmdbPart":
        files, file_numbers = used_files(self.files, self.file_numbers[numbers])
        stems = tuple(self.stems[number] for number in numbers.tolist())
        return LmdbPart(self.fields, "hw" in self.schema.fields, files, tuple(file_numbers.tolist()), stems)


@dataclass(frozen=True)
class LmdbPart:
    """Some of the records of LMDB databases; `has_size`: the size of the image is a field of its own."""

    fields: Mapping[str, LmdbField]
    has_size: bool
    files: tuple[SourceFile, ...]
    file_numbers: tuple[int, ...]
    stems: tuple[bytes, ...]

    def mark(self) -> object:
        fields = {
            name: (each.pattern, each.content, each.field.model_dump(mode="json")) for name, each in self.fields.items()
        }
        stems = [stem.hex() for stem in self.stems]
        return fields, self.has_size, [file.mark() for file in self.files], self.file_numbers, stems

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        pieces = np.array(self.file_numbers, np.int64)
        return read_in_order(pieces, np.zeros(len(pieces), np.int64), self._read, room)

    def _read(self, records: NDArray[np.int64], room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        for number, of_file in groupby(records.tolist(), key=lambda record: self.file_numbers[record]):
            file = self.files[number]
            with _opened(file) as transaction:
                for record in of_file:
                    stem = self.stems[record]
                    try:
                        yield self._read_record(file, transaction, stem, room)
                    except (BadValueError, BadImageError) as error:
                        yield RefusedRecord(_record_name(file, stem), str(error))

    def _read_record(self, file: SourceFile, transaction: Any, stem: bytes, room: Room) -> SourceRecord:
        values: dict[str, Value] = {}
        for name, each in self.fields.items():
            content = transaction.get(_key(each.pattern, stem))
            if content is None:
                raise file.changed()
            if each.content != "file":
                values[name] = _value(each.content, bytes(content))  # views of the file do not outlive it
                continue
            _refuse_pickle(content)
            if each.field.encoding in _IMAGES and self.has_size and "hw" not in values:
                values["hw"] = image_size(content)
            room(name, len(content))[:] = content
        return SourceRecord(values)


def scan_lmdb(
    source: Path | Sequence[Path], *, fields: Mapping[str, str] | None = None, primary: str | None = None
) -> LmdbRecords:
    """The records of an LMDB environment (a folder with data.mdb, or a file), or of the files *.lmdb of a folder.

    `fields` maps names of fields to patterns of keys, such as {"image": "image-*", "label": "label-*"}; without it, every key
    but those that hold a count is a record with one field: `image` where values start like images, else `data`. Keys that are
    numbers are ordered as numbers, all others by their bytes. The first values say what all are: .npy arrays become `tensor`
    or `ragged`, texts that are whole numbers a `tensor`, other texts `text` (of fields that are named), all else `encoded`.

    Records that lack a field or whose value is another thing are refused. Raises SourceError for a database that is damaged
    or whose values are pickles, UsageError for fields that cannot be or without the package lmdb.
    """
    _require_lmdb()
    files = _find(source)
    patterns = dict(fields) if fields else {"": "*"}
    for pattern in patterns.values():
        if pattern.count("*") != 1:
            raise UsageError(f"the keys {pattern!r} are no pattern: write one * where they differ, such as image-*")
    refused: list[RefusedRecord] = []
    stems = [_stems(file, patterns, refused) for file in files]
    described = _describe(files, stems, patterns)
    if not fields:
        (only,) = described.values()
        described = {"image" if only.field.encoding in _IMAGES else "data": only}
    declared = {name: each.field for name, each in described.items()}
    images = [name for name, each in declared.items() if each.encoding in _IMAGES]
    if images and "hw" not in declared:
        declared["hw"] = SIZE_FIELD
    schema = make_schema(declared, primary or (images[0] if images else ""))
    variable = {name: each for name, each in described.items() if each.field.is_variable}
    return LmdbRecords(
        name=source_name(source),
        schema=schema,
        fields=described,
        files=files,
        file_numbers=np.repeat(np.arange(len(files)), [len(found) for found in stems]),
        stems=tuple(stem for found in stems for stem in found),
        sizes=_sizes(files, stems, variable),
        refused=tuple(refused),
    )


def _require_lmdb() -> None:
    try:
        import lmdb  # noqa: F401
    except ImportError:
        raise UsageError("LMDB needs the package lmdb: pip install 'stagein[lmdb]'") from None


def _find(source: Path | Sequence[Path]) -> tuple[SourceFile, ...]:
    if not isinstance(source, Path) or not source.is_dir():
        return find_files(source, bool, "LMDB databases")
    try:
        names = sorted(path for path in source.iterdir() if path.name == _DATA_NAME or path.suffix == ".lmdb")
    except OSError as error:
        raise source_error(error, "listing", source) from None
    if source / _DATA_NAME in names:
        return find_files(source / _DATA_NAME, bool, "LMDB databases")
    if not names:
        raise SourceError(f"{source} holds no LMDB databases (data.mdb, *.lmdb): name the folder that holds them")
    return find_files([path / _DATA_NAME if path.is_dir() else path for path in names], bool, "LMDB databases")


def _visible_path(file: SourceFile) -> Path:
    """What users call a database: the folder, where it is one."""
    return file.path.parent if file.path.name == _DATA_NAME else file.path


@contextmanager
def _opened(file: SourceFile) -> Iterator[Any]:
    """A transaction that reads the database, whose values are views of the file.

    Raises SourceError when it has changed, is none, or is cut off: what is missing could otherwise end the process.
    """
    import lmdb

    with file.open():
        try:
            environment = lmdb.open(
                str(file.path),
                subdir=False,
                readonly=True,
                lock=False,
                readahead=False,
                create=False,
                max_readers=_MAX_READERS,
            )
        except lmdb.Error as error:
            raise SourceError(f"{file.path} cannot be opened as LMDB: {error}") from None
        with environment:
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if needed > file.nbytes:
                raise SourceError(f"{file.path} is truncated: it has {file.nbytes} of {needed} bytes, copy it again")
            try:
                with environment.begin(buffers=True) as transaction:
                    yield transaction
            except lmdb.Error as error:
                raise SourceError(f"{file.path} is damaged: {error}") from None


def _stems(file: SourceFile, patterns: Mapping[str, str], refused: list[RefusedRecord]) -> list[bytes]:
    """What * stands for in the keys of complete records, in their order."""
    found: dict[str, set[bytes]] = {name: set() for name in patterns}
    with _opened(file) as transaction:
        for key in map(bytes, transaction.cursor().iternext(values=False)):
            if key in _COUNT_KEYS:
                continue
            for name, pattern in patterns.items():
                before, after = (part.encode() for part in pattern.split("*"))
                if len(key) >= len(before) + len(after) and key.startswith(before) and key.endswith(after):
                    found[name].add(key[len(before) : len(key) - len(after)])
    complete = set.intersection(*found.values())
    for stem in _ordered(set.union(*found.values()) - complete):
        lacking = [_key(patterns[name], stem) for name in patterns if stem not in found[name]]
        refused.append(
            RefusedRecord(_record_name(file, stem), f"there is no key {lacking[0].decode(errors='replace')}")
        )
    return _ordered(complete)


def _ordered(stems: Iterable[bytes]) -> list[bytes]:
    """By number where all are numbers, else by their bytes, as the database has them."""
    listed = list(stems)
    if all(stem.isdigit() for stem in listed):
        return sorted(listed, key=lambda stem: (int(stem), stem))
    return sorted(listed)


def _key(pattern: str, stem: bytes) -> bytes:
    before, after = pattern.split("*")
    return before.encode() + stem + after.encode()


def _record_name(file: SourceFile, stem: bytes) -> str:
    return f"{_visible_path(file)}: {stem.decode(errors='backslashreplace')}"


def _describe(
    files: Sequence[SourceFile], stems: Sequence[Sequence[bytes]], patterns: Mapping[str, str]
) -> dict[str, LmdbField]:
    """What the fields are, by the first values of the first database that has any."""
    for file, found in zip(files, stems, strict=True):
        if found:
            with _opened(file) as transaction:
                return {
                    name: _describe_field(
                        file,
                        pattern,
                        [bytes(transaction.get(_key(pattern, stem))) for stem in found[:_LOOKED_AT]],
                        is_named=bool(name),
                    )
                    for name, pattern in patterns.items()
                }
    listed = ", ".join(str(_visible_path(file)) for file in files[:3])
    raise SourceError(f"{listed}: no key fits {' and '.join(patterns.values())}: there is nothing to convert")


def _describe_field(file: SourceFile, pattern: str, contents: Sequence[bytes], *, is_named: bool) -> LmdbField:
    try:
        _refuse_pickle(contents[0])
        if all(content.startswith(_NPY_MAGIC) for content in contents):
            arrays = [_value("npy", content) for content in contents]
            return LmdbField(pattern, "npy", infer_field(arrays))
    except BadValueError as error:
        raise SourceError(f"{_visible_path(file)}: {error}") from None
    field = file_field(contents)
    if is_named and field.encoding == "bytes":
        if all(_is_number(content) for content in contents):
            return LmdbField(pattern, "number", Field(kind="tensor", dtype="int64"))
        if all(_is_text(content) for content in contents):
            return LmdbField(pattern, "text", Field(kind="text"))
    return LmdbField(pattern, "file", field)


def _is_number(content: bytes) -> bool:
    return content.strip().removeprefix(b"-").isdigit()


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def _refuse_pickle(content: bytes | memoryview) -> None:
    """Raise BadValueError for what looks like a pickle of protocol 2 to 5: they start with it and end with a full stop."""
    if bytes(content[:1]) == b"\x80" and bytes(content[1:2]) in b"\x02\x03\x04\x05" and bytes(content[-1:]) == b".":
        raise BadValueError(
            "its values are pickles, which run code when they are opened: write a function that opens them, if you trust them, "
            "and convert with `stagein convert python MODULE:FUNCTION`"
        )


def _value(content_kind: Content, content: bytes) -> Value:
    """A value as its field takes it. Raises BadValueError."""
    try:
        if content_kind == "npy":
            return array_in(content)
        text = content.decode()
        return int(text) if content_kind == "number" else text
    except ValueError as error:
        raise BadValueError(f"its value is no {content_kind}: {error}") from None


def _sizes(
    files: Sequence[SourceFile], stems: Sequence[Sequence[bytes]], fields: Mapping[str, LmdbField]
) -> dict[str, NDArray[np.int64]]:
    """Bytes of every record in the fields whose records differ in size. What cannot be read is refused when it is read."""
    sizes: dict[str, list[int]] = {name: [] for name in fields}
    for file, found in zip(files, stems, strict=True):
        with _opened(file) as transaction:
            for name, each in fields.items():
                for stem in found:
                    content = transaction.get(_key(each.pattern, stem))
                    sizes[name].append(_npy_bytes(content) if each.content == "npy" else len(content))
    return {name: np.array(listed, np.int64) for name, listed in sizes.items()}


def _npy_bytes(content: memoryview) -> int:
    try:
        return array_in(content).nbytes
    except ValueError:
        return 0
