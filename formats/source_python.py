"""Records that a Python function gives: anything with a length and an item for each number, such as a torch Dataset.

Every process that makes shards imports the module and calls the function for itself: nothing but names is sent to it.
"""

import functools
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .errors import SourceError, UsageError, source_error
from .images import BadImageError
from .schema import Field, Schema
from .source_fields import SIZE_FIELD, column_value, image_field, image_size, make_schema
from .source_tensors import copy_little_endian
from .sources import RefusedRecord, Room, SourceRecord
from .values import BadValueError, Value

_PAIR_FIELDS = ("data", "label")
_SIZE_NAME = "hw"
_IMAGE = "image"
_BYTES_FIELD = Field(kind="encoded", dtype="uint8", shape=(None,), encoding="bytes")


@runtime_checkable
class Records(Protocol):
    """What the function returns: item i is record i, a dict of its fields or a pair of a tensor and its label."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> object: ...


@dataclass(frozen=True)
class PythonFunction:
    """A function without arguments, by name, and the folder that its module may lie in beside Python's own."""

    module: str
    function: str
    folder: str

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"


@dataclass(frozen=True)
class PythonRecords:
    """All records that a function gives."""

    origin: PythonFunction
    module_sha256: str
    schema: Schema
    nbytes: NDArray[np.int64]
    refused: tuple[RefusedRecord, ...] = ()
    kind: str = "python"
    secondary_nbytes: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.origin)

    def identity(self) -> object:
        return str(self.origin), self.nbytes.tolist()

    def part(self, numbers: NDArray[np.int64]) -> "PythonRecordsPart":
        columns = tuple(numbers.tolist()), tuple(self.nbytes[numbers].tolist())
        return PythonRecordsPart(self.origin, self.module_sha256, self.schema, *columns)


@dataclass(frozen=True)
class PythonRecordsPart:
    """Some of the records that a function gives: their numbers, and the bytes of their primary fields."""

    origin: PythonFunction
    module_sha256: str
    schema: Schema
    numbers: tuple[int, ...]
    nbytes: tuple[int, ...]

    def mark(self) -> object:
        """The code of the module and the sizes; whether the data that it reads are the same, only their owner knows."""
        return str(self.origin), self.module_sha256, self.numbers, self.nbytes

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        records = load_records(self.origin)
        for number, nbytes in zip(self.numbers, self.nbytes, strict=True):
            values = _record_values(self.origin, records, number)
            try:
                record: SourceRecord | RefusedRecord = self._read_record(number, values, nbytes, room)
            except (BadValueError, BadImageError) as error:
                record = RefusedRecord(f"record {number}", str(error))
            yield record

    def _read_record(self, number: int, values: Mapping[str, object], nbytes: int, room: Room) -> SourceRecord:
        fields = dict(self.schema.fields)
        primary = self.schema.primary_field
        derived: dict[str, Value] = {}
        if primary.encoding == _IMAGE and _SIZE_NAME in fields and _SIZE_NAME not in values:
            content = _encoded_bytes(self.schema.primary, values)
            derived[_SIZE_NAME] = column_value(image_size(content), fields.pop(_SIZE_NAME))
        if values.keys() != fields.keys():
            raise BadValueError(f"its fields are {', '.join(values)}, not {', '.join(fields)}")
        if primary.kind == "encoded":
            content = _encoded_bytes(self.schema.primary, values)
            if len(content) != nbytes:
                raise SourceError(
                    f"record {number} of {self.origin} had {nbytes} bytes and now has {len(content)}: "
                    "let the function give the same record each time"
                )
            room(self.schema.primary, nbytes)[:] = content
            del fields[self.schema.primary]
        for name, declared in fields.items():
            if declared.is_variable:
                derived[name] = cast(Value, values[name])
                continue
            copy_little_endian(_tensor(name, values, declared), room(name, declared.record_bytes))
        return SourceRecord(derived)


def scan_python(target: str, *, primary: str | None = None) -> PythonRecords:
    """The records that the function `MODULE:FUNCTION` gives, called without arguments; its module may lie in this folder.

    It returns an object with a length and items by number: dicts of fields, or pairs of a tensor and its label, which are
    called `data` and `label`. The first record says what the fields are, unless the object has an attribute `schema`:
    numpy arrays and torch tensors are tensors of their type and shape, numbers are columns, bytes are an encoded field
    (an image, with the column `hw`, if they start like one). `primary` is the field that fills the shards, by default
    the bytes, else the largest.

    Sizes must be known before shards are planned: where the primary field is encoded, every record is asked for twice.
    Raises UsageError when there is no such function or what it returns has no length, SourceError when it fails.
    """
    origin = _parse_target(target)
    load_records.cache_clear()  # asked anew, it may give other records
    records = load_records(origin)
    count = len(records)
    schema = getattr(records, "schema", None)
    if schema is None:
        if not count:
            raise SourceError(f"{origin} gives no records: there is nothing to convert")
        schema = _infer_schema(origin, _record_values(origin, records, 0), primary)
    elif not isinstance(schema, Schema):
        raise UsageError(
            f"{origin}: its attribute schema is a {type(schema).__name__}: make it a stagein.formats.Schema"
        )
    nbytes = np.full(count, schema.primary_field.record_bytes, np.int64)
    if schema.primary_field.kind == "encoded":
        nbytes[:] = [_encoded_size(schema.primary, _record_values(origin, records, number)) for number in range(count)]
    return PythonRecords(origin, _module_sha256(origin), schema, nbytes)


