"""The ways from a step to its batch. `DataLoader` chooses one when it is made; `explain()` names it.

RecordPath  a RecordDataset through an engine: no Python per sample
SamplePath  any map-style data set, sample by sample, in the caller or in threads
TorchPath   torch's own iterator: worker processes where multiprocessing_context asks for them, IterableDatasets
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data._utils.pin_memory import pin_memory as pin_structure

from stagein.formats.errors import UsageError

from .bad_records import Replacement
from .collate import rows_as_samples
from .deliveries import Deliveries, Delivery, Passed
from .fastpath import FastPath
from .fetching import CallerFetcher, FedSteps, FetchSamples, ThreadFetcher, TimedFetch, TorchFetcher, WorkerThreads
from .record_stream import RecordStream
from .sampler import Epoch, Step
from .stats import LoaderStats, SharedTimes


class LoadingPath(Protocol):
    """One way from steps to batches."""

    @property
    def stats(self) -> LoaderStats: ...

    @property
    def description(self) -> str:
        """Who does the work, for `DataLoader.explain`."""

    def start(self, epoch: Epoch, draw_base_seed: Callable[[], int]) -> Deliveries:
        """Begin to load what is left of an epoch. `draw_base_seed`: of the workers, from where torch draws it."""


def _begun_as_by_torch(epoch: Epoch, draw_base_seed: Callable[[], int], num_workers: int) -> tuple[Iterator[Step], int]:
    """The steps of an epoch, and the seed of its workers. Samplers may draw from the same generator when they are asked for an iterator:
    torch asks them, draws the seed, asks them again where there are workers, and then asks for the first index. Workers that persist have
    their seed, and a sampler is asked once."""
    steps, base_seed = epoch.steps(), draw_base_seed()
    return epoch.steps() if num_workers else steps, base_seed


@dataclass
class SamplePath:
    """Any map-style data set, sample by sample. Without workers the caller does it. Batches are on the CPU."""

    fetch: FetchSamples
    num_workers: int
    batches_per_worker: int
    timeout_s: float
    in_order: bool
    persistent: bool
    worker_init_fn: Callable[[int], None] | None
    pin_memory: bool
    stats: LoaderStats = field(default_factory=LoaderStats)
    _workers: WorkerThreads | None = None

    @property
    def description(self) -> str:
        who = f"{self.num_workers} threads" if self.num_workers else "the caller"
        return f"sample by sample, by {who}"

    def start(self, epoch: Epoch, draw_base_seed: Callable[[], int]) -> Deliveries:
        fetch = TimedFetch(self.fetch, SharedTimes(self.stats), self.pin_memory)
        workers, self._workers = self._workers, None
        if workers is not None and workers.process == os.getpid():  # one forked of it has not its threads
            steps = epoch.steps()
        else:
            steps, base_seed = _begun_as_by_torch(epoch, draw_base_seed, self.num_workers)
            if not self.num_workers:
                return _Counted(CallerFetcher(fetch, steps), self.stats)
            dataset, limit = self.fetch.dataset, self.timeout_s or None
            workers = WorkerThreads(fetch, dataset, self.num_workers, base_seed, self.worker_init_fn, limit)
        if self.persistent:
            self._workers = workers
        threads = ThreadFetcher(
            workers,
            steps,
            self.num_workers * self.batches_per_worker,
            self.timeout_s,
            self.in_order,
            keep_workers=self.persistent,
        )
        return _Counted(threads, self.stats)

    def __getstate__(self) -> dict[str, Any]:
        """Without threads: a loader can be sent to another process."""
        return {**vars(self), "_workers": None}


@dataclass
class TorchPath:
    """A loader of torch's: worker processes over `fed` steps, or an IterableDataset, which says itself what comes next."""

    loader: torch.utils.data.DataLoader[Any]
    fed: FedSteps | None
    stats: LoaderStats = field(default_factory=LoaderStats)

    @property
    def description(self) -> str:
        if not self.loader.num_workers:
            return "by torch's own iterator"
        context = self.loader.multiprocessing_context
        method = torch.multiprocessing.get_start_method() if context is None else context.get_start_method()
        return f"by torch's own iterator, in {self.loader.num_workers} worker processes ({method})"

    def start(self, epoch: Epoch, draw_base_seed: Callable[[], int]) -> Deliveries:
        steps = epoch.steps() if self.fed is None else self.fed.feed(epoch.steps())
        return _Counted(TorchFetcher(self.loader, steps), self.stats)


