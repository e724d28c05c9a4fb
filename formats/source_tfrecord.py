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

from .checksums import Buffer, crc32c
from .errors import SourceError, UsageError
from .images import BadImageError
from .schema import Field, Schema
from .source_fields import LABEL_FIELD, SIZE_FIELD, column_value, image_field, image_size, make_schema
from .source_files import SCAN_THREADS, SourceFile, find_files, source_name, used_files
from .sources import RefusedRecord, Room, SourceRecord
from .tf_example import BadExampleError, Fetch, Span, feature_spans, feature_values, fetch_from, single_bytes
from .values import BadValueError, Value

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

    A `tensor` field is made of one bytes value that holds its little-endian numbers, or of a list of floats or integers.
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
    """Records of TFRecord files: for each its file, its number and place in it, and the size of its primary field."""

    name: str
    mapping: FieldMapping
    schema: Schema
    files: tuple[RecordFile, ...]
    file_numbers: NDArray[np.int64]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    refused: tuple[RefusedRecord, ...]
    kind: str = "tfrecord"
    secondary_nbytes: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def identity(self) -> object:
        names = [file.file.path.name for file in self.files]
        records = [array.tolist() for array in (self.file_numbers, self.numbers, self.lengths, self.nbytes)]
        return names, records, self.mapping.mark()

    def part(self, numbers: NDArray[np.int64]) -> "ExampleRecords":
        files, file_numbers = used_files(self.files, self.file_numbers[numbers])
        columns = (self.numbers, self.offsets, self.lengths, self.nbytes)
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
    nbytes: NDArray[np.int64]

    def mark(self) -> object:
        arrays = (self.file_numbers, self.numbers, self.offsets, self.lengths, self.nbytes)
        return [file.file.mark() for file in self.files], [array.tolist() for array in arrays], self.mapping.mark()

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        frame = bytearray(int(self.lengths.max(initial=0)) + _FRAME_BYTES)
        for number, records in groupby(range(len(self.numbers)), key=lambda record: int(self.file_numbers[record])):
            file = self.files[number]
            with file.open() as stream:
                for record in records:
                    content = memoryview(frame)[: int(self.lengths[record]) + _FRAME_BYTES]
                    try:
                        _read_frame(stream, content, int(self.offsets[record]))
                        if file.is_lone:
                            _check_lone(file.file, stream)
                        made = self._make_record(content[_HEAD_BYTES:-_SUM_BYTES], int(self.nbytes[record]), room)
                    except (*_STREAM_ERRORS, BadExampleError, BadValueError, BadImageError) as error:
                        yield RefusedRecord(_record_name(file.file, int(self.numbers[record])), _reason(error))
                    else:
                        yield made

    def _make_record(self, payload: memoryview, nbytes: int, room: Room) -> SourceRecord:
        """The record that an Example holds. Raises BadExampleError, BadValueError, BadImageError."""
        spans = dict(feature_spans(fetch_from(payload), Span(0, len(payload))))
        primary = self.mapping.primary_feature
        content = room(self.mapping.primary, nbytes)
        _fill_primary(content, payload, _wanted(spans, primary.feature), primary)
        values: dict[str, Value] = {"hw": image_size(content)} if self.mapping.is_image else {}
        for name, mapped in self.mapping.columns.items():
            values[name] = _array(payload, _wanted(spans, mapped.feature), mapped).copy()  # the payload is overwritten
        return SourceRecord(values)


