"""WebDataset: tar archives whose members `KEY.jpg`, `KEY.cls`, … make up a record each.

Only headers are read when an archive is scanned: a member's bytes lie in it as they are, so records are read by offset.
The convention is that of the webdataset library: the key is a member's path up to the first dot of its base name, the
extension is the rest, in any case. Members of a record need not follow each other here.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checksums import pread_exactly
from .errors import SourceError, UsageError
from .images import IMAGE_SUFFIXES, BadImageError
from .npy_files import array_in
from .schema import SMALL_FIELD_BYTES, Field, Schema
from .source_fields import (
    LABEL_FIELD,
    SIZE_FIELD,
    column_value,
    image_field,
    image_size,
    make_schema,
    number_array,
)
from .source_files import SCAN_THREADS, SourceFile, find_files, source_name, used_files
from .sources import RefusedRecord, Room, SourceRecord
from .tar_headers import BadTarError, TarMember, read_members
from .values import BadValueError, Value

_LABEL_EXTENSION = "cls"
_IMAGE = 0  # its place among the members of a record; the columns' follow
_ABSENT = -1
_COLUMN_MEMBER_BYTES = 16 * SMALL_FIELD_BYTES
"""No member that becomes a column is longer: numbers as text are wordier than the numbers."""


@dataclass(frozen=True)
class MemberColumn:
    """The members with this extension become the column `name`."""

    name: str
    extension: str
    field: Field


@dataclass(frozen=True)
class WebDataset:
    """Records of tar archives: for each its archive, its key, and where its members lie (its image, then its columns)."""

    name: str
    schema: Schema
    columns: tuple[MemberColumn, ...]
    files: tuple[SourceFile, ...]
    file_numbers: NDArray[np.int64]
    keys: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    refused: tuple[RefusedRecord, ...]
    kind: str = "webdataset"
    secondary_nbytes: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def nbytes(self) -> NDArray[np.int64]:
        return self.sizes[:, _IMAGE]

    def identity(self) -> object:
        names = [file.path.name for file in self.files]
        columns = [(column.name, column.extension) for column in self.columns]
        return names, self.file_numbers.tolist(), self.keys, self.sizes.tolist(), columns

    def part(self, numbers: NDArray[np.int64]) -> "TarRecords":
        files, file_numbers = used_files(self.files, self.file_numbers[numbers])
        keys = tuple(self.keys[number] for number in numbers.tolist())
        return TarRecords(self.columns, files, file_numbers, keys, self.offsets[numbers], self.sizes[numbers])


@dataclass(frozen=True)
class TarRecords:
    """Some of the records of tar archives."""

    columns: tuple[MemberColumn, ...]
    files: tuple[SourceFile, ...]
    file_numbers: NDArray[np.int64]
    keys: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def mark(self) -> object:
        members = self.file_numbers.tolist(), self.keys, self.offsets.tolist(), self.sizes.tolist()
        columns = [(column.name, column.extension) for column in self.columns]
        return [file.mark() for file in self.files], members, columns

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        for number, records in groupby(range(len(self.keys)), key=lambda record: int(self.file_numbers[record])):
            file = self.files[number]
            with file.open() as descriptor:
                for record in records:
                    yield self._read_record(file, descriptor, record, room)

    def _read_record(self, file: SourceFile, descriptor: int, record: int, room: Room) -> SourceRecord | RefusedRecord:
        offsets, sizes = self.offsets[record].tolist(), self.sizes[record].tolist()
        content = room("image", sizes[_IMAGE])
        _read_member(file, descriptor, content, offsets[_IMAGE])
        name = _record_name(file, self.keys[record])
        try:
            values: dict[str, Value] = {"hw": image_size(content)}
        except BadImageError as error:
            return RefusedRecord(name, str(error))
        for column, offset, nbytes in zip(self.columns, offsets[1:], sizes[1:], strict=True):
            member = bytearray(nbytes)
            _read_member(file, descriptor, memoryview(member), offset)
            try:
                values[column.name] = column_value(_numbers(column.extension, bytes(member)), column.field)
            except BadValueError as error:
                return RefusedRecord(name, f"its .{column.extension} cannot be {column.name!r}: {error}")
        return SourceRecord(values)


def scan_webdataset(source: Path | Sequence[Path], fields: Mapping[str, str] | None = None) -> WebDataset:
    """Find the records of a .tar archive, of a list of them, or of those that lie in a folder.

    The member .jpg, .jpeg or .png is the primary field `image`, with its size in `hw`; .cls, where there is one, the
    column `label`. `fields` names further columns and the extensions they come from: {"weight": "txt"}. A member .npy
    is an array, .json a number or lists of them, any other a number as text; the first record says which type and shape
    all have. Archives and records that are damaged, incomplete or ambiguous are refused. Raises SourceError when there
    is no archive or one cannot be read, UsageError for `fields` that cannot be columns.
    """
    extensions = _column_extensions(fields or {})
    files = find_files(source, lambda name: name.lower().endswith(".tar"), "tar archives (*.tar)")
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        scanned = list(pool.map(lambda file: _scan_archive(file, tuple(extensions.values())), files))
    width = 1 + len(extensions)
    found = WebDataset(
        name=source_name(source),
        schema=make_schema({"image": image_field("image")}, "image"),
        columns=tuple(MemberColumn(name, extension, LABEL_FIELD) for name, extension in extensions.items()),
        files=files,
        file_numbers=np.repeat(np.arange(len(files)), [len(archive.keys) for archive in scanned]),
        keys=tuple(key for archive in scanned for key in archive.keys),
        offsets=np.concatenate([archive.offsets for archive in scanned]).reshape(-1, width),
        sizes=np.concatenate([archive.sizes for archive in scanned]).reshape(-1, width),
        refused=tuple(refused for archive in scanned for refused in archive.refused),
    )
    if not fields or "label" not in fields:
        found = _without_absent_label(found)
    found = _only_complete_records(found)
    columns = tuple(_typed_column(found, place, column) for place, column in enumerate(found.columns, 1))
    encodings = {encoding for archive in scanned for encoding in archive.encodings}
    image = image_field(encodings.pop() if len(encodings) == 1 else "image")
    schema_fields = {"image": image, "hw": SIZE_FIELD} | {column.name: column.field for column in columns}
    return replace(found, columns=columns, schema=make_schema(schema_fields, "image"))


def _column_extensions(fields: Mapping[str, str]) -> dict[str, str]:
    """Columns that are looked for, and their extensions: the user's, and the label unless that is spoken for."""
    extensions = {name: extension.lower().removeprefix(".") for name, extension in fields.items()}
    for taken in {"image", "hw"} & extensions.keys():
        raise UsageError(f"the column {taken!r} comes from the image itself: choose another name")
    for name, extension in extensions.items():
        if list(extensions.values()).count(extension) > 1:
            raise UsageError(f"the column {name!r} and another both come from .{extension}: each needs its own")
    if "label" not in extensions and _LABEL_EXTENSION not in extensions.values():
        extensions = {"label": _LABEL_EXTENSION} | extensions
    return extensions


