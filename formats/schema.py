"""What a record holds: one schema in the manifest and in every shard."""

import math
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from pydantic import Field as pydantic_field

from .codecs import Codec

FieldKind = Literal["encoded", "tensor"]
SMALL_FIELD_BYTES = 4096
"""A fixed-shape field of at most this many bytes a record is small: kept whole in memory as a column."""


class Field(BaseModel):
    """One field of a record.

    kind      `encoded`: a file's bytes as they are (JPEG, PNG, …); `tensor`: a fixed shape of little-endian numbers.
    dtype     numpy name of the element type; for `encoded`, of what it decodes to.
    shape     extents of one record; None where they differ from record to record (only `encoded`).
    encoding  for `encoded`: the format's name, `jpeg` or `image` for a mixture.
    dims      names of the extents, such as ("height", "width", "channel").
    codec     for `tensor`: how records are compressed; None: they are stored as they are.
    meta      what else users need to know: `classes`, `ignore_index`, `sampling_rate`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FieldKind
    dtype: str
    shape: tuple[int | None, ...] = ()
    encoding: str | None = None
    dims: tuple[str, ...] | None = None
    codec: Codec | None = None
    meta: dict[str, object] = pydantic_field(default_factory=dict)

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        try:
            dtype = np.dtype(value)
        except (TypeError, ValueError, SyntaxError):
            raise ValueError(f"dtype {value!r} is not known") from None
        if dtype.kind not in "biufc" or dtype.byteorder == ">":
            raise ValueError(f"dtype {value!r} is not a little-endian number type")
        return dtype.name

    @model_validator(mode="after")
    def _consistent(self) -> "Field":
        if self.kind == "tensor" and (None in self.shape or self.encoding is not None):
            raise ValueError("a tensor field has a fixed shape and no encoding")
        if self.kind == "encoded" and self.codec is not None:
            raise ValueError("an encoded field is compressed already: it has no codec")
        if self.kind == "encoded" and self.encoding is None:
            raise ValueError("an encoded field names its encoding")
        return self

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of one record of a `tensor` field."""
        return tuple(extent or 0 for extent in self.shape)

    @property
    def stored_dtype(self) -> np.dtype[np.generic]:
        """The element type as it is on disk: always little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def record_bytes(self) -> int:
        """Bytes of one record of a `tensor` field."""
        return math.prod(self.fixed_shape) * self.stored_dtype.itemsize


class Schema(BaseModel):
    """The fields of a record. `primary` fills the shards; every other field is small and kept as a column."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: dict[str, Field]
    primary: str

    @model_validator(mode="after")
    def _one_large_field(self) -> "Schema":
        if self.primary not in self.fields:
            raise ValueError(f"the primary field {self.primary!r} is not among the fields {sorted(self.fields)}")
        if self.primary_field.kind == "tensor" and self.primary_field.record_bytes == 0:
            raise ValueError(f"the primary field {self.primary!r} has records of no bytes")
        for name, field in self.fields.items():
            if not name.isidentifier() or name in ("index", "shards", "zarr_index"):
                raise ValueError(f"{name!r} cannot be the name of a field")
            if name != self.primary and field.codec is not None:
                raise ValueError(f"field {name!r} is not the primary field: it has no codec")
            if name != self.primary and (field.kind != "tensor" or field.record_bytes > SMALL_FIELD_BYTES):
                raise ValueError(
                    f"field {name!r} has {field.record_bytes} bytes a record, a field beside the primary one {self.primary!r} "
                    f"at most {SMALL_FIELD_BYTES}: leave it out, or make a data set of its own from it"
                )
        return self

    @property
    def primary_field(self) -> Field:
        return self.fields[self.primary]

    @property
    def columns(self) -> dict[str, Field]:
        """The small fields, by name."""
        return {name: field for name, field in self.fields.items() if name != self.primary}
