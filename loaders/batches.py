"""From sample ids to what a graph is fed: the part of loading that the reader threads do."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagein.formats.errors import StageinError

from .dataset import RecordDataset
from .graphs import Columns, Graph, SampleBatch
from .order import RankBatch

_STAND_IN = np.zeros(1, dtype=np.int64)
"""Read in place of an empty batch, which DALI cannot run; its row is not delivered."""


@dataclass(frozen=True)
class BatchTask:
    """Batch number `number` of an epoch, as this rank has to read it."""

    epoch: int
    number: int
    rows: RankBatch

    @property
    def place(self) -> str:
        return f"epoch {self.epoch}, batch {self.number}"


@dataclass(frozen=True)
class HostBatch:
    """A batch as read.

    inputs    what DALI is fed, by name: an array `[batch, ...]`, or a list of arrays that differ in size.
    ready     fields that need no graph, `[batch, ...]` each.
    num_rows  how many rows of both, from the first, are to be delivered.
    read_s, num_bytes  what reading it took.
    """

    task: BatchTask
    inputs: dict[str, Any]
    ready: Columns
    num_rows: int
    read_s: float
    num_bytes: int

    @property
    def num_inputs(self) -> int:
        """Rows in every input; more than `num_rows` where a stand-in was read."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class BatchReader:
    """Reads batches of `dataset` and works out what `graph` needs to know of them. Called from several threads at once."""

    dataset: RecordDataset
    graph: Graph
    seed: int

    def __call__(self, task: BatchTask) -> HostBatch:
        """Raises the data set's StageinError with the epoch and the batch put in front."""
        started = time.perf_counter()
        ids = task.rows.ids if len(task.rows.ids) else _STAND_IN
        records = self.dataset.records
        try:
            stored = records.read_records(ids)  # type: ignore[arg-type]
            columns = {name: np.asarray(column[ids]) for name, column in records.columns.items()}
            plan = self.graph.plan(SampleBatch(self.seed, task.epoch, ids, columns))
        except StageinError as error:
            raise type(error)(f"{task.place}: {error}") from error
        unwanted = columns.keys() - set(self.dataset.fields)
        fed = {name: np.ascontiguousarray(value) for name, value in plan.fed.items() if name not in unwanted}
        ready = {name: value for name, value in plan.ready.items() if name not in unwanted}
        inputs = {records.schema.primary: stored, **fed}
        return HostBatch(task, inputs, ready, len(task.rows.ids), time.perf_counter() - started, sum(map(len, stored)))


def tasks_of(epoch: int, first_number: int, batches: Iterable[RankBatch | Sequence[int]]) -> Iterator[BatchTask]:
    """Number the batches of an epoch; a plain sequence of ids, as a torch sampler yields it, has no padding."""
    for number, batch in enumerate(batches, start=first_number):
        if not isinstance(batch, RankBatch):
            batch = RankBatch(np.asarray(batch, dtype=np.int64), len(batch))
        yield BatchTask(epoch, number, batch)