@dataclass(frozen=True)
class _ScannedArchive:
    """The records of one archive, with _ABSENT for the offset of a column's member that is not there."""

    keys: list[str]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    encodings: frozenset[str]
    refused: list[RefusedRecord]


def _scan_archive(file: SourceFile, extensions: tuple[str, ...]) -> _ScannedArchive:
    places = {suffix.removeprefix("."): _IMAGE for suffix in IMAGE_SUFFIXES}
    places |= {extension: place for place, extension in enumerate(extensions, 1)}
    samples: dict[str, dict[int, TarMember]] = {}
    bad: dict[str, str] = {}
    refused: list[RefusedRecord] = []
    with file.open() as descriptor:
        try:
            for member in read_members(descriptor, file.nbytes):
                key, extension = _split_name(member.name)
                reason = _why_no_member(member, key, extension)
                if reason:
                    refused.append(RefusedRecord(_record_name(file, member.name), reason))
                    continue
                sample = samples.setdefault(key, {})
                place = places.get(extension)
                if place is None:
                    continue
                if place in sample:
                    what = "image" if place == _IMAGE else f".{extension}"
                    bad[key] = f"it has more than one {what}: {sample[place].name} and {member.name}"
                sample[place] = member
        except BadTarError as error:
            refused.append(RefusedRecord(str(file.path), f"{error}; copy or pack it again"))
    for key, sample in samples.items():
        if _IMAGE not in sample:
            bad[key] = "it has no image: no member .jpg, .jpeg or .png"
        elif sample[_IMAGE].nbytes == 0:
            bad[key] = "its image is empty"
    refused += [RefusedRecord(_record_name(file, key), reason) for key, reason in bad.items()]
    good = [(key, sample) for key, sample in samples.items() if key not in bad]
    offsets = np.full((len(good), 1 + len(extensions)), _ABSENT, np.int64)
    sizes = np.zeros_like(offsets)
    encodings = set()
    for record, (_, sample) in enumerate(good):
        encodings.add(IMAGE_SUFFIXES["." + _split_name(sample[_IMAGE].name)[1]])
        for place, member in sample.items():
            offsets[record, place], sizes[record, place] = member.offset, member.nbytes
    return _ScannedArchive([key for key, _ in good], offsets, sizes, frozenset(encodings), refused)


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension (lower case, without its dot) of a member."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _why_no_member(member: TarMember, key: str, extension: str) -> str:
    """Why this cannot belong to a record; empty when it can."""
    if not member.is_file:
        return "it is a link or a device, not a file"
    if not extension or not key.rpartition("/")[2]:
        return "its name is not KEY.EXTENSION"
    return ""


