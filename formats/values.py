"""From a value in Python to the rows of a field and back; whatever does not keep its meaning on the way is refused."""

import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .schema import BFLOAT16, MAX_RECORD_BYTES, Field, Schema, bfloat16_dtype, common_shape, make_array_field

Value: TypeAlias = "ArrayLike | bytes | bytearray | memoryview | str"
"""A number or an array for `tensor` and `ragged` fields (also a torch tensor), bytes for `encoded`, a string for `text`."""

_SIGNATURES = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"RIFF", "wav"),
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b"ID3", "mp3"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)
UNKNOWN_ENCODING = "bytes"

_QUICK_BYTES = 1 << 20
"""Larger values are not copied before they are where they belong."""
_PYTHON_NUMBERS: dict[str, tuple[type, struct.Struct]] = {
    name: (int, struct.Struct(f"<{code}"))
    for name, code in zip(
        ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"), "bhiqBHIQ", strict=True
    )
} | {"float32": (float, struct.Struct("<f")), "float64": (float, struct.Struct("<d"))}
"""By type, which of Python's numbers are scalars of it, and how they are stored."""


class BadValueError(ValueError):
    """A value that its field cannot hold; the text says why, without naming the record."""


def to_rows(field: Field, value: Value) -> NDArray[np.generic]:
    """The rows of a record, [rows, *row_shape] of the stored type, contiguous. Raises BadValueError for what does not fit.

    A cast that loses something is refused, but Python's own floats are rounded to the field's precision. uint16 arrays
    are the bits of a bfloat16 field.
    """
    if field.kind == "text":
        return np.frombuffer(_text_bytes(value), np.uint8)
    if field.kind == "encoded":
        return _byte_rows(value)
    array = _converted(as_array(value), field, is_exact=_has_own_precision(value))
    if field.kind == "tensor":
        if array.shape != field.fixed_shape:
            raise BadValueError(f"its shape is {array.shape}, not {field.fixed_shape}")
    elif array.size == 0 and array.ndim <= 1:  # an empty list knows no further extents
        array = array.reshape(0, *field.row_shape)
    elif not field.holds(array.shape):
        expected = ", ".join("any" if extent is None else str(extent) for extent in field.shape)
        raise BadValueError(f"its shape is {array.shape}, not ({expected})")
    num_rows = 1 if field.kind == "tensor" else -1
    return np.ascontiguousarray(array).reshape(num_rows, *field.row_shape)


def record_shape(field: Field, value: Value) -> tuple[int, ...]:
    """The shape of a value that `to_rows` takes for a `ragged` field."""
    shape = tuple(value.shape) if hasattr(value, "shape") else as_array(value).shape
    return shape if len(shape) == len(field.shape) else field.fixed_shape  # an empty list knows no further extents


