"""What a record holds: one schema in the manifest and in every shard.

Every field is stored as rows of one shape and type. A `tensor` has one row a record; what varies in length has many: the
bytes of a file or a text, the boxes of an image. That one view serves payloads, HDF5 data sets and Zarr arrays alike.
"""

import functools
import math
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic import Field as pydantic_field

from .codecs import Codec
from .errors import UsageError

FieldKind = Literal["encoded", "ragged", "tensor", "text"]
Storage = Literal["column", "shards"]

SMALL_FIELD_BYTES = 4096
"""A field of at most this many bytes a record (on average, where they differ) is small: kept whole, as a column."""
MAX_COLUMN_BYTES = 1 << 30
"""A small field is no column when all of it together has more bytes than this, unless its records are tiny."""
TINY_FIELD_BYTES = 64
"""A field of at most this many bytes a record costs more to read record by record than to keep, however much it is."""
MAX_RECORD_BYTES = 2**32 - 1

BFLOAT16 = "bfloat16"
_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NUMBERS = (*_INTEGERS, "float16", "float32", "float64", "complex64", "complex128", BFLOAT16)
_RESERVED_NAMES = ("READY", "index", "journal", "shards", "zarr_index")
_LONGEST_NAME, _LONGEST_NAME_BYTES = 100, 255
_SHOWN_LETTERS = 40
"""Of a name in an error, at most."""


FIRST_VERSION, SHAPES_VERSION = (1, 0), (1, 1)
"""Of the format: the first, and the one that has shapes of records."""


