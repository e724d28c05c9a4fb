"""Shards: how records are dealt to them (pure), and how those of one are taken.

A shard is a run of consecutive records, and a file for each large field of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from . import zarr_view
from .errors import SourceError, UsageError
from .manifest import MIN_CHUNK_BYTES, Container
from .payload import (
    FieldContent,
    PayloadBuffer,
    PayloadCollector,
    PayloadStream,
    RaggedColumnBuilder,
    ShardBuffers,
)
from .payload_file import PayloadFile
from .schema import MAX_RECORD_BYTES, Field, Schema, shape_name
from .source import RecordBatch
from .values import BadValueError, Value, fits_shapes, record_shape, row_bytes, stack_rows, to_rows

DEFAULT_SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class ShardPlan:
    """Shard `number` holds the `records` records from `first` on; `payload_bytes` of each large field, before compression."""

    number: int
    first: int
    records: int
    payload_bytes: Mapping[str, int]


def split_by_bytes(nbytes: NDArray[np.int64], shard_bytes: int) -> list[range]:
    """Deal records of these sizes to shards in order, as many as fit into `shard_bytes`; a larger one gets its own."""
    ends = np.cumsum(nbytes, dtype=np.int64)
    runs: list[range] = []
    first = 0
    while first < len(nbytes):
        start = int(ends[first] - nbytes[first])
        stop = max(first + 1, int(np.searchsorted(ends, start + shard_bytes, side="right")))
        runs.append(range(first, stop))
        first = stop
    return runs


def split_by_count(num_records: int, each: int) -> list[range]:
    """Deal `num_records` to shards in order, `each` to every one but the last."""
    return [range(first, min(first + each, num_records)) for first in range(0, num_records, each)]


def plan_shards(
    schema: Schema, num_records: int, sizes: Mapping[str, NDArray[np.int64]], shard_bytes: int
) -> tuple[list[ShardPlan], dict[str, int]]:
    """Deal records to shards whose large fields have about `shard_bytes` together, before compression.

    `sizes` are the bytes in every record of the large fields whose records differ in size. Returns the shards and the
    capacity of each large field. Where all large fields are tensors, all shards but the last have equally many records.
    """
    large = schema.large_fields
    variable = [name for name, field in large.items() if field.is_variable]
    if variable:
        total = np.full(num_records, _fixed_bytes(schema), np.int64)
        for name in variable:
            total += sizes[name]
        runs = split_by_bytes(total, shard_bytes)
    else:
        runs = split_by_count(num_records, tensor_shard_records(schema, shard_bytes))

    def payload_bytes(name: str, field: Field, run: range) -> int:
        if not field.is_variable:
            return len(run) * field.record_bytes
        return zarr_view.padded_bytes(field, int(sizes[name][run.start : run.stop].sum()))

    plans = [
        ShardPlan(number, run.start, len(run), {name: payload_bytes(name, field, run) for name, field in large.items()})
        for number, run in enumerate(runs)
    ]
    full = shard_capacity(schema, shard_bytes)
    capacity = {
        name: max((plan.payload_bytes[name] // field.row_bytes for plan in plans), default=full[name])
        for name, field in large.items()
    }
    return plans, capacity


def shard_capacity(schema: Schema, shard_bytes: int) -> dict[str, int]:
    """Rows of a full shard of each large field, as long as no record alone has more than `shard_bytes`."""
    return {
        name: zarr_view.padded_bytes(field, shard_bytes) // field.row_bytes
        if field.is_variable
        else tensor_shard_records(schema, shard_bytes)
        for name, field in schema.large_fields.items()
    }


def tensor_shard_records(schema: Schema, shard_bytes: int) -> int:
    """The most records of a shard, by the bytes of its tensors."""
    return max(1, shard_bytes // max(1, _fixed_bytes(schema)))


def _fixed_bytes(schema: Schema) -> int:
    return sum(field.record_bytes for field in schema.large_fields.values() if not field.is_variable)


def shard_path(number: int, name: str, schema: Schema, container: Container) -> str:
    """Where the file of the field `name` in shard `number` lies below the data set."""
    folder = "shards" if name == schema.primary else f"shards/{name}"
    return f"{folder}/{number:05d}.{'zarr-shard' if container == 'zarr' else 'h5'}"


@dataclass(frozen=True)
class ShardContent:
    """What goes into a shard: its fields by the way they are stored."""

    records: int
    large_fields: Mapping[str, FieldContent]
    ragged_columns: Mapping[str, FieldContent]
    columns: Mapping[str, NDArray[np.generic]]

    @classmethod
    def expected(cls, schema: Schema, plan: ShardPlan) -> "ShardContent":
        """What a planned shard will be, in all but values: these are zeros. There must be no ragged columns, whose sizes none knows."""
        places, sizes = np.zeros(plan.records, np.uint64), np.zeros(plan.records, np.uint32)
        large = {name: FieldContent([], plan.payload_bytes[name], places, sizes, sizes) for name in schema.large_fields}
        columns = {
            name: np.zeros((plan.records, *field.fixed_shape), field.stored_dtype)
            for name, field in schema.columns.items()
        }
        return cls(plan.records, large, {}, columns)

    def rows(self, name: str, field: Field) -> int:
        """Rows of a large field, those included with which it is padded."""
        return self.large_fields[name].payload_bytes // field.row_bytes if field.is_variable else self.records


@dataclass(frozen=True)
class ShardLayout:
    """What all shards of a data set have in common. In its schema it is settled how every field is stored."""

    schema: Schema
    container: Container
    capacity: Mapping[str, int]
    chunk_bytes: int

    def inner_chunks(self, name: str) -> int:
        """Entries of the Zarr index of a shard of a large field."""
        return self.capacity[name] // zarr_view.inner_rows(self.schema.fields[name])

    def zarr_index(
        self, name: str, data_offset: int, payload_bytes: int, offset: NDArray[np.uint64], nbytes: NDArray[np.uint32]
    ) -> bytes:
        """The Zarr index of a shard: of the inner chunks of its payload, or of its records at `offset` in the file."""
        field = self.schema.fields[name]
        if field.is_variable:
            inner_bytes = zarr_view.inner_rows(field) * field.row_bytes
            offset = np.arange(data_offset, data_offset + payload_bytes, inner_bytes, dtype=np.uint64)
            return zarr_view.encode_index(offset, np.full(len(offset), inner_bytes, np.uint64), self.inner_chunks(name))
        return zarr_view.encode_index(offset, nbytes.astype(np.uint64), self.inner_chunks(name))


class _ColumnValues:
    """Collects the values of a small field of fixed size."""

    def __init__(self, name: str, field: Field) -> None:
        self._name = name
        self._field = field
        self._arrays: list[NDArray[np.generic]] = []
        self._values: list[Value] = []
        self._stored: list[bytes] = []
        self.add = self._values.append
        self.put = self._stored.append
        """Adds a value by its stored bytes. Values come in one of the three ways, by `add`, `put` or `extend`."""

    def extend(self, rows: NDArray[np.generic]) -> None:
        """Add values as an array of the stored type, [records, *shape]."""
        self._stack()
        self._arrays.append(rows)

    def content(self) -> NDArray[np.generic]:
        self._stack()
        return self._arrays[0] if len(self._arrays) == 1 else np.concatenate(self._arrays)

    def _stack(self) -> None:
        if self._stored:
            rows = np.frombuffer(b"".join(self._stored), self._field.stored_dtype)
            self._arrays.append(rows.reshape(len(self._stored), *self._field.fixed_shape))
            self._stored.clear()
        if self._values or not self._arrays:
            try:
                self._arrays.append(stack_rows(self._field, self._values))
            except BadValueError as error:
                raise SourceError(f"field {self._name!r}: {error}") from None
            self._values.clear()


class ShardBuilder:
    """Takes the records of one shard: read into `room`, then added. Large fields that have files are written as they come."""

    def __init__(
        self,
        schema: Schema,
        buffers: ShardBuffers,
        payload_bytes: Mapping[str, int],
        files: Mapping[str, PayloadFile] | None = None,
    ) -> None:
        """Room for records of `payload_bytes` in all of each large field, before compression.

        `buffers`, kept by the caller from shard to shard, are this builder's until the next one is made.
        """
        self._schema = schema
        self._given, self._shaped = schema.given_fields.keys(), schema.shaped_fields
        self._builders: dict[str, PayloadCollector | PayloadStream | RaggedColumnBuilder] = {}
        for name, field in schema.large_fields.items():
            place = name, field, buffers.setdefault(name, PayloadBuffer()), payload_bytes[name]
            file = (files or {}).get(name)
            self._builders[name] = PayloadCollector(*place) if file is None else PayloadStream(*place, file)
        self._builders |= {name: RaggedColumnBuilder() for name in schema.ragged_columns}
        self._columns = {name: _ColumnValues(name, field) for name, field in schema.columns.items()}
        self._asked: dict[str, memoryview] = {}
        self._puts: list[Callable[[Any], None]] = [
            (self._columns[name] if name in self._columns else self._builders[name]).put for name in schema.fields
        ]
        self.records = 0

    def room(self, name: str, nbytes: int) -> memoryview:
        """Where the field `name` of the next record goes, `nbytes` long; asked for again, it is the same place.

        Raises BadValueError when no record of the field has so many bytes.
        """
        field = self._schema.fields[name]
        if nbytes > MAX_RECORD_BYTES or (nbytes % field.row_bytes if field.row_bytes else nbytes):
            raise BadValueError(f"field {name!r}: {nbytes} bytes are not rows of {field.row_bytes} bytes below 4 GiB")
        if not field.is_variable and nbytes != field.record_bytes:
            raise BadValueError(f"field {name!r}: {nbytes} bytes are not the {field.record_bytes} of its shape")
        builder = self._builders.get(name)
        self._asked[name] = memoryview(bytearray(nbytes)) if builder is None else builder.room(nbytes)
        return self._asked[name]

    def batch_room(self, name: str, nbytes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Where the field `name` of the next records goes, one behind the other; it is no plain column and has no codec.

        The sizes are of records of that field. Asked for again, it is a place that starts with the same byte.
        """
        return np.asarray(self._builders[name].batch_room(int(nbytes.sum())))

    def extend(self, batch: RecordBatch) -> None:
        """Add records whose fields are in the room asked for, or columns of the stored type."""
        for name, column in self._columns.items():
            column.extend(batch.columns[name])
        records = 0
        for name, builder in self._builders.items():
            nbytes = batch.nbytes[name]
            records = len(nbytes)
            builder.extend(nbytes)
        self.records += records

    def put(self, stored: Sequence[bytes | memoryview]) -> None:
        """Add a record by the bytes of its fields as they are stored before compression, in the order of the schema.

        They are right, and there is room for them; what goes into a column is bytes.
        """
        for put, content in zip(self._puts, stored, strict=True):
            put(content)
        self.records += 1

    def forget(self) -> None:
        """The record for which room was asked is none."""
        self._asked.clear()

    def add(self, values: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The record is whole: the fields for which room was asked are in it, with these `shapes`, `values` are the others.

        Raises BadValueError, and nothing is added, when a field is missing, given twice, unknown, or does not fit.
        """
        given = self._asked.keys() | values.keys()
        if given != self._given or self._asked.keys() & values.keys():
            raise BadValueError(f"it has the fields {sorted(given)}, the schema {sorted(self._given)}: each once")
        for name in self._builders.keys() - self._asked.keys():
            field = self._schema.fields[name]
            try:
                rows = to_rows(field, values[name])
            except BadValueError as error:
                raise BadValueError(f"field {name!r}: {error}") from None
            self.room(name, rows.nbytes)[:] = row_bytes(rows)
        if self._shaped:
            values = {**values, **self._shape_columns(values, shapes)}
        for name, column in self._columns.items():
            column.add(self._column_value(name) if name in self._asked else values[name])
        for name, builder in self._builders.items():
            builder.add(len(self._asked[name]))
        self.records += 1
        self._asked.clear()

    def _shape_columns(
        self, values: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """What the columns for shapes say of the record in the room, of which `values` were put there."""
        found: dict[str, tuple[int, ...]] = {}
        for name, field in self._shaped.items():
            shape = record_shape(field, values[name]) if name in values else shapes[name]
            nbytes = len(self._asked[name])
            if not fits_shapes(field, np.array([shape], np.int64), np.array([nbytes])).all():
                raise BadValueError(f"field {name!r}: {nbytes} bytes are no array of shape {shape}")
            found[shape_name(name)] = shape
        return found

    def _column_value(self, name: str) -> NDArray[np.generic]:
        field = self._schema.fields[name]
        return np.frombuffer(self._asked[name], field.stored_dtype).reshape(field.fixed_shape)

    def content(self) -> ShardContent:
        """What has been added, padded as it is stored; asked for once."""
        content = {name: builder.content() for name, builder in self._builders.items()}
        columns = {name: column.content() for name, column in self._columns.items()}
        return ShardContent(
            self.records,
            {name: content[name] for name in self._schema.large_fields},
            {name: content[name] for name in self._schema.ragged_columns},
            columns,
        )


def refuse_sizes(shard_bytes: int, chunk_bytes: int) -> None:
    """Raise UsageError for a size of shards or of summed chunks that no data set can have."""
    if shard_bytes < 1:
        raise UsageError(f"shards of {shard_bytes} bytes hold nothing: take at least 1, such as {DEFAULT_SHARD_BYTES}")
    if chunk_bytes < MIN_CHUNK_BYTES:
        raise UsageError(f"chunks of {chunk_bytes} bytes are too small to sum: take at least {MIN_CHUNK_BYTES}")


def refuse_container(container: str) -> None:
    """Raise UsageError for a container that there is not, or that only others write."""
    if container == "foreign":
        raise UsageError("files of others are adopted, not written: take the container hdf5+zarr, hdf5 or zarr")
    if container not in get_args(Container):
        raise UsageError(f"there is no container {container!r}: take hdf5+zarr, hdf5 or zarr")


def refuse_codecs(schema: Schema, container: Container) -> None:
    """Raise UsageError for a codec that the container cannot name."""
    for name, field in schema.fields.items():
        if field.codec is not None and field.codec.name == "lz4" and container != "hdf5":
            raise UsageError(
                f"field {name!r}: Zarr has no codec lz4, so --format {container} cannot have it: "
                f"take --format hdf5, or blosc-lz4"
            )


def refuse_large_record(nbytes: int, name: str) -> None:
    """Raise UsageError when a record is larger than the index can say; `name` says which."""
    if nbytes > MAX_RECORD_BYTES:
        raise UsageError(f"{name}: a record of {nbytes} bytes is above the limit of {MAX_RECORD_BYTES}: split it")