def fits_shapes(field: Field, shapes: NDArray[np.int64], nbytes: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Whether records of a field may be of these shapes [records, extents], and have so many bytes then."""
    is_free = np.array([extent is None for extent in field.shape])
    may_be = (is_free | (shapes == np.array(field.fixed_shape))) & (shapes >= 0)
    with np.errstate(all="ignore"):
        sizes = shapes.astype(np.float64).prod(axis=1)  # exact wherever a record can be so large
    return np.asarray(may_be.all(axis=1) & (sizes * field.stored_dtype.itemsize == nbytes))


Stored: TypeAlias = bytes | memoryview
"""The bytes of a record's field as they are stored, before compression."""


def quick_storing(field: Field) -> Callable[[Any], bytes | None]:
    """A function that makes the stored bytes of values of the very type that the field has: a copy, where they may change.

    It returns None for all others, and large ones: `to_rows` says what becomes of them.
    """
    if field.kind == "encoded":
        return lambda value: value if type(value) is bytes and len(value) <= MAX_RECORD_BYTES else None
    if field.kind == "text":
        return lambda value: value.encode() if type(value) is str and value.isascii() else None
    dtype, shape, row_shape = field.stored_dtype, field.fixed_shape, field.row_shape
    python_type, packed = _PYTHON_NUMBERS.get(dtype.name, (None, None)) if shape == () else (None, None)
    if field.dtype == BFLOAT16:
        python_type = None

    def tensor(value: Any) -> bytes | None:
        if type(value) is np.ndarray or type(value) is dtype.type:
            is_same = value.dtype == dtype and value.shape == shape and value.nbytes <= _QUICK_BYTES
            return value.tobytes() if is_same else None
        if type(value) is python_type and packed is not None:
            try:
                return packed.pack(value)
            except (struct.error, OverflowError):
                return None
        return None

    def ragged(value: Any) -> bytes | None:
        if type(value) is not np.ndarray or value.dtype != dtype or value.ndim != 1 + len(row_shape):
            return None
        return value.tobytes() if value.shape[1:] == row_shape and value.nbytes <= _QUICK_BYTES else None

    def shaped(value: Any) -> bytes | None:
        if type(value) is not np.ndarray or value.dtype != dtype or not field.holds(value.shape):
            return None
        return value.tobytes() if value.nbytes <= _QUICK_BYTES else None

    if field.kind == "tensor":
        return tensor
    return shaped if field.has_shapes else ragged


def quick_shape(value: Any) -> bytes | None:
    """The stored shape of a value that `quick_storing` takes for a field of several free extents."""
    return np.array(value.shape, "<i8").tobytes() if type(value) is np.ndarray else None


def row_bytes(rows: NDArray[np.generic]) -> memoryview:
    """The bytes of rows, as they are stored."""
    return memoryview(rows.reshape(-1).view(np.uint8))


def stack_rows(field: Field, values: Sequence[Value]) -> NDArray[np.generic]:
    """The values of a `tensor` field of several records, [records, *shape] of the stored type. Raises BadValueError."""
    shape = (len(values), *field.fixed_shape)
    if not values:
        return np.empty(shape, field.stored_dtype)
    array = _converted(as_array(values), field, is_exact=_has_own_precision(values[0]))
    if array.shape != shape:
        raise BadValueError(f"its shape is {array.shape[1:]}, not {field.fixed_shape}")
    return array


def from_rows(field: Field, content: NDArray[np.uint8], shape: Sequence[int] | None = None) -> Any:
    """What a record's uncompressed bytes stand for: an array over them, for `text` a string.

    `shape` is that of the record, for a field of several free extents.
    """
    if field.kind == "text":
        return content.tobytes().decode()
    if field.kind == "encoded":
        return content
    if shape is None:
        shape = field.fixed_shape if field.kind == "tensor" else (-1, *field.row_shape)
    return content.view(field.array_dtype).reshape(shape)


def as_array(value: object) -> NDArray[np.generic]:
    """Numbers as an array, without copying where they are one. Raises BadValueError for anything else."""
    if isinstance(value, (list, tuple)) and value and hasattr(value[0], "detach"):
        value = [as_array(each) for each in value]
    detach = getattr(value, "detach", None)  # a torch tensor: its gradient is no part of the data
    try:
        array = np.asarray(_torch_array(detach()) if detach else value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadValueError(f"a {type(value).__name__} that is no array: {str(error).splitlines()[0]}") from None
    if array.dtype.kind not in "biufc" and array.dtype.name != BFLOAT16:
        raise BadValueError(f"a {type(value).__name__} is no array of numbers")
    return array


def infer_schema(records: Sequence[Mapping[str, Value]]) -> Schema:
    """The schema of these records, which have the fields of the first. Raises BadValueError, naming the field."""
    fields = {}
    for name in records[0]:
        try:
            fields[name] = infer_field([record[name] for record in records if name in record])
        except BadValueError as error:
            raise BadValueError(f"field {name!r}: {error}") from None
    return Schema(fields=fields)


def infer_field(values: Sequence[Value]) -> Field:
    """The field that holds these values. Raises BadValueError where there is none.

    Arrays that differ in shape make a `ragged` field, other arrays and numbers a `tensor`; bytes are `encoded`, in the
    encoding by which they start; strings are `text`.
    """
    if isinstance(values[0], str):
        return Field(kind="text")
    if isinstance(values[0], (bytes, bytearray, memoryview)):
        found = {encoding_of(value) for value in values if isinstance(value, (bytes, bytearray, memoryview))}
        is_image = found <= {"jpeg", "png"}
        encoding = found.pop() if len(found) == 1 else "image" if is_image else UNKNOWN_ENCODING
        return Field(kind="encoded", encoding=encoding, shape=(None, None, 3) if is_image else (None,))
    arrays = [as_array(value) for value in values]
    dtype, shapes = _common_dtype(values, arrays), {array.shape for array in arrays}
    if len(shapes) == 1:
        return numbers_field(dtype, shapes.pop())
    known = shapes - {(0,)}  # an empty list knows no further extents
    if () in shapes or len({len(shape) for shape in known}) != 1:
        raise BadValueError(
            f"its shapes {sorted(shapes)[:3]} have other numbers of extents: no field takes all of them"
        )
    if known != shapes:
        known.add((0, *next(iter(known))[1:]))
    return numbers_field(dtype, common_shape(known))


def numbers_field(dtype: str, shape: tuple[int | None, ...]) -> Field:
    """As `schema.make_array_field`, but raises BadValueError."""
    try:
        return make_array_field(dtype, shape)
    except ValueError as error:
        raise BadValueError(str(error)) from None


def _common_dtype(values: Sequence[Value], arrays: Sequence[NDArray[np.generic]]) -> str:
    """The name of the type that holds all these values, which as arrays are `arrays`."""
    is_bfloat16 = [
        _is_torch_bfloat16(value) or array.dtype.name == BFLOAT16 for value, array in zip(values, arrays, strict=True)
    ]
    if all(is_bfloat16):
        return BFLOAT16
    dtypes = (np.dtype("f4") if yes else array.dtype for yes, array in zip(is_bfloat16, arrays, strict=True))
    return np.result_type(*dtypes).name


def encoding_of(value: bytes | bytearray | memoryview) -> str:
    """The format of a file's bytes, by how they start: such as `jpeg`, or `bytes` where it is not known."""
    start = bytes(memoryview(value).cast("B")[:16])
    return next((name for signature, name in _SIGNATURES if start.startswith(signature)), UNKNOWN_ENCODING)


def _text_bytes(value: Value) -> bytes:
    if not isinstance(value, str):
        raise BadValueError(f"it is text: give a string, not {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate
        raise BadValueError(f"it is no text that UTF-8 has: {error.reason}") from None


def _byte_rows(value: Value) -> NDArray[np.uint8]:
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return np.ascontiguousarray(value).reshape(-1)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return np.frombuffer(memoryview(value).cast("B"), np.uint8)
    raise BadValueError(f"it is encoded: give its bytes, not {type(value).__name__}")


def _torch_array(tensor: Any) -> Any:
    tensor = tensor.cpu()
    if _is_torch_bfloat16(tensor):
        dtype = bfloat16_dtype()
        # without ml_dtypes numpy has no such type: float32 has the same values
        return (
            tensor.view(sys.modules["torch"].uint16).numpy().view(dtype) if dtype.name == BFLOAT16 else tensor.float()
        )
    return tensor.resolve_conj().resolve_neg() if hasattr(tensor, "resolve_conj") else tensor


def _is_torch_bfloat16(value: object) -> bool:
    return str(getattr(value, "dtype", "")) == "torch.bfloat16"


def _has_own_precision(value: object) -> bool:
    """Whether a value was made with a precision, as arrays are; Python's floats and lists of them have no choice."""
    return hasattr(value, "dtype")


def _converted(array: NDArray[np.generic], field: Field, *, is_exact: bool) -> NDArray[np.generic]:
    """The array in the field's stored type. Raises BadValueError where a number would not stay what it is."""
    if field.dtype == BFLOAT16:
        return _bfloat16_bits(array, is_exact=is_exact)
    dtype = field.stored_dtype
    if array.dtype == dtype:
        return array
    if array.dtype.name == BFLOAT16:
        array = array.astype(np.float32)
    with np.errstate(all="ignore"):
        converted = array.astype(dtype, copy=False)
        if np.can_cast(array.dtype, dtype, "safe") or not array.size:
            return converted
        may_round = not is_exact and array.dtype.kind in "fc" and dtype.kind in "fc" and array.dtype.kind == dtype.kind
        if may_round:
            same = bool((np.isfinite(converted) == np.isfinite(array)).all())
        else:
            same = np.array_equal(converted, array, equal_nan=array.dtype.kind in "fc") and (
                dtype.kind != "u" or array.dtype.kind not in "if" or not bool((np.real(array) < 0).any())
            )
    if not same:
        raise BadValueError(f"a value of type {array.dtype.name} does not fit into {field.dtype}")
    return converted


def _bfloat16_bits(array: NDArray[np.generic], *, is_exact: bool) -> NDArray[np.generic]:
    """The upper halves of float32, which bfloat16 is."""
    if array.dtype.name == BFLOAT16:
        return array.view(np.uint16).astype("<u2", copy=False)
    if array.dtype == np.uint16:
        return array.astype("<u2", copy=False)
    with np.errstate(all="ignore"):
        single = np.atleast_1d(array.astype("<f4"))
        bits = single.view("<u4")
        if not is_exact:  # round to nearest, ties to even
            bits = np.where(np.isnan(single), bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        elif (bits & 0xFFFF).any() or not np.array_equal(single.reshape(array.shape), array, equal_nan=True):
            raise BadValueError(f"a value of type {array.dtype.name} does not fit into {BFLOAT16}")
    return (bits >> 16).astype("<u2").reshape(array.shape)
