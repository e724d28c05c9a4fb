"""TFRecord files of tf.train.Example, plain or gzip, without TensorFlow.

A record is framed as u64 length, u32 masked crc32c of these 8 bytes, payload, u32 masked crc32c of the payload, all
little-endian (TensorFlow's documentation, "TFRecord and tf.train.Example"; mask: rotate right by 15, add 0xa282ead8).
Index files (.idx) beside them are not needed and not read: lengths are found by stepping from record to record.
"""

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from stagein.formats.checksums import Buffer, crc32c
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.images import BadImageError
from stagein.formats.schema import Field, Schema, make_schema
from stagein.formats.source import RefusedRecord, Room, SourceRecord
from stagein.formats.values import UNKNOWN_ENCODING, BadValueError, Value, to_rows

from .fields import LABEL_FIELD, SIZE_FIELD, column_value, file_field, image_field, image_size
from .files import SCAN_THREADS, SourceFile, find_files, source_name, used_files
from .read_order import read_in_order
from .tf_example import BadExampleError, Fetch, Span, feature_spans, feature_values, fetch_from, single_bytes

COSMOFLOW_SHAPE = (128, 128, 128, 4)

_WANTED_NAME = re.compile(r"(\.tfrecords?|-\d+-of-\d+)(\.gz)?$")
_HEAD_BYTES = 12
_SUM_BYTES = 4
_FRAME_BYTES = _HEAD_BYTES + _SUM_BYTES
_MAX_LENGTH = 2**32 - 1
_SCAN_WINDOW_BYTES = 4096
_DRAINED_BYTES = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
_IMAGE_ENCODINGS = ("jpeg", "png", "image")


class _BadFramingError(ValueError):
    """No whole record lies here; the text says why."""


_STREAM_ERRORS = (*_GZIP_ERRORS, _BadFramingError)


@dataclass(frozen=True)
class MappedFeature:
    """The feature of that name, and the field that it becomes; `first` is taken from its numbers, so that they start at 0.

    A `tensor` field is made of one bytes value that holds its little-endian numbers, or of a list of floats or integers, as a
    `ragged` one is; `encoded` and `text` of one bytes value.
    """

    feature: str
    field: Field
    first: int = 0


@dataclass(frozen=True)
class FieldMapping:
    """Which features of an Example become which fields; `primary` names the field that fills the shards."""

    primary: str
    fields: Mapping[str, MappedFeature]

    @property
    def primary_feature(self) -> MappedFeature:
        return self.fields[self.primary]

    @property
    def columns(self) -> dict[str, MappedFeature]:
        return {name: mapped for name, mapped in self.fields.items() if name != self.primary}

    @property
    def variable(self) -> dict[str, MappedFeature]:
        """The fields whose records differ in size, the primary one first."""
        ordered = {self.primary: self.primary_feature} | dict(self.fields)
        return {name: mapped for name, mapped in ordered.items() if mapped.field.is_variable}

    @property
    def is_image(self) -> bool:
        """Whether the primary field is an image, whose header is checked and says its size in the column `hw`."""
        return self.primary_feature.field.encoding in _IMAGE_ENCODINGS

    def schema(self) -> Schema:
        """The fields of a record. Raises UsageError for what cannot be one."""
        if self.primary not in self.fields or (self.is_image and "hw" in self.columns):
            raise UsageError(
                f"the fields {', '.join(self.fields)} make no data set: the primary field {self.primary!r} is among them "
                "and an image has no other field `hw`"
            )
        fields = {name: mapped.field for name, mapped in self.fields.items()}
        return make_schema(fields | ({"hw": SIZE_FIELD} if self.is_image else {}), self.primary)

    def mark(self) -> object:
        """What it takes from an Example, as JSON."""
        return [(name, mapped.feature, mapped.first) for name, mapped in self.fields.items()]


def image_mapping(first_label: int = 1) -> FieldMapping:
    """ImageNet as ResNet-50 trainers lay it out: `image/encoded`, and `image/class/label` counted from `first_label`."""
    label = MappedFeature("image/class/label", LABEL_FIELD, first_label)
    return FieldMapping("image", {"image": MappedFeature("image/encoded", image_field("image")), "label": label})