def scan_tfrecord(
    source: Path | Sequence[Path], mapping: FieldMapping | None = None, *, first_label: int = 1
) -> TFRecords:
    """Find the records of a TFRecord file, of a list of them, or of those that lie in a folder.

    In a folder these are *.tfrecord, *.tfrecords and *-00000-of-00001, each also with .gz. Without `mapping` the first
    record decides between `image_mapping(first_label)` and `cosmoflow_mapping()`. Plain files are stepped through by their headers.
    A gzip file is decompressed to find its records, unless the primary field has a fixed size and the file's first
    and last bytes say that it holds one record. What is damaged or truncated is refused. Raises SourceError when there
    is no file, one cannot be read or no mapping is known, UsageError for a mapping that cannot be.
    """
    wanted = "TFRecord files (*.tfrecord, *.tfrecords, *-00000-of-00001)"
    files = find_files(source, lambda name: _WANTED_NAME.search(name) is not None, wanted)
    mapping = mapping or _guess_mapping(files, first_label)
    schema = mapping.schema()
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        scanned = list(pool.map(lambda file: _scan_file(file, mapping), files))
    found = np.array([record for file in scanned for record in file.records], np.int64).reshape(-1, 4)
    return TFRecords(
        name=source_name(source),
        mapping=mapping,
        schema=schema,
        files=tuple(file.file for file in scanned),
        file_numbers=np.repeat(np.arange(len(files)), [len(file.records) for file in scanned]),
        numbers=found[:, 0],
        offsets=found[:, 1],
        lengths=found[:, 2],
        nbytes=found[:, 3],
        refused=tuple(refused for file in scanned for refused in file.refused),
    )


def _guess_mapping(files: Sequence[SourceFile], first_label: int) -> FieldMapping:
    """The mapping that suits the first record there is."""
    for file in files:
        with file.open() as descriptor, _open_stream(descriptor, is_gzip=_is_gzip(descriptor)) as stream:
            try:
                payload = memoryview(stream.read(_length(stream.read(_HEAD_BYTES))))
                names = {name for name, _ in feature_spans(fetch_from(payload), Span(0, len(payload)))}
            except (*_STREAM_ERRORS, BadExampleError):
                continue
        if {"image/encoded", "image/class/label"} <= names:
            return image_mapping(first_label)
        if {"x", "y"} <= names:
            return cosmoflow_mapping()
        raise SourceError(f"{file.path} holds the features {_listed(names)}: a mapping must say what they become")
    raise SourceError(f"{files[0].path} is no TFRecord file with a record, nor is any file beside it: check the path")


@dataclass
class _ScannedFile:
    """What a file holds: number, offset, length and bytes of the primary field of its records."""

    file: RecordFile
    records: list[tuple[int, int, int, int]] = field(default_factory=list)
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
    primary = mapping.primary_feature.field
    if primary.kind != "tensor":
        return None
    trailer = os.pread(descriptor, 4, file.nbytes - 4)
    with _open_stream(descriptor, is_gzip=True) as stream:
        try:
            length = _length(stream.read(_HEAD_BYTES))
        except _STREAM_ERRORS:
            return None
    if struct.unpack("<I", trailer) != (length + _FRAME_BYTES,):
        return None
    return _ScannedFile(RecordFile(file, is_gzip=True, is_lone=True), [(0, 0, length, primary.record_bytes)])


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
                    scanned.records.append((number, offset, length, _primary_nbytes(fetch, example, mapping)))
                except BadExampleError as error:
                    scanned.refused.append(RefusedRecord(_record_name(file.file, number), str(error)))
                offset, number = end, number + 1
        except _STREAM_ERRORS as error:
            reason = f"{_reason(error)}; nothing from there on can be read, copy the file again"
            scanned.refused.append(RefusedRecord(_record_name(file.file, number), reason))
    return scanned


def _primary_nbytes(fetch: Fetch, example: Span, mapping: FieldMapping) -> int:
    """Bytes of the primary field of an Example, of which no more is read than needed. Raises BadExampleError."""
    primary = mapping.primary_feature
    if primary.field.kind == "tensor":
        return primary.field.record_bytes
    for name, feature in feature_spans(fetch, example):
        if name == primary.feature:
            value = single_bytes(fetch, feature)
            return value.stop - value.start
    raise BadExampleError(f"it has no feature {primary.feature!r}")


def _fill_primary(content: memoryview, payload: memoryview, feature: Span, mapped: MappedFeature) -> None:
    """Copy the primary field to its place. Raises BadExampleError, BadValueError."""
    if mapped.field.kind == "tensor":
        np.frombuffer(content, mapped.field.stored_dtype)[:] = _array(payload, feature, mapped).ravel()
        return
    value = single_bytes(fetch_from(payload), feature)
    if value.stop - value.start != len(content):
        raise BadExampleError(f"its feature {mapped.feature!r} is there twice")
    content[:] = payload[value.start : value.stop]


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
