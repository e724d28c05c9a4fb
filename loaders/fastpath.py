"""The fast path: reader threads that run ahead, and an engine that makes tensors of what they read."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stagein.formats.errors import StageinError

from .batches import BatchTask, HostBatch
from .dali_engine import DaliEngine
from .dataset import RecordDataset
from .engine import Batch, Delivered, Engine, EngineOptions, OnFailure, raise_first
from .graphs import Graph, ImageGraph
from .image_engine import ImageEngine
from .inflate import inflating, why_not_inflated
from .reading import ReadAhead, TaskTimeoutError
from .tensor_engine import TensorEngine
from .worker_info import MAX_SEED, Introduced


@dataclass
class LoaderStats:
    """What a loader did since it was made, on this rank.

    read_s        seconds that threads spent reading, or loading samples one by one, added up over the threads.
    read_wait_s   seconds that the caller waited for reading, or for workers.
    graph_wait_s  seconds that the caller waited for decoding and the rest of the graph.
    left_shards   files of the staged copy that turned out to be bad and are read from the source.
    bad_records   distinct records that others took the place of.
    ready_batches  batches that were ready when the caller asked for the next one, added up: by `batches`, the mean depth of
                   the queue. Near 0, the caller waits for data.
    """

    batches: int = 0
    samples: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    read_wait_s: float = 0.0
    graph_wait_s: float = 0.0
    left_shards: int = 0
    bad_records: int = 0
    ready_batches: int = 0


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
        self.device = options.device
        self._dataset, self._reading, self._seed = dataset, reading, seed
        self._engine = _choose_engine(dataset, graph, seed, options, on_failure)

    @property
    def description(self) -> str:
        """Who does what, for `DataLoader.explain`."""
        readers = "the caller reads" if not self._reading.num_readers else f"{self._reading.num_readers} reader threads"
        return f"{readers}, {self._engine.description}, batches on {self.device}"

    def run(self, tasks: Iterator[BatchTask]) -> Iterator[tuple[BatchTask, Batch]]:
        """Each task with its batch, in order. Threads and pipeline end with the iterator, however it ends."""
        reading = self._reading
        num_ahead = reading.num_readers * reading.batches_per_reader
        load: Callable[[BatchTask], HostBatch] = self._engine.load
        if reading.worker_init_fn is not None and reading.num_readers:
            load = Introduced(load, self._dataset, reading.num_readers, self._seed & MAX_SEED, reading.worker_init_fn)
        reads = ReadAhead(tasks, load, reading.num_readers, num_ahead, reading.timeout_s)
        join_timeout_s = None
        try:
            yield from self._count(self._engine.transform(self._timed(reads)))
        except TaskTimeoutError as error:
            join_timeout_s = 0.0  # that thread hangs, and may do so for ever
            raise _timeout_error(error.task, self._dataset, reading.timeout_s) from None
        finally:
            reads.close(join_timeout_s)

    def _count(self, transformed: Iterator[Delivered]) -> Iterator[tuple[BatchTask, Batch]]:
        """The same batches; what they took goes into the statistics."""
        stats = self.stats
        while True:
            started, read_wait_s = time.perf_counter(), stats.read_wait_s
            delivered = next(transformed, None)
            stats.graph_wait_s += time.perf_counter() - started - (stats.read_wait_s - read_wait_s)
            if delivered is None:
                return
            host, batch = delivered
            stats.batches += 1
            stats.samples += host.task.rows.num_valid
            stats.bytes_read += host.num_bytes
            stats.read_s += host.read_s
            yield host.task, batch

    def _timed(self, batches: ReadAhead[BatchTask, HostBatch]) -> Iterator[HostBatch]:
        """The same batches; how many are ready, and the time that the caller waits for each, go into the statistics."""
        while True:
            started = time.perf_counter()
            self.stats.ready_batches += batches.num_ready
            batch = next(batches, None)
            self.stats.read_wait_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def _choose_engine(
    dataset: RecordDataset, graph: Graph | None, seed: int, options: EngineOptions, on_failure: OnFailure
) -> Engine:
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


def _timeout_error(task: object, dataset: RecordDataset, timeout_s: float) -> StageinError:
    assert isinstance(task, BatchTask)
    first = dataset.place(int(task.rows.ids[0])) if len(task.rows.ids) else str(dataset.records.path)
    return StageinError(
        f"{task.place}: not read within {timeout_s:g} s (it starts with {first}): is the file system still there? "
        "Otherwise give the loader a longer timeout"
    )
