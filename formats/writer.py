"""A writer for records that come one by one: the way in for any data that a Python loop can produce."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from .assembly import FinishedShard, GrowingDataset, GrowingShard, fingerprint, rewrite_field
from .codec_trial import TRIED_RECORDS, CodecTrial
from .codecs import Codec, CodecChoice, parse_codec
from .errors import UsageError, destination_error
from .manifest import DEFAULT_CHUNK_BYTES, Container, Manifest, Origin
from .payload import ShardBuffers
from .schema import Schema, reason_of, shape_name
from .shards import (
    DEFAULT_SHARD_BYTES,
    ShardBuilder,
    ShardContent,
    ShardLayout,
    refuse_codecs,
    refuse_container,
    refuse_large_record,
    refuse_sizes,
    shard_capacity,
)
from .values import (
    BadValueError,
    Stored,
    Value,
    as_array,
    infer_schema,
    quick_shape,
    quick_storing,
    record_shape,
    row_bytes,
    to_rows,
)
from .zarr_view import padded_bytes

Rows: TypeAlias = dict[str, NDArray[np.generic]]

_SHARDS_ON_THE_WAY = 4
"""Those that are written, or waited for until the disk has them: it is not to fall behind by more."""
_TRIED_BYTES = 64 << 20
"""When the first records have so many bytes, they are enough to settle what is not yet."""
_FEWEST_COMPARED = 2
"""So many records say together what the schema is, however large they are: one does not tell what differs."""
_DONE: Future[None] = Future()
_DONE.set_result(None)


class Writer:
    """Write a data set record by record; it stands at `target` when the `with` block ends without an error.

        with formats.Writer("train.st") as writer:
            for image, boxes, caption in samples:
                writer.write({"image": image, "boxes": boxes, "caption": caption})

    target       where the data set will be.
    schema       what a record holds; without it, the first records say: bytes are `encoded`, strings `text`, arrays `tensor`
                 or, where they differ in shape, `ragged`.
    codec        how large tensors are compressed, for all fields or by field, where the schema does not say: a codec or its
                 name, such as "blosc-lz4"; "auto": as the first records suggest.
    container    what the shards are: HDF5, Zarr, or both at once.
    shard_bytes  size of a shard; two are held in memory: one fills while the other is written.

    How each field is stored follows from the first records too. Nothing is left at `target` when the block raises. Threads may
    share a writer: records are then in the order in which they come.
    """

    def __init__(
        self,
        target: Path | str,
        schema: Schema | None = None,
        *,
        codec: Codec | str | Mapping[str, Codec | str | None] | None = None,
        container: Container = "hdf5+zarr",
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        overwrite: bool = False,
    ) -> None:
        refuse_sizes(shard_bytes, chunk_bytes)
        refuse_container(container)
        if schema is not None:
            refuse_codecs(schema, container)
        self._schema = schema
        self._codec = (
            {name: _codec_of(each) for name, each in codec.items()} if isinstance(codec, Mapping) else _codec_of(codec)
        )
        self._container: Container = container
        self._shard_bytes = shard_bytes
        self._chunk_bytes = chunk_bytes
        self._first_records: list[Mapping[str, Value]] = []
        self._first_bytes = 0
        self._shards: _ShardWriter | None = None
        self._quickly: list[tuple[str, Callable[[Value], bytes | None]]] = []
        """What makes the stored bytes of each field of the schema, and of the value of which field of a record."""
        self._num_given = 0
        self._growing = GrowingDataset(Path(target), overwrite=overwrite)
        self._is_closed = False
        self._one_at_a_time = Lock()
        self._manifest: Manifest | None = None
        """What was published."""

    def write(self, record: Mapping[str, Value]) -> None:
        """Add one record: every field by its name; see `Value` for what a field takes.

        Raises UsageError when a field is missing, unknown, of another shape, or does not fit its dtype without loss, and when
        the writer is closed. The record is not in the data set then.
        """
        with self._one_at_a_time:
            self._write(record)

    def close(self) -> Manifest:
        """Write what is left and publish the data set. Called by the end of the `with` block, if not before."""
        with self._one_at_a_time:
            return self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._is_closed:
            self._discard()

    def _write(self, record: Mapping[str, Value]) -> None:
        if self._shards is not None:
            self._shards.write(self._stored(record, self._shards.schema))
            return
        if self._is_closed:
            raise UsageError(f"the writer of {self._growing.target} is closed: write all records before")
        _refuse_no_record(record)
        if self._schema is not None:
            self._checked(record, self._schema)
        elif self._first_records and record.keys() != self._first_records[0].keys():
            raise UsageError(
                f"a record has the fields {sorted(record)}, the first one {sorted(self._first_records[0])}"
            )
        kept = {}
        for name, value in record.items():
            try:
                kept[name] = _kept(value)
                self._first_bytes += _nbytes(kept[name])
            except BadValueError as error:
                raise UsageError(f"record {len(self._first_records)}: field {name!r}: {error}") from None
        self._first_records.append(kept)
        num_first = len(self._first_records)
        is_enough = self._schema is not None or num_first >= _FEWEST_COMPARED
        if num_first == TRIED_RECORDS or (self._first_bytes >= _TRIED_BYTES and is_enough):
            self._begin()

    def _close(self) -> Manifest:
        if self._manifest is not None:
            return self._manifest
        try:
            if self._shards is None:
                self._begin()
            assert self._shards is not None
            self._manifest = self._shards.publish()
        except BaseException:
            self._discard()
            raise
        self._shards, self._is_closed = None, True
        self._growing.close()
        return self._manifest

    def _discard(self) -> None:
        if self._shards is not None:
            self._shards.end()
        self._shards, self._is_closed = None, True
        self._growing.discard()

    def _begin(self) -> None:
        """Settle the schema by the first records, and write them."""
        schema = self._schema
        if schema is None:
            if not self._first_records:
                raise UsageError(f"{self._growing.target}: nothing was written, so there is no schema: pass one")
            try:
                schema = infer_schema(self._first_records)
            except BadValueError as error:
                raise UsageError(f"the first records make no data set: {error}") from None
            except ValidationError as error:
                raise UsageError(f"the first records make no data set: {reason_of(error)}") from None
        records = [self._checked(record, schema) for record in self._first_records]
        means = {
            name: sum(record[name].nbytes for record in records) / max(1, len(records))
            for name, field in schema.fields.items()
            if field.is_variable
        }
        schema = self._with_codecs(schema.resolved(means), records)
        refuse_codecs(schema, self._container)
        layout = ShardLayout(schema, self._container, shard_capacity(schema, self._shard_bytes), self._chunk_bytes)
        self._shards = _ShardWriter(self._growing, layout, self._shard_bytes)
        self._quickly = [
            (name, quick_storing(field)) if field.shape_of is None else (field.shape_of, quick_shape)
            for name, field in schema.fields.items()
        ]
        self._num_given = len(schema.given_fields)
        for record in records:
            self._shards.write(_row_bytes(record, schema))
        self._first_records = []

    def _with_codecs(self, schema: Schema, records: list[Rows]) -> Schema:
        fields = dict(schema.fields)
        for name, field in schema.large_fields.items():
            codec = self._codec.get(name) if isinstance(self._codec, Mapping) else self._codec
            if field.kind != "tensor" or field.codec is not None or codec is None:
                continue
            if codec == "auto":
                trial = CodecTrial(field)
                for record in records:
                    trial.add(row_bytes(record[name]))
                codec = trial.choice()
            fields[name] = field.model_copy(update={"codec": codec})
        return schema.model_copy(update={"fields": fields})

    def _stored(self, record: Mapping[str, Value], schema: Schema) -> Sequence[Stored]:
        """The bytes of every field of a record, in the order of the schema."""
        if isinstance(record, dict) and len(record) == self._num_given:
            try:
                stored = [quickly(record[name]) for name, quickly in self._quickly]
            except KeyError:
                stored = [None]
            if None not in stored:
                return stored  # type: ignore[return-value]
        _refuse_no_record(record)
        return _row_bytes(self._checked(record, schema), schema)

    def _checked(self, record: Mapping[str, Value], schema: Schema) -> Rows:
        """The rows of every field of a record."""
        given = schema.given_fields
        if record.keys() != given.keys():
            raise UsageError(
                f"a record has the fields {sorted(record)}, the schema {sorted(given)}: give each exactly once"
            )
        rows = {}
        for name, field in given.items():
            try:
                rows[name] = to_rows(field, record[name])
            except BadValueError as error:
                guessed = "; the first records said so: pass a schema that says what may differ"
                raise UsageError(f"field {name!r}: {error}{guessed if self._schema is None else ''}") from None
            refuse_large_record(rows[name].nbytes, f"field {name!r}")
            if field.has_shapes:
                rows[shape_name(name)] = np.array([record_shape(field, record[name])], "<i8")
        return rows


class _ShardWriter:
    """Deals records to shards as they come; each that is full is written by a thread while the next one fills, and another thread
    waits until it is on the disk."""

    def __init__(self, growing: GrowingDataset, layout: ShardLayout, shard_bytes: int) -> None:
        self.schema = layout.schema
        self._growing = growing
        self._layout = layout
        self._shard_bytes = shard_bytes
        self._buffers: list[ShardBuffers] = [{}, {}]
        """Of the shard that fills, and of the last one that the other thread was given."""
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="stagein writer")
        self._publishing = ThreadPoolExecutor(1, thread_name_prefix="stagein publisher")
        self._written = _DONE
        """Done when the other thread is."""
        self._is_turn_of_other = False
        self._unpublished: deque[Future[FinishedShard]] = deque()
        self._finished: list[FinishedShard] = []
        self._shards = self._records = 0
        """Shards that are full, and the records in them."""
        self._builder = self._new_builder()

    def write(self, record: Sequence[Stored]) -> None:
        """Add a record by the bytes of its fields, in the order of the schema."""
        large_bytes = 0
        for place, room_bytes in self._room_bytes:
            nbytes = len(record[place])
            if nbytes > room_bytes:
                self._finish_shard()
                self._widen(place, nbytes)
                return self.write(record)
            large_bytes += nbytes
        if self._used_bytes + large_bytes > self._shard_bytes and self._builder.records:
            self._finish_shard()
        self._builder.put(record)
        self._used_bytes += large_bytes
        return None

    def publish(self) -> Manifest:
        """Write what is left and give the data set its name."""
        self._finish_shard(last=True)
        self._await_shards()
        self.end()
        sums = [field.entry.xxh3_128 for shard in self._finished for field in shard.large_fields.values()]
        origin = Origin(kind="writer", records_sha256=fingerprint(sums))
        with self._os_errors_as_sentences():
            return self._growing.publish(self._layout, self._finished, origin)

    def end(self) -> None:
        """Write no more: what is being written is waited for."""
        self._writing.shutdown(cancel_futures=True)
        self._publishing.shutdown(cancel_futures=True)

    def _widen(self, place: int, nbytes: int) -> None:
        """Make room for one record larger than a shard, which then has a shard to itself.

        The capacity is one for all shards of a field, and the Zarr index at the end of each says it: those that are
        written already are written again, from their payloads.
        """
        name, field = list(self.schema.fields.items())[place]
        capacity = {**self._layout.capacity, name: padded_bytes(field, nbytes) // field.row_bytes}
        self._layout = replace(self._layout, capacity=capacity)
        if "zarr" in self._layout.container:
            self._await_shards()
            with self._os_errors_as_sentences():
                for number, shard in enumerate(self._finished):
                    self._finished[number] = rewrite_field(self._growing.folder, number, shard, name, self._layout)
        self._builder = self._new_builder()

    def _new_builder(self) -> ShardBuilder:
        capacity, large = self._layout.capacity, self.schema.large_fields
        payload_bytes = {name: capacity[name] * field.row_bytes for name, field in large.items()}
        self._room_bytes = [
            (place, payload_bytes[name]) for place, name in enumerate(self.schema.fields) if name in large
        ]
        """Place and bytes of a full shard of each large field, before compression."""
        self._used_bytes = 0
        return ShardBuilder(self.schema, self._buffers[0], payload_bytes)

    def _finish_shard(self, *, last: bool = False) -> None:
        """Have the shard written that is filled, if there is anything in it."""
        if not self._builder.records:
            return
        content = self._builder.content()
        if last and not self._shards:  # the only one: a full shard would have a much larger Zarr index
            rows = {name: content.rows(name, field) for name, field in self.schema.large_fields.items()}
            self._layout = replace(self._layout, capacity=rows)
        shard = GrowingShard(self._growing.folder, self._shards, self._records, self._layout)
        while len(self._unpublished) >= _SHARDS_ON_THE_WAY:
            self._await_shard()
        self._unpublished.append(self._publishing.submit(_publish, shard, self._write(shard, content)))
        self._shards += 1
        self._records += content.records
        self._builder = self._new_builder()

    def _write(self, shard: GrowingShard, content: ShardContent) -> Future[None]:
        """Write a shard: another thread does while the next one fills, this one where the other is not done with the last. They take
        turns: what the other began before this one wrote a whole shard is about to be done.
        """
        if self._is_turn_of_other:
            wait([self._written])
        self._is_turn_of_other = not self._written.done()
        if not self._is_turn_of_other:
            self._written = self._writing.submit(shard.write, content)
            self._buffers.reverse()
            return self._written
        with self._os_errors_as_sentences(), ExitStack() as failed:
            failed.push(shard)
            shard.write(content)
            failed.pop_all()
        return _DONE

    def _await_shards(self) -> None:
        while self._unpublished:
            self._await_shard()

    def _await_shard(self) -> None:
        with self._os_errors_as_sentences():
            self._finished.append(self._unpublished.popleft().result())

    @contextmanager
    def _os_errors_as_sentences(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise destination_error(error, "writing", self._growing.target) from error


def _refuse_no_record(record: object) -> None:
    if not isinstance(record, Mapping):
        raise UsageError(f"a record is a {type(record).__name__}: make it a dict, with every field by its name")


def _publish(shard: GrowingShard, written: Future[None]) -> FinishedShard:
    with shard:
        written.result()
        return shard.publish()


def _row_bytes(record: Rows, schema: Schema) -> Sequence[Stored]:
    """The bytes of rows as they are stored, in the order of the schema; of what goes into a column, copies."""
    return [
        row_bytes(record[name]) if name in schema.large_fields else record[name].tobytes() for name in schema.fields
    ]


def _kept(value: Value) -> Value:
    """The value as it is now, whatever the caller does with its memory afterwards."""
    if isinstance(value, (str, bytes)):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if hasattr(value, "detach"):  # a torch tensor
        as_array(value)
        return value.detach().clone()  # type: ignore[no-any-return]
    return np.array(as_array(value)) if hasattr(value, "dtype") else copy.deepcopy(value)


def _codec_of(codec: Codec | str | None) -> CodecChoice:
    return parse_codec(codec) if isinstance(codec, str) else codec


def _nbytes(value: Value) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return value.nbytes if hasattr(value, "nbytes") else as_array(value).nbytes
