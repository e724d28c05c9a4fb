"""Samples of any map-style data set as batches: in the caller, in threads, or in torch's worker processes."""

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.data
from torch.utils.data._utils.pin_memory import pin_memory as pin_structure

from stagein.formats.errors import LoadTimeoutError, StageinError, UsageError, add_note
from stagein.worker_processes import hidden_from_mpi, mpi_connects_ranks

from .collate import tensor_bytes
from .deliveries import Delivery, Failure
from .reading import join_others, refuse_in_forks
from .sampler import Step
from .stats import PhaseTimes, SharedTimes
from .worker_info import WorkerStart

_JOIN_SECONDS = 10.0
"""How long an iterator that ends waits for threads that are in the user's code."""
_EXIT_SECONDS = 5.0
"""How long an interpreter that exits does."""


class Fetch(Protocol):
    """What is done for a step, wherever it is done."""

    def __call__(self, step: Step) -> Any: ...


class TimedFetch:
    """`fetch`; what it takes goes into `times`, and its batches into page-locked memory where `pin` says so."""

    def __init__(self, fetch: "FetchSamples", times: SharedTimes, pin: bool) -> None:
        self._fetch, self._times, self._pin = fetch, times, pin

    def __call__(self, step: Step) -> Any:
        times = PhaseTimes()
        batch = self._fetch.load(step, times)
        times.bytes_transformed = tensor_bytes(batch)
        self._times.add(times)
        return pin_structure(batch) if self._pin else batch  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class TransformedCollate:
    """Samples transformed one by one, then collated. Without batching: the one sample. It can be sent to processes."""

    transform: Callable[[Any], Any]
    collate: Callable[[Any], Any]
    batched: bool

    def __call__(self, data: Any) -> Any:
        return self.collate([self.transform(sample) for sample in data] if self.batched else self.transform(data))


@dataclass(frozen=True)
class FetchSamples:
    """The samples of a map-style data set, transformed one by one, and collated.

    empty_of    what a rank gets that has no sample in a step: made from a batch of the first sample. None: it gets what
                `collate` makes of an empty list.
    with_valid  samples, which are dicts, say under `valid` whether they count or are padding.
    """

    dataset: Any
    collate: Callable[[Any], Any]
    batched: bool
    empty_of: Callable[[Any], Any] | None = None
    transform: Callable[[Any], Any] | None = None
    with_valid: bool = False

    def load(self, step: Step, times: PhaseTimes) -> Any:
        """The batch of a step. What it takes is added to `times`."""
        if not self.batched:
            samples, collate, num_valid = [step.indices], _of_the_only_one(self.collate), 1
        elif self.empty_of is not None and not step.indices:
            samples, collate, num_valid = [0], _both(self.collate, self.empty_of), 0
        else:
            samples, collate, num_valid = step.indices, self.collate, step.num_valid
        fetched = self.fetch(step, samples, times)
        started = time.perf_counter()
        batch = collate(self._finished(fetched, num_valid))
        times.transform_s += time.perf_counter() - started
        return batch

    def fetch(self, step: Step, indices: list[Any], times: PhaseTimes) -> Any:
        """The samples as the data set has them: a list, or what its `__getitems__` makes, which may be a whole batch."""
        started = time.perf_counter()
        fetch_many = getattr(self.dataset, "__getitems__", None) if self.batched else None
        samples = [self.dataset[index] for index in indices] if fetch_many is None else fetch_many(indices)
        times.read_s += time.perf_counter() - started
        return samples

    def _finished(self, fetched: Any, num_valid: int) -> Any:
        samples = fetched if self.transform is None else [self.transform(sample) for sample in fetched]
        if not self.with_valid:
            return samples
        if not all(isinstance(sample, Mapping) for sample in samples):
            raise UsageError(
                "tail='pad' has no place for `valid` in samples that are no dicts: let the transform return dicts"
            )
        return [{**sample, "valid": np.bool_(row < num_valid)} for row, sample in enumerate(samples)]


