"""From a value in Python to the rows of a field and back; whatever does not keep its meaning on the way is refused."""

import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .schema import BFLOAT16, MAX_RECORD_BYTES, Field, Schema, bfloat16_dtype, make_array_field

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
    elif array.shape[1:] != field.row_shape or array.ndim == 0:
        expected = ", ".join(map(str, ("any", *field.row_shape)))
        raise BadValueError(f"its shape is {array.shape}, not ({expected})")
    num_rows = 1 if field.kind == "tensor" else len(array)
    return np.ascontiguousarray(array).reshape(num_rows, *field.row_shape)


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

    return tensor if field.kind == "tensor" else ragged


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


def from_rows(field: Field, content: NDArray[np.uint8]) -> Any:
    """What a record's uncompressed bytes stand for: an array over them, for `text` a string."""
    if field.kind == "text":
        return content.tobytes().decode()
    if field.kind == "encoded":
        return content
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

    Arrays that differ in their first extent make a `ragged` field, other arrays and numbers a `tensor`; bytes are
    `encoded`, in the encoding by which they start; strings are `text`.
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
    tails = {shape[1:] for shape in shapes if shape != (0,)}
    if () in shapes or len(tails) != 1:
        raise BadValueError(f"its shapes {sorted(shapes)[:3]} differ in more than the first extent: give a schema")
    return numbers_field(dtype, (None, *tails.pop()))


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
