"""The engine for the ready image graphs without a GPU: threads of our own that turn records into rows of a batch."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from stagein.formats.errors import SourceError

from . import resize
from .batches import BatchReader, BatchTask, HostBatch, RowFailure
from .buffer_ring import BufferRing
from .dataset import RecordDataset
from .engine import CPU, Delivered, EngineOptions, OnFailure
from .graphs import ImageGraph, ImageOutput, ImageViews
from .image_decoder import ImageDecoder
from .stats import PhaseTimes

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
        self._reader = BatchReader(dataset, graph, seed, on_failure, read_for_empty=False)
        self._ring = BufferRing(_MAX_IDLE_BATCHES, pinned=options.pin_memory, num_enough=_BATCHES_IN_MEMORY)
        resize.prepare()

    @property
    def description(self) -> str:
        return f"images decoded and resized by {self._options.decode_threads} threads"

    def load(self, task: BatchTask) -> HostBatch:
        return self._reader.read(task)

    def transform(self, batches: Iterator[HostBatch]) -> Iterator[Delivered]:
        threads = _RowThreads(self._graph.output, self._options.decode_threads)
        in_work: deque[_BatchInWork] = deque()
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
                yield self._finish(in_work.popleft(), threads)
        finally:
            threads.close()
        if failure is not None:
            raise failure

    def _take_rows(self, batch: HostBatch) -> NDArray[np.float32]:
        size = self._graph.output.size
        return self._ring.take((batch.num_rows, 3, size, size), np.float32)

    def _begin(
        self, batch: HostBatch, threads: "_RowThreads", take: Callable[[], NDArray[np.float32]]
    ) -> "_BatchInWork":
        output = self._graph.output
        work = _BatchInWork(batch, self._graph.views(batch.inputs), batch.inputs[output.field], take)
        threads.begin(work)
        return work

    def _finish(self, work: "_BatchInWork", threads: "_RowThreads") -> Delivered:
        work.wait()
        while work.failed:
            places = [(row, self._dataset.place(int(work.batch.ids[row])), reason) for row, reason in work.failed]
            failures = [
                RowFailure(row, SourceError(f"{place} cannot be decoded: {reason}")) for row, place, reason in places
            ]
            work = self._begin(self._reader.repair(work.batch, failures), threads, work.claim_rows)
            work.wait()
        tensors = {self._graph.output.field: torch.from_numpy(work.claim_rows())}
        tensors |= {name: torch.as_tensor(rows) for name, rows in work.batch.ready.items()}
        return replace(work.batch, inputs={}), tensors  # or its records lived as long as its tensors


@dataclass
class _BatchInWork:
    """A batch whose rows are being made, in memory that `take` gives for them; `failed` has the rows that cannot be, and why."""

    batch: HostBatch
    views: ImageViews
    records: list[NDArray[np.uint8]]
    take: Callable[[], NDArray[np.float32]]
    failed: list[tuple[int, str]] = field(default_factory=list)
    _results: list[BaseException | PhaseTimes] = field(default_factory=list)
    _is_finished: threading.Event = field(default_factory=threading.Event)
    _taking: threading.Lock = field(default_factory=threading.Lock)

    def claim_rows(self) -> NDArray[np.float32]:
        """All rows. Who asks first waits until there is memory for them."""
        with self._taking:
            return self._rows

    @cached_property
    def _rows(self) -> NDArray[np.float32]:
        return self.take()

    def finish_row(self, result: BaseException | PhaseTimes) -> None:
        self._results.append(result)
        if len(self._results) == self.batch.num_rows:
            self._is_finished.set()  # once a batch: to wake the caller for every row would cost threads more than it

    def wait(self) -> None:
        """Until all rows are made. Raises what a thread met that is not the fault of a record."""
        if self.batch.num_rows:
            self._is_finished.wait()
        for result in self._results:
            if isinstance(result, BaseException):
                raise result
            self.batch.times.add(result)
        self.failed.sort()


class _RowThreads:
    """Threads that make rows, one after the other, of the batches given to them."""

    def __init__(self, output: ImageOutput, num_threads: int) -> None:
        self._queue: SimpleQueue[tuple[_BatchInWork, int] | None] = SimpleQueue()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(
                target=_make_rows,
                args=(output, self._queue, self._closed),
                name=f"stagein-decoder-{number}",
                daemon=True,
            )
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, work: _BatchInWork) -> None:
        largest_first = sorted(range(work.batch.num_rows), key=lambda row: -len(work.records[row]))
        for row in largest_first:  # so that threads are done at about the same time
            self._queue.put((work, row))

    def close(self) -> None:
        """End the threads; rows that are not begun are not made."""
        self._closed.set()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


def _make_rows(
    output: ImageOutput, queue: "SimpleQueue[tuple[_BatchInWork, int] | None]", closed: threading.Event
) -> None:
    decoder = ImageDecoder()
    scale, offset = output.scale_and_offset()
    while (item := queue.get()) is not None and not closed.is_set():
        work, row = item
        result: BaseException | PhaseTimes = PhaseTimes()
        window, region = work.views.windows[row], work.views.regions[row]
        try:
            began = time.perf_counter()
            pixels, window = decoder.decode(work.records[row], window)
            decoded = time.perf_counter()
            if not _lies_in(window, pixels):
                raise ValueError(f"it has {len(pixels)} rows of {pixels.shape[1] // 3} pixels, less than its size says")
            mirror, out = bool(work.views.mirrored[row]), work.claim_rows()[row]
            began_transform = time.perf_counter()
            resize.resize_into(pixels, window, region, output.antialias, mirror, scale, offset, out)
            result = PhaseTimes(
                decode_s=decoded - began,
                bytes_decoded=pixels.nbytes,
                transform_s=time.perf_counter() - began_transform,
                bytes_transformed=out.nbytes,
            )
        except ValueError as reason:
            work.failed.append((row, " ".join(str(reason).split())))
        except BaseException as raised:  # whatever it is, it belongs to the caller
            result = raised
        work.finish_row(result)
        out = None
        del item, work  # or the last batch would live on until the next one comes


def _lies_in(window: NDArray[np.int64], pixels: NDArray[np.uint8]) -> bool:
    top, left, height, width = window.tolist()
    return bool(min(top, left) >= 0 and top + height <= len(pixels) and 3 * (left + width) <= pixels.shape[1])