def _of_the_only_one(collate: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    return lambda samples: collate(samples[0])


def _both(first: Callable[[Any], Any], then: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    return lambda samples: then(first(samples))


class CallerFetcher:
    """An iterator over deliveries without threads or processes. After an error it goes on with the next step, as torch does."""

    next_is_ready = False

    def __init__(self, fetch: Fetch, steps: Iterator[Step]) -> None:
        self._fetch, self._steps = fetch, steps

    def __iter__(self) -> Iterator[Delivery]:
        return self

    def __next__(self) -> Delivery:
        step = next(self._steps)
        return step, self._fetch(step)

    def close(self) -> None:
        self._steps = iter(())


class WorkerThreads:
    """Threads that stand for torch's worker processes: each is introduced, initialised once, and then fetches batches.

    The body of a thread holds no reference to this object. Threads are daemons: one that hangs in the user's code
    does not keep the interpreter from exiting. Others end before it does.

    timeout_s  seconds to wait for `worker_init_fn`; None: for ever.
    """

    def __init__(
        self,
        fetch: Fetch,
        dataset: Any,
        num_workers: int,
        base_seed: int,
        worker_init_fn: Callable[[int], None] | None,
        timeout_s: float | None,
    ) -> None:
        self.process = os.getpid()
        self._queue: SimpleQueue[tuple[Future[Any], Step] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        start = WorkerStart(dataset, num_workers, base_seed, worker_init_fn)
        # Modes of the caller, which a worker process would have from it.
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        _running.add(self)
        for number in range(num_workers):
            thread = threading.Thread(
                target=_serve,
                args=(self._queue, fetch, start, number, *modes),
                name=f"stagein-worker-{number}",
                daemon=True,
            )
            thread.start()
            self._threads.append(thread)
        start.wait(timeout_s)

    def submit(self, step: Step) -> "Future[Any]":
        future: Future[Any] = Future()
        self._queue.put((future, step))
        return future

    def close(self, join_seconds: float = _JOIN_SECONDS) -> None:
        """End the threads as soon as their current batch is done; wait for that at most `join_seconds`."""
        threads = self.tell_to_end()
        if not sys.is_finalizing():  # threads stand still for good by then
            join_others(threads, join_seconds)

    def tell_to_end(self) -> list[threading.Thread]:
        """The threads, which begin no batch any more."""
        threads, self._threads = self._threads, []
        if threads:  # else told before: what is queued tells one that hangs to end
            with contextlib.suppress(Empty):
                while True:
                    if (item := self._queue.get_nowait()) is not None:
                        item[0].cancel()
        for _ in threads:
            self._queue.put(None)
        return threads

    def __del__(self) -> None:
        self.close()


_running: "weakref.WeakSet[WorkerThreads]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that comes back from code of torch's when the interpreter has ended would abort the process."""
    ours = [workers for workers in list(_running) if workers.process == os.getpid()]
    join_others([thread for workers in ours for thread in workers.tell_to_end()], _EXIT_SECONDS)


class ThreadFetcher:
    """An iterator over deliveries that threads work on ahead of the caller. It starts at once.

    workers   closed with the iterator, unless `keep_workers`.
    timeout_s  seconds to wait for a batch (0: for ever), then StageinError is raised.
    in_order  False: whichever batch is ready first comes first.
    """

    def __init__(
        self, workers: WorkerThreads, steps: Iterator[Step], num_ahead: int, timeout_s: float, in_order: bool, keep_workers: bool
    ) -> None:  # fmt: skip
        self._workers, self._steps = workers, steps
        self._num_ahead = max(1, num_ahead)
        self._timeout_s = timeout_s or None
        self._in_order, self._keep_workers = in_order, keep_workers
        self._pending: deque[tuple[Future[Any], Step]] = deque()
        self._late_error: Exception | None = None
        """Raised by the sampler; due once the batches before it are delivered."""
        self._hand_out()

    @property
    def num_ready(self) -> int:
        """Batches that are done and wait for the caller."""
        return sum(future.done() for future, _ in self._pending)

    @property
    def next_is_ready(self) -> bool:
        next_ones = list(self._pending)[: 1 if self._in_order else None]
        return any(future.done() for future, _ in next_ones)

    def __iter__(self) -> Iterator[Delivery]:
        return self

    def __next__(self) -> Delivery:
        refuse_in_forks(self._workers.process)
        if not self._pending:
            if self._late_error is not None:
                raise self._late_error
            raise StopIteration
        if not self._in_order:
            self._bring_a_ready_one_first()
        future, step = self._pending[0]
        if not wait([future], self._timeout_s).done:
            self.close(join_seconds=0.0)  # that thread hangs, and may do so for ever
            raise LoadTimeoutError(
                f"epoch {step.epoch}, batch {step.number}: not loaded within {self._timeout_s:g} s (it starts with sample "
                f"{_first(step.indices)!r}): is the file system still there? Otherwise give the loader a longer timeout"
            )
        self._pending.popleft()
        self._hand_out()
        # Not raised here: the traceback would hold this object, and with it the threads, for as long as the error lives.
        error = future.exception()
        return step, future.result() if error is None else Failure(error)

    def close(self, join_seconds: float = _JOIN_SECONDS) -> None:
        # In a process forked of that one, a thread that it has not may have held the lock of a future.
        if self._workers.process == os.getpid():
            for future, _ in self._pending:
                future.cancel()
        self._pending.clear()
        if not self._keep_workers:
            self._workers.close(join_seconds)

    def _bring_a_ready_one_first(self) -> None:
        wait([future for future, _ in self._pending], self._timeout_s, return_when=FIRST_COMPLETED)
        ready = next((number for number, (future, _) in enumerate(self._pending) if future.done()), 0)
        chosen = self._pending[ready]
        del self._pending[ready]
        self._pending.appendleft(chosen)

    def _hand_out(self) -> None:
        while len(self._pending) < self._num_ahead and self._late_error is None:
            try:
                step = next(self._steps)
            except StopIteration:
                return
            except Exception as error:
                self._late_error = error
                return
            self._pending.append((self._workers.submit(step), step))


def _first(indices: Any) -> Any:
    return indices[0] if isinstance(indices, list) and indices else indices


def _serve(
    queue: "SimpleQueue[tuple[Future[Any], Step] | None]",
    fetch: Fetch,
    start: WorkerStart,
    number: int,
    takes_gradients: bool,
    is_inference: bool,
) -> None:
    """Body of a worker thread."""
    failure = start.begin(number)
    with torch.inference_mode(is_inference), torch.set_grad_enabled(takes_gradients):
        while (item := queue.get()) is not None:
            future, step = item
            if future.set_running_or_notify_cancel():
                try:
                    if failure is not None:
                        raise failure
                    future.set_result(fetch(step))
                except BaseException as error:  # whatever it is, it belongs to the caller
                    if not isinstance(error, StageinError):
                        add_note(
                            error, f"in {threading.current_thread().name}, epoch {step.epoch}, batch {step.number}"
                        )
                    future.set_exception(error)
            del item, future, step  # or the last batch would live on until the next one comes


class TorchFetcher:
    """Deliveries of a loader of torch's, in its worker processes where it has some; `steps` tells what each batch is."""

    def __init__(self, loader: torch.utils.data.DataLoader[Any], steps: Iterator[Step]) -> None:
        if loader.num_workers:
            refuse_fork(loader.multiprocessing_context)
        self._steps = steps
        self.next_is_ready = loader.num_workers > 0
        """Worker processes do not say; they are ahead of the caller, mostly."""
        with hidden_from_mpi():
            self._batches: Iterator[Any] = iter(loader)

    def __iter__(self) -> Iterator[Delivery]:
        return self

    def __next__(self) -> Delivery:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except Exception:
            with contextlib.suppress(IndexError):  # the sampler's own error, which stands for no batch
                next(self._steps)
            raise
        return next(self._steps), batch

    def close(self) -> None:
        """Let go of torch's iterator: its processes end with it, unless they are persistent."""
        self._batches = iter(())


class FedSteps:
    """A (batch) sampler for a loader of torch's, fed with other steps in each epoch."""

    def __init__(self) -> None:
        self._source: Iterator[Step] = iter(())
        self._taken: deque[Step] = deque()

    def __getstate__(self) -> dict[str, Any]:
        """Fed with nothing: a loader can be sent to another process."""
        return vars(FedSteps())

    def feed(self, source: Iterator[Step]) -> Iterator[Step]:
        """Yield `source`'s indices from now on. Returns the same steps in the order they were taken."""
        self._source, self._taken = source, deque()
        taken = self._taken
        return iter(taken.popleft, None)

    def __iter__(self) -> Iterator[Any]:
        taken = self._taken
        for step in self._source:
            taken.append(step)
            yield step.indices


def refuse_fork(context: Any) -> None:
    """Raise UsageError where worker processes would be forked once MPI has started; if asked for by name, or CUDA."""
    method = torch.multiprocessing.get_start_method() if context is None else context.get_start_method()
    if method != "fork":
        return
    cuda_has_started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    started = "MPI" if mpi_connects_ranks() else "CUDA" if context is not None and cuda_has_started else None
    if started is not None:
        raise UsageError(
            f"worker processes cannot be forked once {started} has started: give multiprocessing_context='forkserver' or "
            "'spawn', or leave it out where the data set is map-style, which threads then load"
        )
