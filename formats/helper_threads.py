"""Threads that do a share of their caller's work, and wait for the next: to start one takes longer than to decode a record."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from .forks import renew_in_forks

_END_SECONDS = 10

Result = TypeVar("Result")
_Tasks: TypeAlias = "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]"


class HelperThreads:
    """As many threads as were ever asked for; they end with `close()`, or with the last reference to this.

    Daemons: one that hangs in a dead file system keeps nobody from exiting. Safe to use from many threads.
    """

    def __init__(self) -> None:
        self.renew()
        renew_in_forks(self)

    def renew(self) -> None:
        """Have no threads: they start when they are needed."""
        self._tasks: _Tasks = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()

    def run(self, work: Callable[[], Result], threads: int) -> list[Result]:
        """`work()` in the caller's thread and in `threads - 1` others at the same time: the results, of one at least.

        Threads that have not begun when the caller is done are not waited for, so `work` takes what there is to do piece by
        piece. Raises what it raises, when no thread is at it any more.
        """
        futures = self.begin(work, threads - 1)
        try:
            results = [work()]
        finally:
            begun = [future for future in futures if not future.cancel()]
            wait(begun)
        return results + [future.result() for future in begun]

    def begin(self, work: Callable[[], Result], threads: int) -> "list[Future[Result]]":
        """Have `work()` done in so many threads, each as soon as it is idle: perhaps when the caller has long gone on."""
        self._start(threads)
        futures: list[Future[Result]] = [Future() for _ in range(threads)]
        for future in futures:
            self._tasks.put((future, work))
        return futures

    def close(self) -> None:
        """End the threads, and wait until they have."""
        threads = self._tell_to_end()
        for thread in threads:
            thread.join(_END_SECONDS)

    def __del__(self) -> None:
        self._tell_to_end()  # not waited for: this may be one of them

    def _tell_to_end(self) -> list[threading.Thread]:
        with self._starting:
            threads, self._threads = self._threads, []
        for _ in threads:
            self._tasks.put(None)
        return threads

    def _start(self, count: int) -> None:
        if len(self._threads) >= count:
            return
        with self._starting:
            while len(self._threads) < count:
                name = f"stagein-helper-{len(self._threads)}"
                thread = threading.Thread(target=_work_until_told, args=(self._tasks,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)


def _work_until_told(tasks: _Tasks) -> None:
    """Body of a thread; a plain function, so that a running thread does not keep its `HelperThreads` alive."""
    while (task := tasks.get()) is not None:
        future, work = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:  # whatever it is, it belongs to the caller
                future.set_exception(error)
        del task, future, work  # or arrays of the caller would live on until the next task comes
