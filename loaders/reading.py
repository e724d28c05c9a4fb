"""Reading ahead: a few threads work on the next tasks while the caller uses the results, which come in order."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeAlias, TypeVar

from stagein.formats.errors import UsageError

Task = TypeVar("Task")
Result = TypeVar("Result")
_Outcome: TypeAlias = SimpleQueue[tuple[Result | None, BaseException | None]]
"""Where the result of a task, or its exception, comes to. A Future does the same in a hundred lines of Python, which are not in the caches
when a batch is done, and hold up whoever waits for the GIL."""


class TaskTimeoutError(Exception):
    """No result within the limit; `task` is the one that was waited for."""

    def __init__(self, task: object) -> None:
        super().__init__(task)
        self.task = task


def join_others(threads: Iterable[threading.Thread], timeout_s: float | None = None) -> None:
    """Wait for the end of threads, so long for all, but not for the one that this is called in: a collector of garbage may run in any."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(None if until is None else max(0.0, until - time.monotonic()))


def refuse_in_forks(process: int) -> None:
    """Raise UsageError in any other process than this one, whose threads it has not: it would wait for them for ever."""
    if os.getpid() != process:
        raise UsageError(
            "this iterator belongs to the process that this one was forked of: begin one here with iter(loader)"
        )


class ReadAhead(Generic[Task, Result]):
    """An iterator over `work(task)` for every task, in order, computed ahead by threads, or in the caller when there are none.

    num_threads  threads that work; 0: none, `work` runs in the caller's thread.
    num_ahead    tasks that are handed out before their results are taken, at most.
    timeout_s    seconds to wait for a result (0: for ever), then TaskTimeoutError is raised; it needs threads.
    begin        called first in each thread, with its number; the error that it returns, if any, is raised for every task.

    Tasks are taken in the caller's thread, several in a row: what makes them stays in the caches meanwhile. New ones are
    handed out once half of those ahead are taken, or sooner, so that every thread has one.

    An exception of `work` is raised when its result is due. After `close()`, or
    when the iterator is dropped, the threads end as soon as their current task does. They are daemons: a read that
    hangs in a dead file system does not keep the interpreter from exiting.
    """

    def __init__(
        self,
        tasks: Iterator[Task],
        work: Callable[[Task], Result],
        num_threads: int,
        num_ahead: int,
        timeout_s: float = 0,
        begin: Callable[[int], BaseException | None] | None = None,
    ) -> None:
        self._tasks = tasks
        self._work = work
        self._num_ahead = max(1, num_ahead)
        self._num_at_least = min(self._num_ahead - 1, max(num_threads, self._num_ahead // 2))
        """With more tasks than these handed out, no new ones are."""
        self._timeout_s = timeout_s or None
        self.is_hanging = False
        """Whether a thread did not come back within the limit: it may never do so."""
        self._queue: SimpleQueue[tuple[_Outcome[Result], Task] | None] = SimpleQueue()
        self._pending: deque[tuple[_Outcome[Result], Task]] = deque()
        self._threads = [
            threading.Thread(
                target=_work_until_told,
                args=(self._queue, work, begin, number),
                name=f"stagein-reader-{number}",
                daemon=True,
            )
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_ready(self) -> int:
        """Results that wait for the caller."""
        return sum(not outcome.empty() for outcome, _ in self._pending)

    @property
    def next_is_ready(self) -> bool:
        """Whether the next result waits for the caller."""
        return bool(self._pending) and not self._pending[0][0].empty()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if not self._threads:
            return self._work(next(self._tasks))
        self._hand_out()
        if not self._pending:
            raise StopIteration
        outcome, task = self._pending.popleft()
        self._hand_out()
        try:
            result, error = outcome.get(timeout=self._timeout_s)
        except Empty:
            self.is_hanging = True
            raise TaskTimeoutError(task) from None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or its traceback would hold this frame, which holds it
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Forget what is not yet read and end the threads; wait for them, unless one hangs."""
        self._pending.clear()
        if not self._threads:
            return  # closed before: what is queued tells a thread that hangs to end
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            self._queue.put(None)
        join_others(self._threads, 0.0 if self.is_hanging else None)
        self._threads.clear()

    def _hand_out(self) -> None:
        if len(self._pending) > self._num_at_least:
            return
        while len(self._pending) < self._num_ahead:
            try:
                task = next(self._tasks)
            except StopIteration:
                return
            outcome: _Outcome[Result] = SimpleQueue()
            self._pending.append((outcome, task))
            self._queue.put((outcome, task))


def _work_until_told(
    queue: SimpleQueue[tuple[_Outcome[Result], Task] | None],
    work: Callable[[Task], Result],
    begin: Callable[[int], BaseException | None] | None,
    number: int,
) -> None:
    """Body of a thread; a plain function, so that a running thread does not keep its `ReadAhead` alive."""
    failure = None if begin is None else begin(number)
    while (item := queue.get()) is not None:
        outcome, task = item
        try:
            if failure is not None:
                raise failure
            outcome.put((work(task), None))
        except BaseException as error:  # whatever it is, it belongs to the caller
            outcome.put((None, error))
        del item, outcome, task  # or the last batch would live on until the next one comes
