"""The fast path: reader threads that run ahead, and an engine that makes tensors of what they read."""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch

from stagein.formats.errors import LoadTimeoutError

from .batches import BatchTask, HostBatch
from .dali_engine import DaliEngine
from .dataset import RecordDataset
from .engine import Batch, Delivered, Engine, EngineOptions, OnFailure, raise_first
from .graphs import Graph, ImageGraph
from .image_engine import ImageEngine
from .inflate import inflating, why_not_inflated
from .reading import ReadAhead, TaskTimeoutError
from .stats import LoaderStats
from .tensor_engine import TensorEngine
from .worker_info import MAX_SEED, WorkerStart


@dataclass(frozen=True)
class ReadOptions:
    """How much is read ahead, and by how many threads."""

    num_readers: int
    """0: the caller reads."""
    batches_per_reader: int
    timeout_s: float
    worker_init_fn: Callable[[int], None] | None = None
    """Called in each reader thread before it reads, with the thread's number."""


class FastPath:
    """The batches of a `RecordDataset`, by the engine that fits it and its graph.

    graph       None: fields are delivered as they are; all of them must be tensors (`delivers_tensors`).
    on_failure  what becomes of records that cannot be read or decoded.
    """

    def __init__(
        self,
        dataset: RecordDataset,
        graph: Graph | None,
        seed: int,
        reading: ReadOptions,
        options: EngineOptions,
        on_failure: OnFailure = raise_first,
    ) -> None:
        self.stats = LoaderStats()
        self._dataset, self._reading, self._seed, self._device = dataset, reading, seed, options.device
        self._engine = choose_engine(dataset, graph, seed, options, on_failure)

    @property
    def num_readers(self) -> int:
        return self._reading.num_readers

    @property
    def delivers_on(self) -> torch.device:
        """Where its batches are."""
        return self._engine.delivers_on

    @property
    def description(self) -> str:
        """Who does what, for `DataLoader.explain`."""
        readers = "the caller reads" if not self._reading.num_readers else f"{self._reading.num_readers} reader threads"
        return f"{readers}, {self._engine.description}, batches on {self._device}"

    def run(self, tasks: Iterator[BatchTask]) -> "FastPathRun":
        """Each task with its batch, in order."""
        reading = self._reading
        num_ahead = reading.num_readers * reading.batches_per_reader
        start = None
        if reading.worker_init_fn is not None and reading.num_readers:  # nothing else of the user's runs in readers
            start = WorkerStart(self._dataset, reading.num_readers, self._seed & MAX_SEED, reading.worker_init_fn)
        begin = None if start is None else start.begin
        reads = ReadAhead(tasks, self._engine.load, reading.num_readers, num_ahead, reading.timeout_s, begin)
        if start is not None:
            start.wait(reading.timeout_s or None)
        return FastPathRun(reads, self._engine, self._dataset, reading.timeout_s, self.stats)


class FastPathRun:
    """An iterator over tasks and their batches. Threads and pipeline end with it, however it ends."""

    def __init__(
        self,
        reads: ReadAhead[BatchTask, HostBatch],
        engine: Engine,
        dataset: RecordDataset,
        timeout_s: float,
        stats: LoaderStats,
    ) -> None:
        self._reads, self._stats = reads, stats
        self._batches = _transformed(reads, engine, dataset, timeout_s, stats)

    @property
    def next_is_ready(self) -> bool:
        return self._reads.next_is_ready

    def __iter__(self) -> Iterator[tuple[BatchTask, Batch]]:
        return self

    def __next__(self) -> tuple[BatchTask, Batch]:
        host, batch = next(self._batches)
        stats = self._stats
        stats.batches += 1
        stats.samples += host.task.rows.num_valid
        stats.add(host.times)
        return host.task, batch

    def close(self) -> None:
        self._batches.close()
        self._reads.close()  # where nothing was asked for yet


def _transformed(
    reads: ReadAhead[BatchTask, HostBatch], engine: Engine, dataset: RecordDataset, timeout_s: float, stats: LoaderStats
) -> Generator[Delivered, None, None]:
    try:
        yield from _waited_for(engine.transform(_read(reads, stats)), stats)
    except TaskTimeoutError as error:
        raise _timeout_error(error.task, dataset, timeout_s) from None
    finally:
        reads.close()


def _waited_for(transformed: Iterator[Delivered], stats: LoaderStats) -> Iterator[Delivered]:
    """The same batches; the time that the caller waits for them, past that for reading, goes into the statistics."""
    while True:
        started, read_wait_s = time.perf_counter(), stats.read_wait_s
        delivered = next(transformed, None)
        stats.graph_wait_s += time.perf_counter() - started - (stats.read_wait_s - read_wait_s)
        if delivered is None:
            return
        yield delivered


def _read(batches: ReadAhead[BatchTask, HostBatch], stats: LoaderStats) -> Iterator[HostBatch]:
    """The same batches; how many are ready, and the time that the caller waits for each, go into the statistics."""
    while True:
        started = time.perf_counter()
        stats.ready_batches += batches.num_ready
        batch = next(batches, None)
        stats.read_wait_s += time.perf_counter() - started
        if batch is None:
            return
        yield batch


def choose_engine(
    dataset: RecordDataset, graph: Graph | None, seed: int, options: EngineOptions, on_failure: OnFailure
) -> Engine:
    """The engine that fits a data set, a graph (None: fields as they are) and where batches are wanted."""
    inflated = why_not_inflated(dataset, options.device) is None
    if graph is None and not inflated:
        return TensorEngine(dataset, options, on_failure)
    if inflated:
        return DaliEngine(dataset, inflating(graph, dataset), seed, options, on_failure)
    assert graph is not None
    if (
        isinstance(graph, ImageGraph)
        and options.device.type == "cpu"
        and graph.output.field == dataset.records.schema.primary
    ):
        return ImageEngine(dataset, graph, seed, options, on_failure)
    return DaliEngine(dataset, graph, seed, options, on_failure)


def _timeout_error(task: object, dataset: RecordDataset, timeout_s: float) -> LoadTimeoutError:
    assert isinstance(task, BatchTask)
    first = dataset.place(int(task.rows.ids[0])) if len(task.rows.ids) else str(dataset.records.path)
    return LoadTimeoutError(
        f"{task.place}: not read within {timeout_s:g} s (it starts with {first}): is the file system still there? "
        "Otherwise give the loader a longer timeout"
    )
