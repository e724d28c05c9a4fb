"""The engine for the ready image graphs without a GPU: threads of our own that turn records into rows of a batch."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from stagein.formats.errors import SourceError, StageinError

from .batches import BatchReader, BatchTask, HostBatch, RowFailure
from .buffer_ring import BufferRing
from .dataset import RecordDataset
from .engine import CPU, Delivered, EngineOptions, OnFailure
from .graphs import ImageGraph
from .reading import join_others
from .row_maker import BatchInWork, RowMaker, RowMakers

_BATCHES_AHEAD = 2
"""Batches worked on ahead of the caller: threads that are done with one go on with the next."""
_MAX_IDLE_BATCHES = 4
_BATCHES_IN_MEMORY = 2
"""The caller's, and the one that is made. The next one after it is begun before it is done, so that no thread has to wait, but only
decoded: what was decoded first goes into the memory of the caller's batch, once that has the next."""


class ImageEngine:
    """Decodes only what a window needs, and resizes and normalises it in one pass."""

    delivers_on = CPU

    def __init__(
        self, dataset: RecordDataset, graph: ImageGraph, seed: int, options: EngineOptions, on_failure: OnFailure
    ) -> None:
        self._dataset, self._graph, self._options = dataset, graph, options
        self._makers = RowMakers(graph.output)
        self._reader = BatchReader(
            dataset, graph, seed, on_failure, read_for_empty=False, may_locate=self._makers.are_ready
        )
        self._ring = BufferRing(_MAX_IDLE_BATCHES, pinned=options.pin_memory, num_enough=_BATCHES_IN_MEMORY)

    @property
    def description(self) -> str:
        return f"images decoded and resized by {self._options.decode_threads} threads"

    def load(self, task: BatchTask) -> HostBatch:
        return self._reader.read(task)

    def transform(self, batches: Iterator[HostBatch]) -> Iterator[Delivered]:
        makers, process = self._makers.take(self._options.decode_threads), os.getpid()
        threads = _RowThreads(makers)
        in_work: deque[BatchInWork] = deque()
        failure: Exception | None = None
        try:
            while True:
                while failure is None and len(in_work) < _BATCHES_AHEAD:
                    try:
                        batch = next(batches, None)
                    except Exception as error:  # due once the batches before it are delivered
                        failure = error
                        break
                    if batch is None:
                        break
                    if in_work:
                        in_work[-1].claim_rows()  # before the next one may take what it waits for
                    in_work.append(self._begin(batch, threads, partial(self._take_rows, batch)))
                if not in_work:
                    break
                delivered = self._finish(in_work[0], threads)
                in_work.popleft()
                yield delivered
                del delivered  # the caller's memory is waited for
        finally:
            for work in in_work:
                work.abandon()
            threads.close()
            # A process that was forked of it meanwhile has them as threads left them, that it has not, in the midst of a row.
            if os.getpid() == process:
                self._makers.give_back(makers)
        if failure is not None:
            raise failure

    def _take_rows(self, batch: HostBatch) -> NDArray[np.float32]:
        size = self._graph.output.size
        return self._ring.take((batch.num_rows, 3, size, size), np.float32)

    def _begin(self, batch: HostBatch, threads: "_RowThreads", take: Callable[[], NDArray[np.float32]]) -> BatchInWork:
        records = batch.inputs[self._graph.output.field]
        work = BatchInWork(batch, self._graph.views(batch.inputs), records, take, by_kernel=self._makers.are_ready())
        threads.begin(work)
        return work

    def _finish(self, work: BatchInWork, threads: "_RowThreads") -> Delivered:
        work.wait()
        while work.failed:
            failures = [RowFailure(row, self._error(work, row, reason)) for row, reason in work.failed]
            work = self._begin(self._reader.repair(work.batch, failures), threads, work.claim_rows)
            work.wait()
        tensors = {self._graph.output.field: torch.from_numpy(work.claim_rows())}
        tensors |= {name: torch.as_tensor(rows) for name, rows in work.batch.ready.items()}
        return replace(work.batch, inputs={}), tensors  # or its records lived as long as its tensors

    def _error(self, work: BatchInWork, row: int, reason: str | StageinError) -> StageinError:
        if isinstance(reason, StageinError):
            return reason
        return SourceError(f"{self._dataset.place(int(work.batch.ids[row]))} cannot be decoded: {reason}")


class _RowThreads:
    """Threads that make the rows of the batches given to them, of one after the other."""

    def __init__(self, makers: Sequence[RowMaker]) -> None:
        self._queue: SimpleQueue[BatchInWork | None] = SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_make_rows, args=(maker, self._queue), name=f"stagein-decoder-{number}", daemon=True
            )
            for number, maker in enumerate(makers)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, work: BatchInWork) -> None:
        for _ in self._threads:
            self._queue.put(work)

    def close(self) -> None:
        """End the threads, once they are done with what was begun."""
        for _ in self._threads:
            self._queue.put(None)
        join_others(self._threads)


def _make_rows(maker: RowMaker, queue: "SimpleQueue[BatchInWork | None]") -> None:
    while (work := queue.get()) is not None:
        maker.make(work)
        del work  # or the last batch would live on until the next one comes