class Field(BaseModel):
    """One field of a record.

    kind      `encoded`: a file's bytes as they are (JPEG, PNG, FLAC, …); `tensor`: numbers of a fixed shape;
              `ragged`: numbers whose shape differs from record to record, in one extent or several; `text`: UTF-8.
    dtype     name of the element type; for `encoded`, of what it decodes to. `bfloat16` is stored as uint16.
    shape     extents of one record; None where they differ from record to record.
    encoding  for `encoded`: the format's name, `jpeg`, or `image` for a mixture; for `text`, such as `json`.
    dims      names of the extents, such as ("height", "width", "channel").
    codec     for `tensor`: how records are compressed; None: they are stored as they are.
    storage   `shards`: in shard files, read record by record; `column`: whole, in one file. None: follows from its size.
    rows_of   the JPEG field whose MCU rows this one lists (`jpeg.rows`): an index for readers, no part of a record.
    shape_of  the `ragged` field of several free extents whose shapes this one has: for readers, no part of a record.
    meta      what else users need to know: `classes`, `ignore_index`, `sampling_rate`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FieldKind
    dtype: str = "uint8"
    shape: tuple[int | None, ...] = ()
    encoding: str | None = None
    dims: tuple[str, ...] | None = None
    codec: Codec | None = None
    storage: Storage | None = None
    rows_of: str | None = None
    shape_of: str | None = None
    meta: dict[str, object] = pydantic_field(default_factory=dict)

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value in _NUMBERS:
            return value
        try:
            dtype = np.dtype(value)
        except (TypeError, ValueError, SyntaxError):
            raise ValueError(f"dtype {value!r} is not known: take one of {', '.join(_NUMBERS)}") from None
        if dtype.byteorder == ">" or dtype.name not in _NUMBERS:
            raise ValueError(f"dtype {value!r} is not a little-endian number type: take one of {', '.join(_NUMBERS)}")
        return dtype.name

    @model_validator(mode="after")
    def _consistent(self) -> "Field":
        if any(extent is not None and extent < 0 for extent in self.shape):
            raise ValueError(f"the shape {self.shape} has a negative extent")
        if self.kind == "tensor" and None in self.shape:
            raise ValueError("a tensor field has a fixed shape: where extents differ, its kind is ragged")
        if self.kind == "tensor" and self.record_bytes > MAX_RECORD_BYTES:
            raise ValueError(
                f"a record of {self.record_bytes} bytes is above the limit of {MAX_RECORD_BYTES}: split it"
            )
        if self.kind == "ragged":
            if None not in self.shape:
                raise ValueError(
                    f"a ragged field has a free extent, as the first of (None, 4), not the shape {self.shape}"
                )
            if self.row_bytes == 0:
                raise ValueError(f"a ragged field of shape {self.shape} has rows of no bytes")
        if self.kind == "text" and (self.dtype != "uint8" or self.shape not in ((), (None,))):
            raise ValueError("a text field is UTF-8: it has no dtype and no shape")
        if self.kind in ("tensor", "ragged") and self.encoding is not None:
            raise ValueError(f"a {self.kind} field has no encoding")
        if self.kind == "encoded" and self.encoding is None:
            raise ValueError("an encoded field names its encoding, such as jpeg")
        if self.kind != "tensor" and self.codec is not None:
            reason = "is compressed already" if self.kind == "encoded" else "differs in size from record to record"
            raise ValueError(f"a field of kind {self.kind} {reason}: it has no codec")
        if self.dims is not None and len(self.dims) != len(self.shape):
            raise ValueError(f"dims {self.dims} name {len(self.dims)} extents, the shape has {len(self.shape)}")
        return self

    @model_serializer(mode="wrap")
    def _without_later_attributes(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """What only later versions have is left out where it says nothing: the bytes and ids of data sets stay what they were."""
        content: dict[str, object] = serialize(self)
        if self.shape_of is None:
            del content["shape_of"]
        return content

    def __str__(self) -> str:
        """In a few words, as `encoded jpeg` or `float32 [?, 4]`."""
        shape = f" [{', '.join('?' if extent is None else str(extent) for extent in self.shape)}]" if self.shape else ""
        words = {"encoded": f"encoded {self.encoding}", "text": "text"}
        return words.get(self.kind, f"{self.dtype}{shape}")

    @property
    def is_variable(self) -> bool:
        """Whether records differ in size."""
        return self.kind != "tensor"

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of one record of a `tensor` field; of others, that of a record without anything in it."""
        return tuple(extent or 0 for extent in self.shape)

    @property
    def has_shapes(self) -> bool:
        """Whether the shape of a record does not follow from its size: several extents are free, or one behind another."""
        return self.kind == "ragged" and None in self.shape[1:]

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether a record may have this shape."""
        return len(shape) == len(self.shape) and all(
            declared in (None, extent) for declared, extent in zip(self.shape, shape, strict=True)
        )

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row: a whole record of a `tensor` field, the extents behind the last free one of a `ragged` one, a byte."""
        if self.kind == "tensor":
            return self.fixed_shape
        return _extents_behind_free(self.shape) if self.kind == "ragged" else ()

    @property
    def stored_dtype(self) -> np.dtype[np.generic]:
        """The element type on disk, always little-endian: bytes for `encoded` and `text`, uint16 for bfloat16."""
        return _stored_dtype("uint8" if self.kind in ("encoded", "text") else self.dtype)

    @property
    def array_dtype(self) -> np.dtype[np.generic]:
        """The element type of arrays in memory: as stored, but bfloat16 where the package ml_dtypes is installed."""
        return bfloat16_dtype() if self.dtype == BFLOAT16 and self.kind in ("tensor", "ragged") else self.stored_dtype

    @property
    def array_dtype_name(self) -> str:
        """What the stored elements are: `bfloat16` where numpy sees uint16."""
        return self.dtype if self.kind in ("tensor", "ragged") else "uint8"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return _row_bytes(self.row_shape, self.stored_dtype)

    @property
    def record_bytes(self) -> int:
        """Bytes of one record of a `tensor` field."""
        return self.row_bytes


