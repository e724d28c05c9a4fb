"""The fast path: reader threads, a DALI pipeline that runs ahead of the caller, and tensors on DALI's own memory."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stagein.formats.errors import StageinError

from .batches import BatchReader, BatchTask, HostBatch
from .dataset import RecordDataset
from .graphs import Graph
from .pipeline import GraphPipeline
from .reading import ReadAhead, TaskTimeoutError

Batch = dict[str, torch.Tensor]


@dataclass
class LoaderStats:
    """What a loader did since it was made, on this rank.

    read_s        seconds that threads spent reading and planning, added up over the threads.
    read_wait_s   seconds that the caller waited for reading.
    graph_wait_s  seconds that the caller waited for decoding and the rest of the graph.
    """

    batches: int = 0
    samples: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    read_wait_s: float = 0.0
    graph_wait_s: float = 0.0


@dataclass(frozen=True)
class FastPathOptions:
    """How much is done ahead, by how many threads, and where batches are delivered."""

    num_readers: int
    """0: the caller reads."""
    batches_per_reader: int
    read_timeout_s: float
    decode_threads: int
    device: torch.device
    pin_memory: bool
    """Deliver in page-locked memory what is delivered on the CPU."""
    keep_pipeline: bool
    """Build the DALI pipeline once, not once an epoch."""


class FastPath:
    """Runs the batches of a `RecordDataset` through a graph."""

    def __init__(self, dataset: RecordDataset, graph: Graph, seed: int, options: FastPathOptions) -> None:
        self.options = options
        self.stats = LoaderStats()
        self._dataset, self._graph = dataset, graph
        self._reader = BatchReader(dataset, graph, seed)
        self._idle_pipeline: GraphPipeline | None = None

    def run(self, tasks: Iterator[BatchTask]) -> Iterator[tuple[BatchTask, Batch]]:
        """Each task with its batch, in order. Threads and pipeline end with the iterator, however it ends."""
        options = self.options
        num_ahead = options.num_readers * options.batches_per_reader
        reads = ReadAhead(tasks, self._reader, options.num_readers, num_ahead, options.read_timeout_s)
        join_timeout_s = None
        try:
            yield from self._transform(self._timed(reads))
        except TaskTimeoutError as error:
            join_timeout_s = 0.0  # that thread hangs, and may do so for ever
            raise _timeout_error(error.task, self._dataset, options.read_timeout_s) from None
        finally:
            reads.close(join_timeout_s)

    def _transform(self, batches: Iterator[HostBatch]) -> Iterator[tuple[BatchTask, Batch]]:
        """Through one pipeline, and through a larger one from a batch on that has more rows than any before."""
        options = self.options
        pipeline, self._idle_pipeline = self._idle_pipeline, None
        try:
            first = next(batches, None)
            while first is not None:
                if pipeline is None or pipeline.max_rows < first.num_inputs:
                    if pipeline is not None:
                        pipeline.close()
                    pipeline = GraphPipeline(
                        self._graph, first, first.num_inputs, options.device, options.decode_threads
                    )
                yield from self._deliver(pipeline.run(itertools.chain([first], batches), self._row_place))
                first = pipeline.take_back()
            if options.keep_pipeline:
                self._idle_pipeline, pipeline = pipeline, None
        finally:
            if pipeline is not None:
                pipeline.close()

    def _deliver(self, transformed: Iterator[tuple[HostBatch, Batch]]) -> Iterator[tuple[BatchTask, Batch]]:
        """The same batches, pinned where that was asked for, and counted."""
        stats = self.stats
        while True:
            started, read_wait_s = time.perf_counter(), stats.read_wait_s
            delivered = next(transformed, None)
            stats.graph_wait_s += time.perf_counter() - started - (stats.read_wait_s - read_wait_s)
            if delivered is None:
                return
            host, batch = delivered
            if self.options.pin_memory:
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            stats.batches += 1
            stats.samples += host.task.rows.num_valid
            stats.bytes_read += host.num_bytes
            stats.read_s += host.read_s
            yield host.task, batch

    def _row_place(self, batch: HostBatch, row: int) -> str:
        return self._dataset.place(int(batch.task.rows.ids[row]))

    def _timed(self, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
        """The same batches; the time that the caller waits for each goes into the statistics."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.stats.read_wait_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def _timeout_error(task: object, dataset: RecordDataset, timeout_s: float) -> StageinError:
    assert isinstance(task, BatchTask)
    first = dataset.place(int(task.rows.ids[0])) if len(task.rows.ids) else str(dataset.records.path)
    return StageinError(
        f"{task.place}: not read within {timeout_s:g} s (it starts with {first}): is the file system still there? "
        "Otherwise give the loader a longer timeout"
    )