@functools.lru_cache(maxsize=1)
def load_records(origin: PythonFunction) -> Records:
    """What the function returns, called once in a process.

    Raises UsageError when it cannot be found or its records have no numbers, SourceError when it fails.
    """
    if origin.folder not in sys.path:
        sys.path.insert(0, origin.folder)
    try:
        module = importlib.import_module(origin.module)
    except Exception as error:
        raise UsageError(f"the module {origin.module} cannot be imported: {_short(error)}") from error
    function = getattr(module, origin.function, None)
    if not callable(function):
        raise UsageError(f"the module {origin.module} has no function {origin.function}: write MODULE:FUNCTION")
    try:
        records = function()
        if isinstance(records, Records):
            len(records)
    except Exception as error:
        raise SourceError(f"{origin} failed: {_short(error)}") from error
    if not isinstance(records, Records) or isinstance(records, Mapping):
        raise UsageError(
            f"{origin} returns a {type(records).__name__}, whose records have no numbers: return an object with __len__ and "
            "__getitem__, or write records one by one with stagein.formats.Writer"
        )
    return records


def _parse_target(target: str) -> PythonFunction:
    module, _, function = target.partition(":")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f"{target!r} names no function: write MODULE:FUNCTION, such as my_data:training_set")
    return PythonFunction(module, function, str(Path.cwd()))


def _module_sha256(origin: PythonFunction) -> str:
    """The sum of the module's code; of nothing where it has no file."""
    path = getattr(sys.modules[origin.module], "__file__", None)
    try:
        return hashlib.sha256(Path(path).read_bytes() if path else b"").hexdigest()
    except OSError as error:
        raise source_error(error, "reading", str(path)) from None


def _record_values(origin: PythonFunction, records: Records, number: int) -> dict[str, object]:
    """The fields of a record by name. Raises SourceError when the object fails, or gives neither a dict nor a pair."""
    try:
        record = records[number]
    except Exception as error:
        raise SourceError(f"record {number} of {origin} failed: {_short(error)}") from error
    if isinstance(record, Mapping):
        return {str(name): value for name, value in record.items()}
    if isinstance(record, (tuple, list)) and len(record) == len(_PAIR_FIELDS):
        return dict(zip(_PAIR_FIELDS, record, strict=True))
    raise SourceError(
        f"record {number} of {origin} is a {type(record).__name__}: make it a dict of fields, or a pair of a tensor and its label"
    )


def _infer_schema(origin: PythonFunction, values: Mapping[str, object], primary: str | None) -> Schema:
    """The schema that the first record has. Raises UsageError when there is none for it."""
    fields: dict[str, Field] = {}
    for name, value in values.items():
        try:
            fields[name] = _infer_field(value)
        except BadValueError as error:
            raise UsageError(
                f"record 0 of {origin}: field {name!r}: {error}: give an array, a number, or bytes"
            ) from None
    if not fields:
        raise UsageError(f"record 0 of {origin} has no fields: give a dict with at least one")
    encoded = [name for name, field in fields.items() if field.kind == "encoded"]
    largest = max(fields, key=lambda name: _largeness(fields[name]))
    primary = primary or (encoded[0] if encoded else largest)
    if primary in fields and fields[primary].encoding == _IMAGE:
        fields.setdefault(_SIZE_NAME, SIZE_FIELD)
    return make_schema(fields, primary)


def _largeness(field: Field) -> tuple[bool, int]:
    """What the largest tensor field has most of: extents at all, then bytes."""
    return field.kind == "tensor" and bool(field.shape), field.record_bytes if field.kind == "tensor" else 0


def _infer_field(value: object) -> Field:
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            image_size(memoryview(value))
        except BadImageError:
            return _BYTES_FIELD
        return image_field(_IMAGE)  # the next one may be of another format
    array = _as_array(value)
    return Field(kind="tensor", dtype=array.dtype.name, shape=array.shape)


def _encoded_bytes(name: str, values: Mapping[str, object]) -> memoryview:
    value = values.get(name)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        value = value.tobytes()
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise BadValueError(f"field {name!r}: a {type(value).__name__}, not bytes")
    return memoryview(value).cast("B")


def _encoded_size(name: str, values: Mapping[str, object]) -> int:
    """Bytes of the encoded field; none where there is no such field, which reading it will refuse."""
    try:
        return len(_encoded_bytes(name, values))
    except BadValueError:
        return 0


def _tensor(name: str, values: Mapping[str, object], field: Field) -> NDArray[np.generic]:
    """The value of a field, in its type and shape. Python's own numbers may become any type that holds them exactly."""
    value = values[name]
    try:
        if isinstance(value, (bool, int, float, complex)):
            return column_value(value, field)
        array = _as_array(value)
    except BadValueError as error:
        raise BadValueError(f"field {name!r}: {error}") from None
    if (array.dtype.name, array.shape) != (field.dtype, field.fixed_shape):
        raise BadValueError(
            f"field {name!r}: {array.dtype.name} of shape {array.shape}, "
            f"expected {field.dtype} of shape {field.fixed_shape}"
        )
    return array


def _as_array(value: object) -> NDArray[np.generic]:
    """Numbers as an array, without copying where they are one. Raises BadValueError for anything else."""
    detach = getattr(value, "detach", None)  # a torch tensor: its gradient is no part of the data
    try:
        array = np.asarray(detach().cpu() if detach else value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadValueError(f"a {type(value).__name__} that is no array: {_short(error)}") from None
    if array.dtype.kind not in "biufc":
        raise BadValueError(f"a {type(value).__name__}, which holds no numbers")
    return array


def _short(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
