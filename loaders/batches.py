"""From sample ids to what a graph is fed: the part of loading that the reader threads do."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import ChecksumError, SourceError, StageinError
from stagein.formats.located import LocatedRecords
from stagein.formats.record_reader import PackedRecords

from .buffer_ring import BufferRing
from .dataset import RecordDataset
from .graphs import Columns, Graph, HostPlan, ImageGraph, SampleBatch
from .inflate import InflateOnGpu
from .order import RankBatch
from .stats import DecodeClock, PhaseTimes

RECORD_ERRORS = (SourceError, ChecksumError)
"""What is wrong with a record, not with how the loader is used."""
Rows = NDArray[Any] | list[NDArray[Any]] | PackedRecords | LocatedRecords
"""Records of the primary field: tensors `[batch, ...]`, arrays that differ in length, or the bytes of files."""
_MAX_IDLE_BUFFERS = 4
_BUFFER_GRAIN_BYTES = 4 << 20
"""What buffers are larger by at most than the first batch in them: others fit as well."""
_STAND_IN = np.zeros(1, dtype=np.int64)
"""Read in place of an empty batch; its row is not delivered."""


class SharedPlan:
    """The plan of several batches, made when the first of them is read.

    When a batch is planned, nothing of what that takes is in the caches any more: for eight at once it takes hardly longer than for one.
    """

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self._ids, self._lock = ids, threading.Lock()
        self._plan: HostPlan | None = None

    def of(self, rows: slice, plan: Callable[[NDArray[np.int64]], HostPlan]) -> HostPlan:
        """That of some of the samples; `plan` makes one of all."""
        with self._lock:
            if self._plan is None:
                self._plan = plan(self._ids)
        fed, ready = self._plan.fed, self._plan.ready
        return HostPlan(*({name: value[rows] for name, value in columns.items()} for columns in (fed, ready)))


@dataclass(frozen=True)
class BatchTask:
    """Batch number `number` of an epoch, as this rank has to read it.

    plan, place_in_plan  shared with batches that come before and after it; None: it is planned alone.
    """

    epoch: int
    number: int
    rows: RankBatch
    plan: SharedPlan | None = None
    place_in_plan: int = 0

    @property
    def place(self) -> str:
        return f"epoch {self.epoch}, batch {self.number}"


def tasks_planned_together(steps: Sequence[tuple[int, int, RankBatch]]) -> Iterator[BatchTask]:
    """The tasks of some batches, each given as (epoch, number, rows)."""
    plan = SharedPlan(np.concatenate([rows.ids for _, _, rows in steps]))
    place = 0
    for epoch, number, rows in steps:
        yield BatchTask(epoch, number, rows, plan, place)
        place += len(rows.ids)


@dataclass(frozen=True)
class RowFailure:
    """A row of a batch that cannot be made: its record cannot be read or decoded. `error` names record and shard."""

    row: int
    error: StageinError


@dataclass(frozen=True)
class HostBatch:
    """A batch as read.

    ids       the samples in it: those of the task, but for bad ones that were replaced.
    inputs    what a graph is fed, by name: an array `[batch, ...]`, or a list of arrays that differ in size.
    ready     fields that need no graph, `[batch, ...]` each.
    num_rows  how many rows of both, from the first, are to be delivered.
    times     what making it took so far.
    """

    task: BatchTask
    ids: NDArray[np.int64]
    inputs: dict[str, Any]
    ready: Columns
    num_rows: int
    times: PhaseTimes


@dataclass(frozen=True)
class BatchReader:
    """Reads batches of `dataset` and works out what `graph` needs to know of them. Called from several threads at once.

    on_failure       see `engine.OnFailure`.
    read_for_empty   read a stand-in for a batch without samples: DALI cannot run an empty one.
    may_locate       asked for every batch: whether it may be left to who decodes files to read them, where they are in memory; by
                     default it may not.
    """

    dataset: RecordDataset
    graph: Graph
    seed: int
    on_failure: Callable[[BatchTask, NDArray[np.int64], Sequence[RowFailure]], NDArray[np.int64]]
    read_for_empty: bool
    may_locate: Callable[[], bool] = bool
    _ring: BufferRing = field(default_factory=lambda: BufferRing(_MAX_IDLE_BUFFERS))

    def read(self, task: BatchTask) -> HostBatch:
        """Raises the StageinErrors of `on_failure`."""
        return self._read(task, _STAND_IN if self.read_for_empty and not len(task.rows.ids) else task.rows.ids)

    def repair(self, batch: HostBatch, failures: Sequence[RowFailure]) -> HostBatch:
        """The batch again, with what `on_failure` says in place of the rows that failed."""
        return self._read(batch.task, self.on_failure(batch.task, batch.ids, failures))

    def _read(self, task: BatchTask, ids: NDArray[np.int64]) -> HostBatch:
        started = time.perf_counter()
        primary = self.dataset.records.schema.primary
        clock = DecodeClock()
        ids, rows, plan = self._read_replacing(task, ids, clock)
        unwanted = self.dataset.records.columns.keys() - set(self.dataset.fields)
        fed = {name: _contiguous(value) for name, value in plan.fed.items() if name not in unwanted}
        ready = {name: value for name, value in plan.ready.items() if name not in unwanted}
        num_bytes, seconds = _num_bytes(rows), time.perf_counter() - started
        is_decoded = isinstance(rows, np.ndarray)
        num_stored = int(self.dataset.records.index.nbytes[ids].sum()) if is_decoded else num_bytes
        times = clock.times(seconds, num_stored, num_bytes)
        return HostBatch(task, ids, {primary: rows, **fed}, ready, len(task.rows.ids), times)

    def _read_replacing(
        self, task: BatchTask, ids: NDArray[np.int64], clock: DecodeClock
    ) -> tuple[NDArray[np.int64], Rows, HostPlan]:
        """The samples read, with others in place of those that cannot be; their records, and what is planned for them."""
        try:
            return ids, *self._read_and_plan(task, ids, clock)
        except RECORD_ERRORS:
            while failures := self._failures(task, ids):
                ids = self.on_failure(task, ids, failures)
            return ids, *self._read_and_plan(task, ids, clock)

    def _read_and_plan(self, task: BatchTask, ids: NDArray[np.int64], clock: DecodeClock) -> tuple[Rows, HostPlan]:
        """The records of the primary field, and the plan made of the small fields and what else was asked for: tensors,
        and files as they are stored.

        Of seekable JPEGs only the rows that a ready graph will look at are read, once there are kernels for that.
        """
        records, graph = self.dataset.records, self.graph
        primary, kind = records.schema.primary, records.schema.primary_field.kind
        ragged: Columns = {}
        if self._plans_together and task.plan is not None and ids is task.rows.ids:
            rows = slice(task.place_in_plan, task.place_in_plan + len(ids))
            plan = task.plan.of(rows, lambda ids: self._plan(task, ids, ragged))
        else:
            if kind == "ragged":  # how large they are is known only once they are read
                ragged[primary] = self.dataset.rows(primary, ids)
            plan = self._plan(task, ids, ragged)
        reads_windows = len(ids) > 0 and records.is_seekable and not records.windows_are_awaited()
        if reads_windows and isinstance(graph, ImageGraph):
            cut = records.read_windows(ids, graph.views(plan.fed).windows, self._memory)
            packed = PackedRecords(cut.content, cut.start, cut.stop - cut.start)
            return packed, replace(plan, fed=graph.moved(plan.fed, cut.origin))
        if isinstance(graph, InflateOnGpu):
            stored = records.read_records(ids)  # type: ignore[arg-type]
            blocks = graph.block_table(stored, lambda row: self.dataset.place(int(ids[row])))
            return stored, replace(plan, fed={**plan.fed, **blocks})
        if kind == "tensor":
            return records.readers[primary].read_tensors(ids, decode_nanoseconds=clock.nanoseconds), plan
        if kind == "ragged":
            return ragged[primary], plan
        if self.may_locate() and (located := records.locate(ids)) is not None:
            return located, plan
        memory = self._memory(int(records.index.nbytes[ids].sum()))
        return records.read_packed(ids, memoryview(memory)), plan

    def _plan(self, task: BatchTask, ids: NDArray[np.int64], ragged: Columns) -> HostPlan:
        """The plan of samples of the epoch of this task, made of the small fields, the large ones beside the primary, and that itself
        where it is `ragged`."""
        names = [*self.dataset.records.columns, *self._others]
        columns = {name: self.dataset.rows(name, ids) for name in names} | ragged
        return self.graph.plan(SampleBatch(self.seed, task.epoch, ids, self.dataset.records.schema, columns))

    @cached_property
    def _plans_together(self) -> bool:
        """Whether the rows of a plan are those of its samples, whichever are planned with them, and nothing large is read for it."""
        is_encoded = self.dataset.records.schema.primary_field.kind == "encoded"
        return is_encoded and isinstance(self.graph, ImageGraph) and not self._others

    @cached_property
    def _others(self) -> list[str]:
        """Large fields beside the primary one."""
        records = self.dataset.records
        return [name for name in self.dataset.fields if name in records.readers and name != records.schema.primary]

    def _memory(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory that is used for batch after batch."""
        return self._ring.take((-(-nbytes // _BUFFER_GRAIN_BYTES) * _BUFFER_GRAIN_BYTES,), np.uint8)

    def _failures(self, task: BatchTask, ids: NDArray[np.int64]) -> list[RowFailure]:
        """Read the samples one by one: those that cannot be."""
        failures = []
        for row in range(len(ids)):
            try:
                self._read_and_plan(task, ids[row : row + 1], DecodeClock())
            except RECORD_ERRORS as error:
                failures.append(RowFailure(row, error))
        return failures


def _num_bytes(rows: Rows) -> int:
    """That were read of them."""
    if isinstance(rows, LocatedRecords):
        return 0
    return int(rows.nbytes.sum()) if isinstance(rows, PackedRecords) else sum(row.nbytes for row in rows)


def _contiguous(value: Any) -> Any:
    return np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value