def _without_absent_label(found: WebDataset) -> WebDataset:
    """The label is no column when no record has one."""
    places = [place for place, column in enumerate(found.columns, 1) if column.name == "label"]
    if not places or (found.offsets[:, places[0]] != _ABSENT).any():
        return found
    kept = [place for place in range(1 + len(found.columns)) if place not in places]
    return replace(
        found,
        columns=tuple(column for column in found.columns if column.name != "label"),
        offsets=found.offsets[:, kept],
        sizes=found.sizes[:, kept],
    )


def _only_complete_records(found: WebDataset) -> WebDataset:
    """Refuse the records that lack a member that makes a column, or whose member is too long for one."""
    refused = list(found.refused)
    complete = np.ones(len(found.keys), bool)
    for place, column in enumerate(found.columns, 1):
        absent = found.offsets[:, place] == _ABSENT
        if len(absent) and absent.all():
            raise UsageError(f"{found.name}: no record has a member .{column.extension} for the column {column.name!r}")
        long = found.sizes[:, place] > _COLUMN_MEMBER_BYTES
        for wrong, reason in ((absent, "it has no"), (long, "too large for a column is its")):
            for record in np.flatnonzero(wrong & complete).tolist():
                name = _record_name(found.files[found.file_numbers[record]], found.keys[record])
                refused.append(RefusedRecord(name, f"{reason} .{column.extension}, which makes {column.name!r}"))
            complete &= ~wrong
    kept = np.flatnonzero(complete)
    return replace(
        found,
        file_numbers=found.file_numbers[kept],
        keys=tuple(found.keys[record] for record in kept.tolist()),
        offsets=found.offsets[kept],
        sizes=found.sizes[kept],
        refused=tuple(refused),
    )


def _typed_column(found: WebDataset, place: int, column: MemberColumn) -> MemberColumn:
    """A column with the type and shape of its first record. Labels are int64 in any case."""
    if column.name == "label" or not found.keys:
        return column
    file = found.files[found.file_numbers[0]]
    content = bytearray(int(found.sizes[0, place]))
    with file.open() as descriptor:
        _read_member(file, descriptor, memoryview(content), int(found.offsets[0, place]))
    try:
        value = number_array(_numbers(column.extension, bytes(content)))
    except BadValueError as error:
        name = _record_name(file, found.keys[0])
        raise UsageError(
            f"{name}: its .{column.extension} cannot be a column {column.name!r}: {error}; leave that column out"
        ) from None
    return replace(column, field=Field(kind="tensor", dtype=value.dtype.name, shape=value.shape))


def _numbers(extension: str, content: bytes) -> ArrayLike:
    """The numbers in a member. Raises BadValueError for anything else."""
    try:
        if extension.endswith("npy"):
            return array_in(content)
        if extension.endswith("json"):
            value: ArrayLike = json.loads(content)
            return value
        text = content.decode().strip()
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except (ValueError, RecursionError):
        raise BadValueError(f"it holds no number but {content[:20]!r}") from None


def _read_member(file: SourceFile, descriptor: int, content: memoryview, offset: int) -> None:
    if pread_exactly(descriptor, content, offset) != len(content):
        raise SourceError(f"{file.path} is shorter than it was when it was scanned: run the same command again")


def _record_name(file: SourceFile, key: str) -> str:
    return f"{os.fspath(file.path)}: {key}"
