"""Records that a Python function gives: anything with a length and an item for each number, such as a torch Dataset.

Every process that makes shards imports the module and calls the function for itself: nothing but names is sent to it.
"""

import functools
import hashlib
import importlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import SourceError, UsageError, source_error
from stagein.formats.images import BadImageError
from stagein.formats.schema import BFLOAT16, Field, Schema, make_schema
from stagein.formats.source import RefusedRecord, Room, SourceRecord
from stagein.formats.values import BadValueError, Value, as_array, row_bytes, to_rows

from .fields import SIZE_FIELD, column_value, common_array_field, file_field, image_size
from .files import most_common
from .tensors import copy_little_endian

_PAIR_FIELDS = ("data", "label")
_SIZE_NAME = "hw"
_IMAGE = "image"
_LOOKED_AT = 16
"""Records that say together what the fields are."""


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
        fields = dict(self.schema.given_fields)
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


@dataclass(frozen=True)
class RecordStream:
    """Records that a function yields one after the other: their number, order and sizes are only known at their end.

    They are no Source: they can only be written in one go, with a Writer.
    """

    origin: PythonFunction
    records: Iterable[object]

    @property
    def name(self) -> str:
        return str(self.origin)

    def __iter__(self) -> Iterator[dict[str, Value]]:
        """The fields of every record. Raises SourceError when the function fails."""
        records = iter(self.records)
        for number in itertools.count():
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:
                raise SourceError(f"record {number} of {self.origin} failed: {_short(error)}") from error
            yield cast(dict[str, Value], _as_fields(self.origin, record, number))


def scan_python(target: str, *, primary: str | None = None) -> PythonRecords | RecordStream:
    """The records that the function `MODULE:FUNCTION` gives, called without arguments; its module may lie in this folder.

    It returns an object with a length and items by number: dicts of fields, or pairs of a tensor and its label, which are
    called `data` and `label`. A few records say what the fields are, unless the object has an attribute `schema`: numpy
    arrays and torch tensors are tensors of their type and shape, or `ragged` where they differ in shape, numbers are columns,
    strings `text`, bytes an encoded field (an image, with the column `hw`, if they start like one). `primary` is by default the
    bytes, else the largest.

    Sizes must be known before shards are planned: where those of the primary field differ, every record is asked for twice.
    A generator, or another iterable without a length, is returned as a RecordStream. Raises UsageError when there is no such
    function or it returns no records, SourceError when it fails.
    """
    origin = _parse_target(target)
    load_records.cache_clear()  # asked anew, it may give other records
    returned = _call(origin)
    if not isinstance(returned, Records) and isinstance(returned, Iterable):
        if primary is not None:
            raise UsageError(
                f"{origin} yields records one by one: leave out --primary, it follows from the first records"
            )
        return RecordStream(origin, returned)
    records = load_records(origin)
    count = len(records)
    schema = getattr(records, "schema", None)
    if schema is None:
        if not count:
            raise SourceError(f"{origin} gives no records: there is nothing to convert")
        spread = np.unique(np.linspace(0, count - 1, _LOOKED_AT).astype(int)).tolist()
        schema = _infer_schema(origin, [_record_values(origin, records, number) for number in spread], primary)
    elif not isinstance(schema, Schema):
        raise UsageError(
            f"{origin}: its attribute schema is a {type(schema).__name__}: make it a stagein.formats.Schema"
        )
    nbytes = np.full(count, schema.primary_field.record_bytes, np.int64)
    secondary: dict[str, NDArray[np.int64]] = {}
    if schema.primary_field.is_variable:
        variable = {name: each for name, each in schema.fields.items() if each.is_variable}
        sizes = np.zeros((count, len(variable)), np.int64)
        for number in range(count):
            values = _record_values(origin, records, number)
            sizes[number] = [_size(each, values.get(name)) for name, each in variable.items()]
        secondary = dict(zip(variable, sizes.T, strict=True))
        nbytes = secondary.pop(schema.primary)
    return PythonRecords(origin, _module_sha256(origin), schema, nbytes, secondary_nbytes=secondary)


@functools.lru_cache(maxsize=1)
def load_records(origin: PythonFunction) -> Records:
    """What the function returns, called once in a process.

    Raises UsageError when it cannot be found or its records have no numbers, SourceError when it fails.
    """
    records = _call(origin)
    if not isinstance(records, Records) or isinstance(records, Mapping):
        raise UsageError(
            f"{origin} returns a {type(records).__name__}, whose records have no numbers: return an object with __len__ and "
            "__getitem__, or write records one by one with stagein.formats.Writer"
        )
    return records