def cosmoflow_mapping(shape: tuple[int, ...] = COSMOFLOW_SHAPE) -> FieldMapping:
    """MLPerf CosmoFlow: `x`, bytes of int16 of that shape, and `y`, four float32."""
    x = Field(kind="tensor", dtype="int16", shape=shape)
    y = Field(kind="tensor", dtype="float32", shape=(4,))
    return FieldMapping("x", {"x": MappedFeature("x", x), "y": MappedFeature("y", y)})


@dataclass(frozen=True)
class RecordFile:
    """A TFRecord file; `is_lone`: it is taken to hold one record, and whoever reads it must check that nothing follows."""

    file: SourceFile
    is_gzip: bool
    is_lone: bool = False

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes, decompressed. Raises SourceError as SourceFile does, and gzip's errors."""
        with self.file.open() as descriptor, _open_stream(descriptor, is_gzip=self.is_gzip) as stream:
            yield stream


@dataclass(frozen=True)
class TFRecords:
    """Records of TFRecord files: for each its file, its number and place in it, and the sizes of its fields that vary in size."""

    name: str
    mapping: FieldMapping
    schema: Schema
    files: tuple[RecordFile, ...]
    file_numbers: NDArray[np.int64]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    """[records, fields of the mapping that vary in size], in bytes."""
    refused: tuple[RefusedRecord, ...]
    kind: str = "tfrecord"

    @property
    def nbytes(self) -> NDArray[np.int64]:
        fixed = np.full(len(self.numbers), self.schema.primary_field.record_bytes, np.int64)
        return self.sizes[:, 0] if self.mapping.primary in self.mapping.variable else fixed

    @property
    def secondary_nbytes(self) -> Mapping[str, NDArray[np.int64]]:
        sizes = zip(self.mapping.variable, self.sizes.T, strict=True)
        return {name: nbytes for name, nbytes in sizes if name != self.mapping.primary}

    @property
    def costly_order(self) -> str | None:
        if any(file.is_gzip and not file.is_lone for file in self.files):
            return "gzip can only be read from its start"
        return None

    def identity(self) -> object:
        names = [file.file.path.name for file in self.files]
        records = [array.tolist() for array in (self.file_numbers, self.numbers, self.lengths, self.sizes)]
        return names, records, self.mapping.mark()

    def part(self, numbers: NDArray[np.int64]) -> "ExampleRecords":
        files, file_numbers = used_files(self.files, self.file_numbers[numbers])
        columns = (self.numbers, self.offsets, self.lengths, self.sizes)
        return ExampleRecords(self.mapping, files, file_numbers, *(column[numbers] for column in columns))


