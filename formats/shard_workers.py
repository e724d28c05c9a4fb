"""Processes that make shards: started clean, ended with the process that started them, however that ends."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from . import worker_server
from .errors import StageinError
from .payload import ShardBuffers
from .shard_tasks import ShardResult, ShardTask, make_shard


class ShardExecutor(Protocol):
    """Who makes the shards of a conversion."""

    @property
    def capacity(self) -> int:
        """Tasks that it takes at a time, those that wait for their turn included."""

    def submit(self, task: ShardTask) -> Future[ShardResult]:
        """Have a shard made, soon. A StageinError or an OSError of the making is the future's."""


class InProcess:
    """Makes shards in this process, each when it is submitted."""

    capacity = 1

    def __init__(self) -> None:
        self._buffers: ShardBuffers = {}

    def submit(self, task: ShardTask) -> Future[ShardResult]:
        future: Future[ShardResult] = Future()
        try:
            future.set_result(make_shard(task, self._buffers))
        except (StageinError, OSError) as error:
            future.set_exception(error)
        return future


class ShardWorkers:
    """Makes shards in several processes; they end when this one does, or at the end of the `with` block."""

    def __init__(self, workers: int) -> None:
        self.capacity = 2 * workers  # so that the next task is there when one is finished
        self._pool = ProcessPoolExecutor(workers, mp_context=worker_server.worker_context(), initializer=_start_worker)

    def submit(self, task: ShardTask) -> Future[ShardResult]:
        try:
            with _signals_later():  # the first task starts the processes: one that is half started could not be ended
                worker_server.start()
                return self._pool.submit(_make_shard_in_worker, task)
        except (BrokenProcessPool, EOFError, OSError):  # the latter when the process that starts them was killed
            raise worker_lost() from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=error is not None)

    def close(self, *, at_once: bool) -> None:
        """End the processes: when they are idle, or at once, whatever they are at."""
        if not at_once:
            self._pool.shutdown()
            return
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


@contextmanager
def _signals_later() -> Iterator[None]:
    """Inside, in the main thread, SIGTERM and SIGINT wait for the end of the block, where their handlers are called."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for signalled in came:
        signal.raise_signal(signalled)


def result_of(future: Future[ShardResult]) -> ShardResult:
    """The result of a future that is done. Raises what the making raised, and StageinError when its process was killed."""
    try:
        return future.result(timeout=0)
    except BrokenProcessPool:
        raise worker_lost() from None


def worker_lost() -> StageinError:
    """The error for a process that ended without a word."""
    return StageinError("a worker process was killed (out of memory?): run the same command again, it resumes")


_worker_buffers: ShardBuffers = {}
"""The memory of a worker process, kept from shard to shard."""


def _start_worker() -> None:
    multiprocessing.set_start_method(
        "fork", force=True
    )  # its locks (numcodecs makes one) leave no names when it is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _make_shard_in_worker(task: ShardTask) -> ShardResult:
    return make_shard(task, _worker_buffers)
