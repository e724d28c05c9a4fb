"""WebDataset: tar archives whose members `KEY.jpg`, `KEY.cls`, … make up a record each.

Only headers are read when an archive is scanned: a member's bytes lie in it as they are, so records are read by offset.
The convention is that of the webdataset library: the key is a member's path up to the first dot of its base name, the
extension is the rest, in any case. Members of a record need not follow each other here.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stagein.formats.checksums import pread_exactly
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.images import IMAGE_SUFFIXES, BadImageError
from stagein.formats.schema import SMALL_FIELD_BYTES, Field, Schema, make_schema
from stagein.formats.source import RefusedRecord, Room, SourceRecord
from stagein.formats.values import UNKNOWN_ENCODING, BadValueError, Value, as_array

from .fields import (
    LABEL_FIELD,
    SIZE_FIELD,
    column_value,
    common_array_field,
    file_field,
    image_field,
    image_size,
)
from .files import SCAN_THREADS, SourceFile, find_files, source_name, used_files
from .npy_files import array_in
from .read_order import read_in_order
from .tar_headers import BadTarError, TarMember, read_members

_ABSENT = -1
_NUMBER_BYTES = 16 * SMALL_FIELD_BYTES
"""No member that is a number is longer."""
_LOOKED_AT = 16
_IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)

Content: TypeAlias = Literal["image", "file", "number", "array", "json", "text"]


@dataclass(frozen=True)
class MemberField:
    """The members with one of these extensions become the field `name`; `content` says what is in them."""

    name: str
    extensions: tuple[str, ...]
    content: Content
    field: Field
    is_wanted: bool = True
    """Whether it must be there; others become fields where most records have them."""

    @property
    def is_copied(self) -> bool:
        """Whether the bytes of the field are those of the member."""
        return self.content in ("image", "file") or self.field.kind == "text"

    def most_bytes(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bounds on the bytes of the field in records whose members have these sizes; exact but for arrays that differ in size."""
        if not self.field.is_variable:
            return np.full(len(sizes), self.field.record_bytes, np.int64)
        if self.content == "json" and not self.is_copied:  # a number has a digit and what ends it
            return (sizes // 2 + 1) * self.field.stored_dtype.itemsize
        return sizes


_IMAGE_FIELD = MemberField("image", _IMAGE_EXTENSIONS, "image", image_field("image"), is_wanted=False)
_LABEL_FIELD = MemberField("label", ("cls",), "number", LABEL_FIELD, is_wanted=False)
_RECOGNISED = tuple(
    MemberField(extension, (extension,), "file", Field(kind="text"), is_wanted=False)
    for extension in ("txt", "json", "npy")
)


@dataclass(frozen=True)
class WebDataset:
    """Records of tar archives: for each its archive, its key, and where the members of its fields lie."""

    name: str
    schema: Schema
    members: tuple[MemberField, ...]
    files: tuple[SourceFile, ...]
    file_numbers: NDArray[np.int64]
    keys: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    refused: tuple[RefusedRecord, ...]
    kind: str = "webdataset"
    left_out: tuple[str, ...] = ()
    """Extensions of members that make no field, though nobody chose the fields."""

    @property
    def nbytes(self) -> NDArray[np.int64]:
        """Bounds, where arrays differ in size: what is in a member is not known before it is read."""
        for place, member in enumerate(self.members):
            if member.name == self.schema.primary:
                return member.most_bytes(self.sizes[:, place])
        return np.full(len(self.keys), self.schema.primary_field.record_bytes, np.int64)

    @property
    def secondary_nbytes(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: nbytes for name, nbytes in self._copied_nbytes().items() if name != self.schema.primary}

    def _copied_nbytes(self) -> dict[str, NDArray[np.int64]]:
        return {member.name: self.sizes[:, place] for place, member in enumerate(self.members) if member.is_copied}

    def identity(self) -> object:
        names = [file.path.name for file in self.files]
        members = [(member.name, member.extensions, member.content) for member in self.members]
        return names, self.file_numbers.tolist(), self.keys, self.sizes.tolist(), members

    def part(self, numbers: NDArray[np.int64]) -> "TarRecords":
        files, file_numbers = used_files(self.files, self.file_numbers[numbers])
        keys = tuple(self.keys[number] for number in numbers.tolist())
        return TarRecords(self.members, files, file_numbers, keys, self.offsets[numbers], self.sizes[numbers])


@dataclass(frozen=True)
class TarRecords:
    """Some of the records of tar archives."""

    members: tuple[MemberField, ...]
    files: tuple[SourceFile, ...]
    file_numbers: NDArray[np.int64]
    keys: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def mark(self) -> object:
        places = self.file_numbers.tolist(), self.keys, self.offsets.tolist(), self.sizes.tolist()
        members = [(member.name, member.extensions, member.content) for member in self.members]
        return [file.mark() for file in self.files], places, members

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        return read_in_order(self.file_numbers, np.zeros(len(self.keys), np.int64), self._read, room)

    def _read(self, records: NDArray[np.int64], room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        for number, of_file in groupby(records.tolist(), key=lambda record: int(self.file_numbers[record])):
            file = self.files[number]
            with file.open() as descriptor:
                for record in of_file:
                    try:
                        yield self._read_record(file, descriptor, record, room)
                    except (BadValueError, BadImageError) as error:
                        yield RefusedRecord(_record_name(file, self.keys[record]), str(error))

    def _read_record(self, file: SourceFile, descriptor: int, record: int, room: Room) -> SourceRecord:
        values: dict[str, Value] = {}
        places = zip(self.members, self.offsets[record].tolist(), self.sizes[record].tolist(), strict=True)
        for member, offset, nbytes in places:
            if member.content in ("image", "file"):
                content = room(member.name, nbytes)
                _read_member(file, descriptor, content, offset)
                if member.content == "image":
                    values["hw"] = image_size(content)
                continue
            if member.content == "number" and nbytes > _NUMBER_BYTES:
                raise BadValueError(
                    f"too large for a number is its .{member.extensions[0]}, which makes {member.name!r}"
                )
            text = bytearray(nbytes)
            _read_member(file, descriptor, memoryview(text), offset)
            try:
                values[member.name] = _value(member, bytes(text))
            except BadValueError as error:
                raise BadValueError(f"its .{member.extensions[0]} cannot be {member.name!r}: {error}") from None
        return SourceRecord(values)


def scan_webdataset(
    source: Path | Sequence[Path], fields: Mapping[str, str] | None = None, *, primary: str | None = None
) -> WebDataset:
    """Find the records of a .tar archive, of a list of them, or of those that lie in a folder.

    The member .jpg, .jpeg or .png is the field `image`, with its size in `hw`; .cls is `label`; without `fields`, .txt, .json and
    .npy are `txt`, `json` and `npy`, each where most records have it. `fields` names others in their place, and the extensions
    they come from: {"weight": "weight.txt", "sound": "flac"}. A member .npy is an array, .json numbers or lists of them, any
    other a number in text; where they are not, .json and text are kept as `text` and all else as files. A few records say
    which type and shape all have. `primary` is by default the image.

    Archives and records that are damaged, incomplete or ambiguous are refused. Raises SourceError when there is no archive or
    one cannot be read, UsageError for `fields` that cannot be.
    """
    members = _looked_for(fields)
    files = find_files(source, lambda name: name.lower().endswith(".tar"), "tar archives (*.tar)")
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        scanned = list(pool.map(lambda file: _scan_archive(file, members), files))
    found = WebDataset(
        name=source_name(source),
        schema=Schema(fields={"image": image_field("image")}),
        members=members,
        files=files,
        file_numbers=np.repeat(np.arange(len(files)), [len(archive.keys) for archive in scanned]),
        keys=tuple(key for archive in scanned for key in archive.keys),
        offsets=np.concatenate([archive.offsets for archive in scanned]).reshape(-1, len(members)),
        sizes=np.concatenate([archive.sizes for archive in scanned]).reshape(-1, len(members)),
        refused=tuple(refused for archive in scanned for refused in archive.refused),
    )
    found = _only_complete_records(_without_rare_fields(found))
    if not fields:
        taken = {extension for member in found.members for extension in member.extensions}
        others = sum((archive.extensions for archive in scanned), Counter())
        left_out = tuple(f".{extension}" for extension, _ in others.most_common() if extension not in taken)
        found = replace(found, left_out=left_out)
    typed = tuple(_typed(found, place, member) for place, member in enumerate(found.members))
    encodings = {encoding for archive in scanned for encoding in archive.encodings}
    return replace(found, members=typed, schema=_schema(typed, encodings, primary))


def _looked_for(fields: Mapping[str, str] | None) -> tuple[MemberField, ...]:
    """What may become a field: the image, the label unless that is spoken for, and the user's fields or those that are known."""
    if not fields:
        return (_IMAGE_FIELD, _LABEL_FIELD, *_RECOGNISED)
    extensions = {name: extension.lower().removeprefix(".") for name, extension in fields.items()}
    for taken in {"image", "hw"} & extensions.keys():
        raise UsageError(f"the column {taken!r} comes from the image itself: choose another name")
    for name, extension in extensions.items():
        if list(extensions.values()).count(extension) > 1 or extension in _IMAGE_EXTENSIONS:
            raise UsageError(f"the column {name!r} and another both come from .{extension}: each needs its own")
    wanted = [MemberField(name, (extension,), "file", LABEL_FIELD) for name, extension in extensions.items()]
    if "label" in extensions or "cls" in extensions.values():
        return (_IMAGE_FIELD, *wanted)
    return (_IMAGE_FIELD, _LABEL_FIELD, *wanted)


def _schema(members: Sequence[MemberField], encodings: set[str], primary: str | None) -> Schema:
    fields: dict[str, Field] = {}
    for member in members:
        fields[member.name] = member.field
        if member.content == "image":
            fields |= {"image": image_field(encodings.pop() if len(encodings) == 1 else "image"), "hw": SIZE_FIELD}
    return make_schema(fields, primary or ("image" if "image" in fields else ""))


@dataclass(frozen=True)
class _ScannedArchive:
    """The records of one archive, with _ABSENT for the offset of a member that is not there."""

    keys: list[str]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    encodings: frozenset[str]
    refused: list[RefusedRecord]
    extensions: Counter[str]
    """Of all members."""


def _scan_archive(file: SourceFile, members: tuple[MemberField, ...]) -> _ScannedArchive:
    places = {extension: place for place, member in enumerate(members) for extension in member.extensions}
    samples: dict[str, dict[int, TarMember]] = {}
    bad: dict[str, str] = {}
    refused: list[RefusedRecord] = []
    extensions: Counter[str] = Counter()
    with file.open() as descriptor:
        try:
            for member in read_members(descriptor, file.nbytes):
                key, extension = _split_name(member.name)
                reason = _why_no_member(member, key, extension)
                if reason:
                    refused.append(RefusedRecord(_record_name(file, member.name), reason))
                    continue
                extensions[extension] += 1
                sample = samples.setdefault(key, {})
                place = places.get(extension)
                if place is None:
                    continue
                if place in sample:
                    what = "image" if members[place].content == "image" else f".{extension}"
                    bad[key] = f"it has more than one {what}: {sample[place].name} and {member.name}"
                sample[place] = member
        except BadTarError as error:
            refused.append(RefusedRecord(str(file.path), f"{error}; copy or pack it again"))
    refused += [RefusedRecord(_record_name(file, key), reason) for key, reason in bad.items()]
    good = [(key, sample) for key, sample in samples.items() if key not in bad]
    offsets = np.full((len(good), len(members)), _ABSENT, np.int64)
    sizes = np.zeros_like(offsets)
    encodings = set()
    for record, (_, sample) in enumerate(good):
        for place, member in sample.items():
            offsets[record, place], sizes[record, place] = member.offset, member.nbytes
            if members[place].content == "image":
                encodings.add(IMAGE_SUFFIXES["." + _split_name(member.name)[1]])
    return _ScannedArchive([key for key, _ in good], offsets, sizes, frozenset(encodings), refused, extensions)


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


def _without_rare_fields(found: WebDataset) -> WebDataset:
    """Without the fields that nobody asked for and that most records do not have. No image, no label at all is none missing."""
    present = (found.offsets != _ABSENT).mean(axis=0) if found.keys else np.ones(len(found.members))
    kept = []
    for place, member in enumerate(found.members):
        if present[place] == 0 and member.is_wanted:
            raise UsageError(
                f"{found.name}: no record has a member .{member.extensions[0]} for the column {member.name!r}"
            )
        is_usual = present[place] > (0 if member in (_IMAGE_FIELD, _LABEL_FIELD) else 0.5)
        if member.is_wanted or (is_usual and (found.keys or member not in _RECOGNISED)):
            kept.append(place)
    if not kept:
        raise SourceError(
            f"{found.name}: its members end in nothing that is known (jpg, png, cls, txt, json, npy): say by --field NAME=EXTENSION "
            "which are fields"
        )
    members = tuple(found.members[place] for place in kept)
    return replace(found, members=members, offsets=found.offsets[:, kept], sizes=found.sizes[:, kept])


def _only_complete_records(found: WebDataset) -> WebDataset:
    """Refuse the records that lack a member that makes a field, or whose image is empty."""
    refused = list(found.refused)
    complete = np.ones(len(found.keys), bool)
    for place, member in enumerate(found.members):
        reasons = {
            f"it has no .{member.extensions[0]}, which makes {member.name!r}": found.offsets[:, place] == _ABSENT
        }
        if member.content == "image":
            reasons = {
                "it has no image: no member .jpg, .jpeg or .png": found.offsets[:, place] == _ABSENT,
                "its image is empty": found.sizes[:, place] == 0,
            }
        for reason, wrong in reasons.items():
            for record in np.flatnonzero(wrong & complete).tolist():
                name = _record_name(found.files[found.file_numbers[record]], found.keys[record])
                refused.append(RefusedRecord(name, reason))
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


def _typed(found: WebDataset, place: int, member: MemberField) -> MemberField:
    """The field with the type and shape that a few members have. Images and labels are known."""
    if member in (_IMAGE_FIELD, _LABEL_FIELD) or not found.keys:
        return member
    contents = []
    for record in np.unique(np.linspace(0, len(found.keys) - 1, _LOOKED_AT).astype(int)).tolist():
        file, member_bytes = found.files[found.file_numbers[record]], bytearray(int(found.sizes[record, place]))
        with file.open() as descriptor:
            _read_member(file, descriptor, memoryview(member_bytes), int(found.offsets[record, place]))
        contents.append(bytes(member_bytes))
    if member.name == "label":
        return replace(member, content="number", field=LABEL_FIELD)
    extension = member.extensions[0]
    contents_of: Content = "array" if extension.endswith("npy") else "json" if extension.endswith("json") else "number"
    numbers: list[NDArray[np.generic]] = []
    reason = "it is no array"
    for content in contents:
        try:
            numbers.append(as_array(_number_like(contents_of, content)))
        except BadValueError as error:
            reason = str(error)
    try:
        if 2 * len(numbers) > len(contents):
            return replace(member, content=contents_of, field=common_array_field(numbers))
        if contents_of == "array":
            raise BadValueError(reason)
    except BadValueError as error:
        raise UsageError(
            f"{found.name}: its .{extension} cannot be a column {member.name!r}: {error}; leave that column out"
        ) from None
    if contents_of == "json" or (extension.endswith(("txt", "text", "caption")) and all(map(_is_text, contents))):
        encoding = "json" if contents_of == "json" else None
        return replace(member, content="text", field=Field(kind="text", encoding=encoding))
    made = file_field(contents)
    if made.encoding == UNKNOWN_ENCODING:
        made = made.model_copy(update={"encoding": extension.rpartition(".")[2]})
    return replace(member, content="file", field=made)


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def _value(member: MemberField, content: bytes) -> Value:
    """What a member that is no file holds. Raises BadValueError for anything else."""
    if member.content == "text":
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise BadValueError("it is no text in UTF-8") from None
    value = _number_like(member.content, content)
    return column_value(value, member.field) if member.field.kind == "tensor" else as_array(value)


def _number_like(content_kind: Content, content: bytes) -> Value:
    """The numbers in a member. Raises BadValueError for anything else."""
    try:
        if content_kind == "array":
            return array_in(content)
        if content_kind == "json":
            return as_array(json.loads(content))
        text = content.decode().strip()
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except BadValueError:
        raise
    except (ValueError, RecursionError):
        raise BadValueError(f"it holds no number but {content[:20]!r}") from None


def _read_member(file: SourceFile, descriptor: int, content: memoryview, offset: int) -> None:
    if pread_exactly(descriptor, content, offset) != len(content):
        raise SourceError(f"{file.path} is shorter than it was when it was scanned: run the same command again")


def _record_name(file: SourceFile, key: str) -> str:
    return f"{os.fspath(file.path)}: {key}"
