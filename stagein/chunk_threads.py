"""What the helper threads of a rank do: read and write chunks in a fixed set of buffers, with the lock of Python released."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from stagein.formats.errors import StageinError
from stagein.formats.huge_pages import huge_pages

from .chunk_io import ChunkReader, ChunkWriter
from .stage_plan import MINIMUM_BUFFERS, ChunkTable

READER_THREADS = 4
"""Reads under way at once: a parallel file system serves one client from several servers."""

_THREADS = {"read": READER_THREADS, "write": 2}

Task: TypeAlias = Literal["read", "write"]


class Buffers:
    """Page-aligned buffers of one chunk each, and who still uses them. Only the main thread takes and releases.

    Few are in circulation at first: memory that is used again and again stays in the caches, and fresh memory costs page faults.
    """

    def __init__(self, number: int, buffer_bytes: int) -> None:
        self._memory = huge_pages(max(1, number * buffer_bytes))
        self._views = memoryview(self._memory)
        self._buffer_bytes = buffer_bytes
        self._free = list(range(number))  # the one freed last is taken first: it may still be in a CPU cache
        self._uses = [0] * number
        self.circulating = min(number, MINIMUM_BUFFERS)
        """How many may be used at once."""

    @property
    def free(self) -> int:
        return self.circulating - len(self._uses) + len(self._free)

    def circulate_more(self) -> None:
        """Let one more be used at once, if there is one."""
        self.circulating = min(self.circulating + 1, len(self._uses))

    def take(self) -> int:
        """A free buffer, with one use."""
        buffer = self._free.pop()
        self._uses[buffer] = 1
        return buffer

    def use_again(self, buffer: int) -> None:
        """One more user: it is sent and written at the same time."""
        self._uses[buffer] += 1

    def release(self, buffer: int) -> None:
        """One user less; the last one frees the buffer."""
        self._uses[buffer] -= 1
        if self._uses[buffer] == 0:
            self._free.append(buffer)

    def view(self, buffer: int, nbytes: int | None = None) -> memoryview:
        start = buffer * self._buffer_bytes
        return self._views[start : start + (self._buffer_bytes if nbytes is None else nbytes)]


@dataclass(frozen=True)
class Done:
    """A helper thread's word to the main thread; neither finished nor an error: left undone, as the transfer is stopping."""

    task: Task
    chunk: int
    buffer: int
    error: StageinError | None
    finished: bool


class BusyClock:
    """For how long at least one thing of a kind was under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0
        self.seconds = 0.0

    def start(self) -> None:
        with self._lock:
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way += 1

    def stop(self) -> None:
        with self._lock:
            self._under_way -= 1
            if not self._under_way:
                self.seconds += time.monotonic() - self._since


class ChunkThreads:
    """Threads that read and write chunks, and what they have to say about it."""

    def __init__(self, reader: ChunkReader, writer: ChunkWriter, buffers: Buffers, table: ChunkTable) -> None:
        self._reader, self._writer, self._buffers, self._table = reader, writer, buffers, table
        self._actions: dict[Task, Callable[[int, memoryview], None]] = {
            "read": reader.read,
            "write": writer.write,
        }
        self._waiting: dict[Task, queue.SimpleQueue[tuple[int, int] | None]] = {
            task: queue.SimpleQueue() for task in self._actions
        }
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self.busy: dict[Task, BusyClock] = {task: BusyClock() for task in self._actions}
        self.stopping = False
        """Set when the transfer has failed: what is still queued is handed back undone."""
        self.outstanding = 0
        """Tasks whose results have not been taken yet."""
        self._threads = [
            threading.Thread(target=self._work, args=(task,), daemon=True)
            for task in self._actions
            for _ in range(_THREADS[task])
        ]
        for thread in self._threads:
            thread.start()

    def start(self, task: Task, chunk: int, buffer: int) -> None:
        """Have this done with the chunk in this buffer; `next_done` tells when it is."""
        self.outstanding += 1
        self._waiting[task].put((chunk, buffer))

    def finish(self) -> None:
        """End the threads; nothing is outstanding any more."""
        for task, number in _THREADS.items():
            for _ in range(number):
                self._waiting[task].put(None)  # type: ignore[index]
        for thread in self._threads:
            thread.join()

    def next_done(self, wait_seconds: float) -> Done | None:
        """The oldest result, None when there is none within `wait_seconds`."""
        try:
            done = self._done.get(timeout=wait_seconds) if wait_seconds else self._done.get_nowait()
        except queue.Empty:
            return None
        self.outstanding -= 1
        return done

    def _work(self, task: Task) -> None:
        while (item := self._waiting[task].get()) is not None:
            self._done.put(self._do(task, *item))
        self._reader.close()
        self._writer.close()

    def _do(self, task: Task, chunk: int, buffer: int) -> Done:
        if self.stopping:
            return Done(task, chunk, buffer, None, finished=False)
        self.busy[task].start()
        try:
            self._actions[task](chunk, self._buffers.view(buffer, int(self._table.nbytes[chunk])))
            return Done(task, chunk, buffer, None, finished=True)
        except StageinError as problem:
            error = problem
        except Exception as problem:  # a bug here must end the job, not hang it
            error = StageinError(f"the {task} of chunk {chunk} failed: {type(problem).__name__}: {problem}")
            error.__cause__ = problem
        finally:
            self.busy[task].stop()
        return Done(task, chunk, buffer, error, finished=False)