class Schema(BaseModel):
    """The fields of a record.

    `primary` is the field that a data set is about: by default the first that is not small, else the largest. Small fields
    are kept as columns; every other field has shard files of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: dict[str, Field]
    primary: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> "Schema":
        if not self.fields:
            raise ValueError("a record without fields is none: name at least one")
        if not self.primary:
            object.__setattr__(self, "primary", _default_primary(self.fields))
        if self.primary not in self.fields:
            raise ValueError(f"the primary field {self.primary!r} is not among the fields {sorted(self.fields)}")
        if not self.primary_field.is_variable and self.primary_field.record_bytes == 0:
            raise ValueError(f"the primary field {self.primary!r} has records of no bytes")
        if self.primary_field.storage == "column":
            raise ValueError(f"the primary field {self.primary!r} fills the shards: it cannot be a column")
        if len({name.casefold() for name in self.fields}) != len(self.fields):
            raise ValueError("the names of two fields differ only in case: rename one")
        for name, field in self.fields.items():
            _refuse_bad_field(name, field, is_primary=name == self.primary)
            if field.rows_of is not None and field.rows_of not in self.fields:
                raise ValueError(f"field {name!r} lists the rows of {field.rows_of!r}, which is not among the fields")
            if field.has_shapes:
                self._refuse_other_shapes(name, field)
            if field.shape_of is not None and name not in map(shape_name, self.shaped_fields):
                raise ValueError(
                    f"field {name!r} claims to have the shapes of {field.shape_of!r}, which has none of its own"
                )
        return self

    def _refuse_other_shapes(self, name: str, field: Field) -> None:
        """Raise ValueError where the column for the shapes of a field cannot be beside it."""
        _refuse_bad_name(shape_name(name))
        for other, declared in self.fields.items():
            if other.casefold() == shape_name(name).casefold() and declared != shape_field(name, field):
                raise ValueError(
                    f"{other!r} cannot be the name of a field: the shapes of {name!r} are kept there, so take another"
                )

    @property
    def primary_field(self) -> Field:
        return self.fields[self.primary]

    @property
    def record_fields(self) -> dict[str, Field]:
        """The fields that users see: all but those that list rows of others or have their shapes."""
        return {name: field for name, field in self.given_fields.items() if field.rows_of is None}

    @property
    def given_fields(self) -> dict[str, Field]:
        """The fields that whoever writes records gives: all but the shapes of others, which are seen from those."""
        return {name: field for name, field in self.fields.items() if field.shape_of is None}

    @property
    def shaped_fields(self) -> dict[str, Field]:
        """The fields whose records have their shape in a column."""
        return {name: field for name, field in self.fields.items() if field.has_shapes}

    @property
    def format_version(self) -> tuple[int, int]:
        """The oldest version of the format in which there are such records."""
        return SHAPES_VERSION if self.shaped_fields else FIRST_VERSION

    @property
    def columns(self) -> dict[str, Field]:
        """The small fields of a fixed shape, by name: arrays of one row a record."""
        return {name: field for name, field in self.fields.items() if self._is_column(name) and not field.is_variable}

    @property
    def ragged_columns(self) -> dict[str, Field]:
        """The small fields whose records differ in size, by name."""
        return {name: field for name, field in self.fields.items() if self._is_column(name) and field.is_variable}

    @property
    def large_fields(self) -> dict[str, Field]:
        """The fields with shard files of their own, by name, the primary one first."""
        others = {name: field for name, field in self.fields.items() if not self._is_column(name)}
        return {self.primary: self.primary_field} | others

    @property
    def indexed_fields(self) -> dict[str, Field]:
        """The fields that are read record by record, through an index: the large ones and the ragged columns."""
        return self.large_fields | self.ragged_columns

    def resolved(self, mean_bytes: Mapping[str, float], num_records: int | None = None) -> "Schema":
        """The schema with the storage of every field settled, and with the columns for shapes.

        `mean_bytes` are the bytes a record on average of the fields whose records differ in size; one that is not in it
        becomes a column. `num_records` is how many records there are, where that is known.
        """
        fields = self.fields | {
            shape_name(name): shape_field(name, field) for name, field in self.shaped_fields.items()
        }
        for name, field in fields.items():
            if field.storage is None:
                mean = mean_bytes.get(name, 0) if field.is_variable else field.record_bytes
                fits = mean <= TINY_FIELD_BYTES or mean * (num_records or 0) <= MAX_COLUMN_BYTES
                small = mean <= SMALL_FIELD_BYTES and fits and field.codec is None
                storage = "column" if small and name != self.primary else "shards"
                fields[name] = field.model_copy(update={"storage": storage})
        return self.model_copy(update={"fields": fields})

    def _is_column(self, name: str) -> bool:
        """Whether a field is a column; as long as it is not settled, those of which it is certain are."""
        field = self.fields[name]
        certain = not field.is_variable and field.record_bytes <= SMALL_FIELD_BYTES and field.codec is None
        return name != self.primary and (field.storage == "column" or (field.storage is None and certain))


@functools.cache
def _extents_behind_free(shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """Those behind the last free one."""
    num_behind = shape[::-1].index(None)
    return tuple(extent or 0 for extent in shape[len(shape) - num_behind :])


@functools.cache
def _stored_dtype(name: str) -> np.dtype[np.generic]:
    return np.dtype("<u2" if name == BFLOAT16 else name).newbyteorder("<")


@functools.cache
def _row_bytes(row_shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    return math.prod(row_shape) * dtype.itemsize


def bfloat16_dtype() -> np.dtype[np.generic]:
    """numpy's type for bfloat16, which the package ml_dtypes brings; without it uint16, the bits."""
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype("<u2")
    return np.dtype(ml_dtypes.bfloat16)  # type: ignore[no-any-return]