class _Counted(Passed):
    """The same deliveries; batches, samples and the wait for them go into the statistics."""

    def __init__(self, deliveries: Deliveries, stats: LoaderStats) -> None:
        super().__init__(deliveries)
        self._stats = stats

    def __next__(self) -> Delivery:
        started = time.perf_counter()
        if isinstance(self._deliveries, ThreadFetcher):
            self._stats.ready_batches += self._deliveries.num_ready
        step, batch = super().__next__()
        self._stats.read_wait_s += time.perf_counter() - started
        self._stats.batches += 1
        self._stats.samples += step.num_valid
        return step, batch


@dataclass
class RecordPath:
    """A RecordDataset through an engine.

    collate_fn  gets the rows of each batch as samples; None: the batch is delivered as it is.
    batched     False: one sample is delivered at a time, without the batch dimension.
    with_valid  batches, or the samples that collate_fn gets, say under `valid` whether they count or are padding.
    shaped      what is made of the dict of a batch, or of a sample, at last.
    replacement  knows which records are bad; None: bad records are errors.
    listed_fields  fields that may come as a list, one entry a sample, without a collate_fn.
    pin_memory  deliver in page-locked memory; what the engine put there stays where it is.
    persistent  when an epoch is over, go on with the one after it, before anybody asks for that.
    """

    fast_path: FastPath
    collate_fn: Callable[[Any], Any] | None
    batched: bool
    with_valid: bool
    shaped: Callable[[dict[str, Any]], Any]
    replacement: Replacement | None
    listed_fields: frozenset[str]
    pin_memory: bool
    persistent: bool
    _stream: RecordStream | None = field(default=None, init=False)
    """Of the epoch after the last one."""
    _has_started: bool = field(default=False, init=False)

    @property
    def stats(self) -> LoaderStats:
        return self.fast_path.stats

    @property
    def delivers_on(self) -> torch.device:
        return self.fast_path.delivers_on

    @property
    def description(self) -> str:
        return self.fast_path.description

    def start(self, epoch: Epoch, draw_base_seed: Callable[[], int]) -> Deliveries:
        stream, self._stream = self._stream, None
        if stream is None or not stream.turn_to(epoch):
            if stream is not None:
                stream.close()
            if self.persistent and self._has_started:
                steps = epoch.steps()
            else:
                steps, _ = _begun_as_by_torch(epoch, draw_base_seed, self.fast_path.num_readers)
            self._has_started = True
            stream = RecordStream(
                self.fast_path.run, epoch, steps, self.replacement, batched=self.batched, goes_on=self.persistent
            )
        return _RecordDeliveries(self, stream)

    def keep(self, stream: RecordStream | None) -> None:
        """Have this stream for the next epoch, in place of any other."""
        if self._stream is not None:
            self._stream.close()
        self._stream = stream

    def __getstate__(self) -> dict[str, Any]:
        """Without what is under way: a loader can be sent to another process."""
        return {**vars(self), "_stream": None}

    def __del__(self) -> None:
        if not sys.is_finalizing():  # threads stand still for good by then
            self.keep(None)


class _RecordDeliveries:
    def __init__(self, path: RecordPath, stream: RecordStream) -> None:
        self._path, self._stream = path, stream

    @property
    def next_is_ready(self) -> bool:
        return self._stream.next_is_ready

    def __iter__(self) -> Iterator[Delivery]:
        return self

    def __next__(self) -> Delivery:
        step, batch = next(self._stream)
        collated = self._collated(step, batch)
        return step, pin_structure(collated) if self._path.pin_memory else collated  # type: ignore[no-untyped-call]

    def close(self) -> None:
        if self._stream.is_at_end:
            self._path.keep(self._stream)
        else:
            self._stream.close()

    def _collated(self, step: Step, batch: dict[str, Any]) -> Any:
        path = self._path
        if path.with_valid:
            rows = torch.arange(len(step.indices), device=path.delivers_on)
            batch = {**batch, "valid": rows < step.num_valid}
        if path.batched and path.collate_fn is None:
            self._refuse_ragged(batch)
            return path.shaped(batch)
        num_rows = len(step.indices) if path.batched else 1
        samples = [path.shaped(sample) for sample in rows_as_samples(batch, num_rows)]
        if path.batched:
            assert path.collate_fn is not None
            return path.collate_fn(samples)
        return samples[0] if path.collate_fn is None else path.collate_fn(samples[0])

    def _refuse_ragged(self, batch: dict[str, Any]) -> None:
        """Raise UsageError where a graph made rows of different shapes, and nothing can be made of them."""
        for name, rows in batch.items():
            if isinstance(rows, list) and name not in self._path.listed_fields:
                raise UsageError(
                    f"the rows of {name!r} differ in shape: let the transform resize or pad them, give a collate_fn, or leave "
                    "the field out"
                )