@dataclass(frozen=True)
class ExampleRecords:
    """Some of the records of TFRecord files."""

    mapping: FieldMapping
    files: tuple[RecordFile, ...]
    file_numbers: NDArray[np.int64]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def mark(self) -> object:
        arrays = (self.file_numbers, self.numbers, self.offsets, self.lengths, self.sizes)
        return [file.file.mark() for file in self.files], [array.tolist() for array in arrays], self.mapping.mark()

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        is_gzip = np.array([file.is_gzip for file in self.files], bool)
        positions = np.where(is_gzip[self.file_numbers], self.offsets, 0)  # a plain file is read at any offset
        return read_in_order(self.file_numbers, positions, self._read, room)

    def _read(self, records: NDArray[np.int64], room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        frame = bytearray(int(self.lengths.max(initial=0)) + _FRAME_BYTES)
        for number, of_file in groupby(records.tolist(), key=lambda record: int(self.file_numbers[record])):
            file = self.files[number]
            with file.open() as stream:
                for record in of_file:
                    content = memoryview(frame)[: int(self.lengths[record]) + _FRAME_BYTES]
                    try:
                        _read_frame(stream, content, int(self.offsets[record]))
                        if file.is_lone:
                            _check_lone(file.file, stream)
                        sizes = dict(zip(self.mapping.variable, self.sizes[record].tolist(), strict=True))
                        made = self._make_record(content[_HEAD_BYTES:-_SUM_BYTES], sizes, room)
                    except (*_STREAM_ERRORS, BadExampleError, BadValueError, BadImageError) as error:
                        yield RefusedRecord(_record_name(file.file, int(self.numbers[record])), _reason(error))
                    else:
                        yield made

    def _make_record(self, payload: memoryview, sizes: Mapping[str, int], room: Room) -> SourceRecord:
        """The record that an Example holds. Raises BadExampleError, BadValueError, BadImageError."""
        spans = dict(feature_spans(fetch_from(payload), Span(0, len(payload))))
        values: dict[str, Value] = {}
        for name, mapped in self.mapping.fields.items():
            feature = _wanted(spans, mapped.feature)
            if mapped.field.kind == "text":
                values[name] = _text(payload, feature, mapped)
            elif name != self.mapping.primary and mapped.field.kind == "tensor":
                values[name] = _array(payload, feature, mapped).copy()  # the payload is overwritten
            else:
                content = room(name, sizes.get(name, mapped.field.record_bytes))
                _fill(content, payload, feature, mapped)
                if name == self.mapping.primary and self.mapping.is_image:
                    values["hw"] = image_size(content)
        return SourceRecord(values)


def scan_tfrecord(
    source: Path | Sequence[Path],
    mapping: FieldMapping | None = None,
    *,
    fields: Mapping[str, str] | None = None,
    primary: str | None = None,
    first_label: int = 1,
) -> TFRecords:
    """Find the records of a TFRecord file, of a list of them, or of those that lie in a folder.

    In a folder these are *.tfrecord, *.tfrecords and *-00000-of-00001, each also with .gz. Without `mapping` and `fields` the
    first record decides between `image_mapping(first_label)` and `cosmoflow_mapping()`. `fields` names the feature of each
    field, and where its bytes or its list are the numbers of an array, their type and shape: {"x": "x:int16:128x128x128x4",
    "boxes": "bbox:float32:?x4"};
    the first record says what other fields are: lists of one number a scalar, lists of numbers `ragged`, bytes an image, a text
    or another file. `primary` is by default the first image, else the first large field. Plain files are stepped through by their headers.
    A gzip file is decompressed to find its records, unless all fields have a fixed size and the file's first
    and last bytes say that it holds one record. What is damaged or truncated is refused. Raises SourceError when there
    is no file, one cannot be read or no mapping is known, UsageError for a mapping that cannot be.
    """
    wanted = "TFRecord files (*.tfrecord, *.tfrecords, *-00000-of-00001)"
    files = find_files(source, lambda name: _WANTED_NAME.search(name) is not None, wanted)
    if mapping is None:
        mapping = _mapping_of(files, fields, primary) if fields else _guess_mapping(files, first_label)
    schema = mapping.schema()
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        scanned = list(pool.map(lambda file: _scan_file(file, mapping), files))
    found = np.array([record for file in scanned for record in file.records], np.int64).reshape(
        -1, 3 + len(mapping.variable)
    )
    return TFRecords(
        name=source_name(source),
        mapping=mapping,
        schema=schema,
        files=tuple(file.file for file in scanned),
        file_numbers=np.repeat(np.arange(len(files)), [len(file.records) for file in scanned]),
        numbers=found[:, 0],
        offsets=found[:, 1],
        lengths=found[:, 2],
        sizes=found[:, 3:],
        refused=tuple(refused for file in scanned for refused in file.refused),
    )


def _guess_mapping(files: Sequence[SourceFile], first_label: int) -> FieldMapping:
    """The mapping that suits the first record there is."""
    file, _, features = _first_example(files)
    if {"image/encoded", "image/class/label"} <= features.keys():
        return image_mapping(first_label)
    if {"x", "y"} <= features.keys():
        return cosmoflow_mapping()
    raise SourceError(f"{file.path} holds the features {_listed(features)}: say by --field which of them become fields")


def _mapping_of(files: Sequence[SourceFile], fields: Mapping[str, str], primary: str | None) -> FieldMapping:
    """The mapping that a user asks for, with the types that the first record there is shows."""
    file, payload, features = _first_example(files)
    mapped: dict[str, MappedFeature] = {}
    for name, place in fields.items():
        feature, declared = _parse_place(place)
        if feature not in features:
            raise UsageError(f"{file.path} has no feature {feature!r}: it has {_listed(features)}")
        try:
            mapped[name] = MappedFeature(feature, declared or _field_of(payload, features[feature]))
        except (BadExampleError, BadValueError) as error:
            raise UsageError(f"{file.path}: its feature {feature!r} cannot be a field: {error}") from None
    images = [name for name, each in mapped.items() if each.field.encoding in _IMAGE_ENCODINGS]
    schema = make_schema({name: each.field for name, each in mapped.items()}, primary or (images[0] if images else ""))
    return FieldMapping(schema.primary, mapped)


def _parse_place(place: str) -> tuple[str, Field | None]:
    """FEATURE, or FEATURE:TYPE:SHAPE for arrays, where ? is a first extent that differs. Raises UsageError for what is none."""
    feature, _, rest = place.partition(":")
    if not rest:
        return feature, None
    dtype, _, extents = rest.partition(":")
    try:
        shape = tuple(None if extent == "?" else int(extent) for extent in extents.split("x")) if extents else ()
        if None in shape[1:]:
            raise ValueError("a list of numbers does not say which shape it has")
        return feature, Field(kind="ragged" if None in shape else "tensor", dtype=dtype, shape=shape)
    except ValueError:  # pydantic's is one
        raise UsageError(f"{place!r} is not FEATURE:TYPE:SHAPE, such as x:int16:128x128x128x4") from None


def _field_of(payload: memoryview, feature: Span) -> Field:
    """The field that a feature looks like. Raises BadExampleError, BadValueError."""
    values = feature_values(payload, feature)
    if not isinstance(values, list):
        return Field(
            kind="tensor" if len(values) == 1 else "ragged",
            dtype=values.dtype.name,
            shape=() if len(values) == 1 else (None,),
        )
    if len(values) != 1:
        raise BadValueError(f"it holds {len(values)} values of bytes, not one")
    made = file_field([bytes(values[0])])
    if made.encoding == UNKNOWN_ENCODING:
        try:
            if "\0" not in bytes(values[0]).decode():
                return Field(kind="text")
        except UnicodeDecodeError:
            pass
    return made


def _first_example(files: Sequence[SourceFile]) -> tuple[SourceFile, memoryview, dict[str, Span]]:
    """The first record there is: its file, its bytes, and where in them its features are."""
    for file in files:
        with file.open() as descriptor, _open_stream(descriptor, is_gzip=_is_gzip(descriptor)) as stream:
            try:
                payload = memoryview(stream.read(_length(stream.read(_HEAD_BYTES))))
                return file, payload, dict(feature_spans(fetch_from(payload), Span(0, len(payload))))
            except (*_STREAM_ERRORS, BadExampleError):
                continue
    raise SourceError(f"{files[0].path} is no TFRecord file with a record, nor is any file beside it: check the path")


@dataclass
class _ScannedFile:
    """What a file holds: number, offset, length of its records, and bytes of their fields that vary in size."""

    file: RecordFile
    records: list[tuple[int, ...]] = field(default_factory=list)
    refused: list[RefusedRecord] = field(default_factory=list)


def _scan_file(file: SourceFile, mapping: FieldMapping) -> _ScannedFile:
    if file.nbytes == 0:
        return _ScannedFile(RecordFile(file, False), refused=[RefusedRecord(str(file.path), "the file is empty")])
    with file.open() as descriptor:
        is_gzip = _is_gzip(descriptor)
        lone = _scan_lone_record(file, descriptor, mapping) if is_gzip else None
        return lone or _scan_records(RecordFile(file, is_gzip), descriptor, mapping)


def _scan_lone_record(file: SourceFile, descriptor: int, mapping: FieldMapping) -> _ScannedFile | None:
    """A gzip file whose first record is as long as its trailer says all of it is, without decompressing it; else None.

    The trailer counts modulo 2**32 and only the last member of several, so that this is checked when the file is read.
    """
    if mapping.variable:
        return None
    trailer = os.pread(descriptor, 4, file.nbytes - 4)
    with _open_stream(descriptor, is_gzip=True) as stream:
        try:
            length = _length(stream.read(_HEAD_BYTES))
        except _STREAM_ERRORS:
            return None
    if struct.unpack("<I", trailer) != (length + _FRAME_BYTES,):
        return None
    return _ScannedFile(RecordFile(file, is_gzip=True, is_lone=True), [(0, 0, length)])


def _scan_records(file: RecordFile, descriptor: int, mapping: FieldMapping) -> _ScannedFile:
    """Step from record to record, to the end or to the first that is damaged."""
    scanned = _ScannedFile(file)
    offset = number = 0
    with _open_stream(descriptor, is_gzip=file.is_gzip, buffer_bytes=_SCAN_WINDOW_BYTES) as stream:
        try:
            while head := _bytes_at(stream, offset, _HEAD_BYTES):
                length = _length(head)
                end = offset + length + _FRAME_BYTES
                if file.is_gzip:
                    payload = memoryview(stream.read(length + _SUM_BYTES))
                    fetch, example = fetch_from(payload), Span(0, length)
                    is_whole = len(payload) == length + _SUM_BYTES
                else:
                    fetch, example = partial(_bytes_at, stream), Span(offset + _HEAD_BYTES, end - _SUM_BYTES)
                    is_whole = end <= file.file.nbytes
                if not is_whole:
                    raise _BadFramingError("truncated: the file ends within it")
                try:
                    scanned.records.append((number, offset, length, *_variable_nbytes(fetch, example, mapping)))
                except BadExampleError as error:
                    scanned.refused.append(RefusedRecord(_record_name(file.file, number), str(error)))
                offset, number = end, number + 1
        except _STREAM_ERRORS as error:
            reason = f"{_reason(error)}; nothing from there on can be read, copy the file again"
            scanned.refused.append(RefusedRecord(_record_name(file.file, number), reason))
    return scanned


def _variable_nbytes(fetch: Fetch, example: Span, mapping: FieldMapping) -> list[int]:
    """Bytes of the fields of an Example that vary in size; no more is read than that needs. Raises BadExampleError."""
    variable = mapping.variable
    if not variable:
        return []
    wanted = {mapped.feature for mapped in variable.values()}
    spans: dict[str, Span] = {}
    for name, feature in feature_spans(fetch, example):
        if name in wanted:
            spans[name] = feature
            if len(spans) == len(wanted):
                break
    return [_feature_nbytes(fetch, _wanted(spans, mapped.feature), mapped) for mapped in variable.values()]


def _feature_nbytes(fetch: Fetch, feature: Span, mapped: MappedFeature) -> int:
    if mapped.field.kind == "ragged":
        content = memoryview(fetch(feature.start, feature.stop - feature.start))
        return len(feature_values(content, Span(0, len(content)))) * mapped.field.stored_dtype.itemsize
    value = single_bytes(fetch, feature)
    return value.stop - value.start


def _fill(content: memoryview, payload: memoryview, feature: Span, mapped: MappedFeature) -> None:
    """Copy a field to its place. Raises BadExampleError, BadValueError."""
    if mapped.field.kind == "tensor":
        np.frombuffer(content, mapped.field.stored_dtype)[:] = _array(payload, feature, mapped).ravel()
        return
    if mapped.field.kind == "ragged":
        values = feature_values(payload, feature)
        if isinstance(values, list) or values.size * mapped.field.stored_dtype.itemsize != len(content):
            raise BadValueError(f"its feature {mapped.feature!r} is no list of numbers, or is there twice")
        if len(content) % mapped.field.row_bytes:
            raise BadValueError(
                f"its feature {mapped.feature!r} has {values.size} numbers, not rows of {mapped.field.row_shape}"
            )
        rows = to_rows(mapped.field, values.reshape(-1, *mapped.field.row_shape))
        np.frombuffer(content, mapped.field.stored_dtype)[:] = rows.ravel()
        return
    value = single_bytes(fetch_from(payload), feature)
    if value.stop - value.start != len(content):
        raise BadExampleError(f"its feature {mapped.feature!r} is there twice")
    content[:] = payload[value.start : value.stop]


def _text(payload: memoryview, feature: Span, mapped: MappedFeature) -> str:
    value = single_bytes(fetch_from(payload), feature)
    try:
        return bytes(payload[value.start : value.stop]).decode()
    except UnicodeDecodeError:
        raise BadValueError(f"its feature {mapped.feature!r} is no text in UTF-8") from None


def _array(payload: memoryview, feature: Span, mapped: MappedFeature) -> NDArray[np.generic]:
    """The numbers of a feature as its field stores them. Raises BadExampleError, BadValueError."""
    shape, dtype = mapped.field.fixed_shape, mapped.field.stored_dtype
    values = feature_values(payload, feature)
    if isinstance(values, list):
        sizes = [len(value) for value in values]
        if sizes != [mapped.field.record_bytes]:
            raise BadValueError(
                f"its feature {mapped.feature!r} has values of {sizes} bytes, not one {shape} of {dtype}"
            )
        array: NDArray[np.generic] = np.frombuffer(values[0], dtype).reshape(shape)
    elif values.size != math.prod(shape):
        raise BadValueError(f"its feature {mapped.feature!r} has {values.size} numbers, not {shape}")
    else:
        array = column_value(values.reshape(shape), mapped.field)
    if mapped.first:
        if np.less(array, mapped.first).any():
            raise BadValueError(f"its feature {mapped.feature!r} is {array}, below the first of all, {mapped.first}")
        array = column_value(np.subtract(array, mapped.first), mapped.field)
    return array


def _wanted(spans: Mapping[str, Span], feature: str) -> Span:
    if feature not in spans:
        raise BadExampleError(f"it has no feature {feature!r}, only {_listed(spans)}")
    return spans[feature]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def _read_frame(stream: BinaryIO, frame: memoryview, offset: int) -> None:
    """Read a framed record and check both sums. Raises _BadFramingError and gzip's errors."""
    stream.seek(offset)
    done = 0
    while done < len(frame):
        got = stream.readinto(frame[done:])  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        if not got:
            raise _BadFramingError("truncated: the file ends within it")
        done += got
    length = _length(frame[:_HEAD_BYTES])
    if length != len(frame) - _FRAME_BYTES:
        raise _BadFramingError(f"damaged: its length is {length}, not {len(frame) - _FRAME_BYTES}")
    (said,) = struct.unpack("<I", frame[-_SUM_BYTES:])
    if (computed := _masked_crc32c(frame[_HEAD_BYTES:-_SUM_BYTES])) != said:
        raise _BadFramingError(f"damaged: its masked crc32c is {computed:08x}, the file says {said:08x}")


def _check_lone(file: SourceFile, stream: BinaryIO) -> None:
    """Read on to the end of a gzip file, where its own checksum is compared. Raises SourceError, or gzip's if damaged."""
    excess = 0
    while more := stream.read(_DRAINED_BYTES):
        excess += len(more)
    if excess:
        raise SourceError(
            f"{file.path} holds more records than the end of the gzip file says: decompress it (gunzip) and convert again"
        )


def _length(head: Buffer) -> int:
    """The length that the first 12 bytes of a record give. Raises _BadFramingError."""
    if len(head) < _HEAD_BYTES:
        raise _BadFramingError("truncated: the file ends within it")
    length, said = struct.unpack("<QI", head)
    if _masked_crc32c(head[:8]) != said:
        raise _BadFramingError("damaged: it does not start with a length and the checksum of that")
    if length > _MAX_LENGTH:
        raise _BadFramingError(f"damaged: it would be {length} bytes long")
    return int(length)


def _masked_crc32c(content: Buffer) -> int:
    plain = crc32c(content)
    return ((plain >> 15 | plain << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _is_gzip(descriptor: int) -> bool:
    """Whether the file is gzip: a TFRecord file may start with the same bytes, but then they have their checksum."""
    head = os.pread(descriptor, _HEAD_BYTES, 0)
    try:
        _length(head)
    except _BadFramingError:
        return head[:2] == _GZIP_MAGIC
    return False


@contextmanager
def _open_stream(descriptor: int, *, is_gzip: bool, buffer_bytes: int = 0) -> Iterator[BinaryIO]:
    """The file from its start, decompressed; `buffer_bytes` are read at a time when it is not compressed."""
    with open(descriptor, "rb", buffering=0 if is_gzip else buffer_bytes, closefd=False) as file:
        file.seek(0)
        if not is_gzip:
            yield file
            return
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            yield cast("BinaryIO", stream)


def _bytes_at(stream: BinaryIO, offset: int, nbytes: int) -> bytes:
    stream.seek(offset)
    return stream.read(nbytes)


def _reason(error: Exception) -> str:
    return f"damaged gzip: {error}" if isinstance(error, _GZIP_ERRORS) else str(error)


def _record_name(file: SourceFile, number: int) -> str:
    return f"{file.path}: record {number}"