def _default_primary(fields: Mapping[str, Field]) -> str:
    for name, field in fields.items():
        if field.storage != "column" and (field.is_variable or field.record_bytes > SMALL_FIELD_BYTES):
            return name
    return max(fields, key=lambda name: fields[name].record_bytes)


def _refuse_bad_field(name: str, field: Field, *, is_primary: bool) -> None:
    _refuse_bad_name(name)
    if field.is_variable or is_primary:
        return
    if field.storage == "column" and field.record_bytes > SMALL_FIELD_BYTES:
        raise ValueError(
            f"field {name!r} has {field.record_bytes} bytes a record, a column at most {SMALL_FIELD_BYTES}: leave its storage out"
        )
    if field.storage == "column" and field.codec is not None:
        raise ValueError(f"field {name!r} is a column, which is kept as it is: it has no codec")
    if field.storage == "shards" and field.record_bytes == 0:
        raise ValueError(f"field {name!r} has records of no bytes: it can only be a column")


def _refuse_bad_name(name: str) -> None:
    """It becomes the name of a folder."""
    if len(name) > _LONGEST_NAME or len(name.encode(errors="replace")) > _LONGEST_NAME_BYTES:
        raise ValueError(f"the name {name[:20] + '…'!r} of a field is too long: take at most {_LONGEST_NAME} letters")
    if name in _RESERVED_NAMES:
        raise ValueError(f"{name!r} cannot be the name of a field, as data sets use it themselves: take another")
    if not name.isidentifier():
        raise ValueError(
            f"{name!r} cannot be the name of a field: take letters, digits and _, and no digit as the first of them"
        )


def shape_name(name: str) -> str:
    """The column with the shapes of the field `name`."""
    return f"{name}_shape"


def shape_field(name: str, field: Field) -> Field:
    """The schema of that column: all extents of a record, also those that are fixed."""
    extents = (len(field.shape),)
    return Field(kind="tensor", dtype="int64", shape=extents, dims=("extent",), storage="column", shape_of=name)


def common_shape(shapes: Collection[tuple[int, ...]]) -> tuple[int | None, ...]:
    """The shape of which these, of equally many extents, are: an extent in which they differ is free (None).

    Where any is, one of 0 is free, too: rows of it would have no bytes.
    """
    extents = [set(each) for each in zip(*shapes, strict=True)]
    if all(len(each) == 1 for each in extents):
        return tuple(each.pop() for each in extents)
    return tuple((each.pop() or None) if len(each) == 1 else None for each in extents)


def make_array_field(dtype: str, shape: tuple[int | None, ...]) -> Field:
    """The field of arrays of numbers: `ragged` where an extent differs (None), else `tensor`. Raises ValueError, in a
    sentence, where there is none for them."""
    kind: FieldKind = "ragged" if None in shape else "tensor"
    try:
        return Field(kind=kind, dtype=dtype, shape=shape)
    except ValidationError as error:
        raise ValueError(reason_of(error)) from None


def make_schema(fields: Mapping[str, Field], primary: str) -> Schema:
    """The schema of these fields. Raises UsageError, in a sentence, when they cannot be one."""
    try:
        return Schema(fields=dict(fields), primary=primary)
    except ValidationError as error:
        raise UsageError(
            f"the fields {', '.join(str(name)[:_SHOWN_LETTERS] for name in fields)} make no data set: {reason_of(error)}"
        ) from None


def reason_of(error: ValidationError) -> str:
    """What is wrong with a schema, in a sentence."""
    first = error.errors()[0]
    if first["loc"][-1:] == ("[key]",):
        return f"{first['input']!r} cannot be the name of a field: take a string"
    return first["msg"].removeprefix("Value error, ")


def column_chunk_path(name: str, field: Field) -> str:
    """Where the one chunk of a small field lies below the data set (the default chunk keys of Zarr v3)."""
    return "/".join([name, "c", *["0"] * (1 + len(field.row_shape))])
