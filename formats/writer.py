"""A writer for records that come one by one: the way in for any data that a Python loop can produce."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .assembly import FinishedShard, GrowingDataset, fingerprint, finish_shard
from .checksums import Buffer
from .errors import UsageError, destination_error
from .manifest import DEFAULT_CHUNK_BYTES, Container, Manifest, Origin
from .schema import Field, Schema
from .shards import (
    DEFAULT_SHARD_BYTES,
    PayloadBuffer,
    ShardBuilder,
    ShardLayout,
    padded_payload_bytes,
    refuse_codec,
    refuse_large_record,
    tensor_shard_records,
)


class Writer:
    """Write a data set record by record; it stands at `target` when the `with` block ends without an error.

        with Writer("train.st", schema) as writer:
            for image, label in samples:
                writer.write({"image": image, "label": label})

    One shard is held in memory. Nothing is left at `target` when the block raises.
    """

    def __init__(
        self,
        target: Path | str,
        schema: Schema,
        *,
        container: Container = "hdf5+zarr",
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        overwrite: bool = False,
    ) -> None:
        refuse_codec(schema, container)
        field = schema.primary_field
        encoded = field.kind == "encoded"
        capacity = (
            padded_payload_bytes(shard_bytes) if encoded else tensor_shard_records(field.record_bytes, shard_bytes)
        )
        self._layout = ShardLayout(schema, container, capacity, chunk_bytes)
        self._capacity_bytes = capacity if encoded else capacity * field.record_bytes
        self._growing = GrowingDataset(Path(target), overwrite=overwrite)
        self._buffer = PayloadBuffer()
        self._finished: list[FinishedShard] = []
        self._builder = self._new_builder()

    def write(self, record: Mapping[str, ArrayLike | Buffer]) -> None:
        """Add one record: every field of the schema by its name; bytes for `encoded`, an array for `tensor`.

        Raises UsageError when a field is missing, unknown, of another shape, or does not fit its dtype without loss.
        """
        schema = self._layout.schema
        if record.keys() != schema.fields.keys():
            raise UsageError(
                f"a record has the fields {sorted(record)}, the schema {sorted(schema.fields)}: give each exactly once"
            )
        content = self._primary_bytes(record[schema.primary])
        columns = {name: _as_tensor(name, field, record[name]) for name, field in schema.columns.items()}
        if self._is_full(len(content)):
            self._finish_shard()
        self._builder.room(len(content))[:] = content
        self._builder.add(len(content), columns)

    def close(self) -> Manifest:
        """Write what is left and publish the data set. Called by the end of the `with` block."""
        if self._builder.records:
            self._finish_shard()
        origin = Origin(kind="writer", records_sha256=fingerprint([shard.entry.xxh3_128 for shard in self._finished]))
        try:
            return self._growing.publish(self._layout, self._finished, origin)
        except OSError as error:
            raise destination_error(error, "writing", self._growing.target) from error
        finally:
            self._growing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._growing.discard()

    def _primary_bytes(self, value: ArrayLike | Buffer) -> memoryview:
        name, field = self._layout.schema.primary, self._layout.schema.primary_field
        if field.kind == "tensor":
            content = memoryview(_as_tensor(name, field, value)).cast("B")
        elif isinstance(value, (bytes, bytearray, memoryview)) or (
            isinstance(value, np.ndarray) and value.dtype == np.uint8
        ):
            content = memoryview(value).cast("B")
        else:
            raise UsageError(f"field {name!r} is encoded: give its bytes, not {type(value).__name__}")
        refuse_large_record(len(content), f"field {name!r}")
        if len(content) > self._capacity_bytes:
            raise UsageError(
                f"field {name!r}: a record of {len(content)} bytes is larger than a shard: raise shard_bytes"
            )
        return content

    def _is_full(self, next_bytes: int) -> bool:
        if self._layout.schema.primary_field.kind == "tensor":
            return self._builder.records == self._layout.capacity
        return self._builder.used_bytes + next_bytes > self._capacity_bytes

    def _new_builder(self) -> ShardBuilder:
        return ShardBuilder(self._layout, self._buffer, self._layout.capacity, self._capacity_bytes)

    def _finish_shard(self) -> None:
        first = sum(shard.entry.records for shard in self._finished)
        number, content = len(self._finished), self._builder.content()
        try:
            self._finished.append(finish_shard(self._growing.folder, number, first, content, self._layout))
        except OSError as error:
            raise destination_error(error, "writing", self._growing.target) from error
        self._builder = self._new_builder()


def _as_tensor(name: str, field: Field, value: ArrayLike | Buffer) -> NDArray[np.generic]:
    """`value` as little-endian array of the field's dtype and shape; only casts that lose nothing."""
    given = np.asarray(value)
    dtype = field.stored_dtype
    if given.shape != field.shape:
        raise UsageError(f"field {name!r} has shape {field.shape} in the schema, the record has {given.shape}")
    converted = given.astype(dtype)
    if not np.can_cast(given.dtype, dtype, "safe") and not np.array_equal(
        converted, given, equal_nan=given.dtype.kind in "fc"
    ):
        raise UsageError(
            f"field {name!r} is {dtype.name} in the schema, a value of type {given.dtype.name} does not fit into it"
        )
    return np.ascontiguousarray(converted).reshape(field.fixed_shape)