def _call(origin: PythonFunction) -> object:
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
    return _as_fields(origin, record, number)


def _as_fields(origin: PythonFunction, record: object, number: int) -> dict[str, object]:
    if isinstance(record, Mapping):
        return {str(name): value for name, value in record.items()}
    if isinstance(record, (tuple, list)) and len(record) == len(_PAIR_FIELDS):
        return dict(zip(_PAIR_FIELDS, record, strict=True))
    raise SourceError(
        f"record {number} of {origin} is a {type(record).__name__}: make it a dict of fields, or a pair of a tensor and its label"
    )


def _infer_schema(origin: PythonFunction, records: Sequence[Mapping[str, object]], primary: str | None) -> Schema:
    """The schema that most of these records have. Raises UsageError when there is none for them."""
    fields: dict[str, Field] = {}
    for name in most_common(tuple(record) for record in records):
        try:
            fields[name] = _infer_field([record[name] for record in records if name in record])
        except BadValueError as error:
            raise UsageError(
                f"records of {origin}: field {name!r}: {error} (a field is an array, a number, bytes or a string)"
            ) from None
    if not fields:
        raise UsageError(f"records of {origin} have no fields: give a dict with at least one")
    encoded = [name for name, field in fields.items() if field.kind == "encoded"]
    largest = max(fields, key=lambda name: _largeness(fields[name]))
    primary = primary or (encoded[0] if encoded else largest)
    if primary in fields and fields[primary].encoding == _IMAGE:
        fields.setdefault(_SIZE_NAME, SIZE_FIELD)
    return make_schema(fields, primary)


def _largeness(field: Field) -> tuple[bool, bool, int]:
    """What the largest field of arrays has most of: free extents, extents at all, then bytes."""
    is_tensor = field.kind == "tensor"
    return field.has_shapes, is_tensor and bool(field.shape), field.record_bytes if is_tensor else 0


def _infer_field(values: Sequence[object]) -> Field:
    """The field that most of these values fit. Raises BadValueError."""
    contents = [bytes(value) for value in values if isinstance(value, (bytes, bytearray, memoryview))]
    texts = sum(isinstance(value, str) for value in values)
    if 2 * len(contents) > len(values):
        return file_field(contents)
    if 2 * texts > len(values):
        return Field(kind="text")
    arrays: list[NDArray[np.generic]] = []
    reason = BadValueError("its values are of several kinds")
    for value in values:
        try:
            arrays.append(as_array(value))
        except BadValueError as error:
            reason = error
    if 2 * len(arrays) <= len(values):
        raise reason
    if 2 * sum(hasattr(value, "dtype") for value in values) > len(
        values
    ):  # the types of Python's own numbers say nothing
        dtype = most_common(array.dtype.name for array in arrays)
        arrays = [array for array in arrays if array.dtype.name == dtype]
    return common_array_field(arrays)


def _size(declared: Field, value: object) -> int:
    """Bytes of a value; none where it is not of its field's kind, which reading it will refuse."""
    try:
        return len(row_bytes(to_rows(declared, cast(Value, value))))
    except BadValueError:
        return 0


def _encoded_bytes(name: str, values: Mapping[str, object]) -> memoryview:
    value = values.get(name)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        value = value.tobytes()
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise BadValueError(f"field {name!r}: a {type(value).__name__}, not bytes")
    return memoryview(value).cast("B")


def _tensor(name: str, values: Mapping[str, object], field: Field) -> NDArray[np.generic]:
    """The value of a field, in its type and shape. Python's own numbers may become any type that holds them exactly."""
    value = values[name]
    try:
        if field.dtype == BFLOAT16:
            return to_rows(field, cast(Value, value)).reshape(field.fixed_shape)
        if isinstance(value, (bool, int, float, complex)):
            return column_value(value, field)
        array = as_array(value)
    except BadValueError as error:
        raise BadValueError(f"field {name!r}: {error}") from None
    if (array.dtype.name, array.shape) != (field.dtype, field.fixed_shape):
        raise BadValueError(
            f"field {name!r}: {array.dtype.name} of shape {array.shape}, "
            f"expected {field.dtype} of shape {field.fixed_shape}"
        )
    return array


def _short(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
