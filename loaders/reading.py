"""Reading ahead: a few threads work on the next tasks while the caller uses the results, which come in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class TaskTimeoutError(Exception):
    """No result within the limit; `task` is the one that was waited for."""

    def __init__(self, task: object) -> None:
        super().__init__(task)
        self.task = task


class ReadAhead(Generic[Task, Result]):
    """An iterator over `work(task)` for every task, in order, computed ahead by threads, or in the caller when there are none.

    num_threads  threads that work; 0: none, `work` runs in the caller's thread.
    num_ahead    tasks handed out at a time.
    timeout_s    seconds to wait for a result (0: for ever), then TaskTimeoutError is raised; it needs threads.

    An exception of `work` is raised when its result is due. Tasks are taken in the caller's thread. After `close()`, or
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
    ) -> None:
        self._tasks = tasks
        self._work = work
        self._num_ahead = max(1, num_ahead)
        self._timeout_s = timeout_s or None
        self.is_hanging = False
        """Whether a thread did not come back within the limit: it may never do so."""
        self._queue: SimpleQueue[tuple[Future[Result], Task] | None] = SimpleQueue()
        self._pending: deque[tuple[Future[Result], Task]] = deque()
        self._threads = [
            threading.Thread(
                target=_work_until_told, args=(self._queue, work), name=f"stagein-reader-{number}", daemon=True
            )
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_ready(self) -> int:
        """Results that wait for the caller."""
        return sum(future.done() for future, _ in self._pending)

    @property
    def next_is_ready(self) -> bool:
        """Whether the next result waits for the caller."""
        return bool(self._pending) and self._pending[0][0].done()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if not self._threads:
            return self._work(next(self._tasks))
        self._hand_out()
        if not self._pending:
            raise StopIteration
        future, task = self._pending.popleft()
        self._hand_out()
        if not wait([future], self._timeout_s).done:
            self.is_hanging = True
            raise TaskTimeoutError(task)
        return future.result()

    def close(self) -> None:
        """Forget what is not yet read and end the threads; wait for them, unless one hangs."""
        for future, _ in self._pending:
            future.cancel()
        self._pending.clear()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(0.0 if self.is_hanging else None)
        self._threads.clear()

    def _hand_out(self) -> None:
        while len(self._pending) < self._num_ahead:
            try:
                task = next(self._tasks)
            except StopIteration:
                return
            future: Future[Result] = Future()
            self._pending.append((future, task))
            self._queue.put((future, task))


def _work_until_told(queue: SimpleQueue[tuple[Future[Result], Task] | None], work: Callable[[Task], Result]) -> None:
    """Body of a thread; a plain function, so that a running thread does not keep its `ReadAhead` alive."""
    while (item := queue.get()) is not None:
        future, task = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(task))
            except BaseException as error:  # whatever it is, it belongs to the caller
                future.set_exception(error)
        del item, future, task  # or the last batch would live on until the next one comes
