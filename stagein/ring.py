"""The engine of stage-in: every chunk is read once, travels a ring of nodes, and is checked and written on each of them.

One rank of each node forms a ring; k ranks a node form k rings that share the chunks. A rank's main thread alone talks to MPI
and never blocks; helper threads read, hash and write with the interpreter lock released. Reads, sends and writes of
different chunks overlap, in a fixed set of buffers.

Why it cannot lock up, with buffers that do not grow with the number of nodes: the last node that gets a chunk tells its
right neighbour, which is the one that read it; and no rank has more chunks under way than half its buffers. So there is always
a free buffer somewhere on the ring, and the chunk to the left of it can move on.

How it ends: a rank sends an empty end message when it has nothing more to send. One that fails sends it early; its neighbour sees
that chunks are missing, does the same, and so the news goes round while no request is left open. Ranks outside that ring
hear of it by the *pulse*, a small allreduce that also tells when all are done and that every rank is alive.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from stagein.formats.errors import InterruptedRunError, StageinError, WatchdogError

from .chunk_io import ChunkReader, ChunkWriter
from .stage_plan import Chunks, ChunkTable, Flags, RankWork

if TYPE_CHECKING:
    from mpi4py import MPI

MINIMUM_BUFFERS = 4
MAXIMUM_BUFFERS = 64
READER_THREADS = 4
WRITER_THREADS = 2

_MOST_POSTED_RECEIVES = 4
_MOST_READS = 2 * READER_THREADS
_POLL_SECONDS = 100e-6
_POLL_SECONDS_ALONE = 0.2
"""How long a rank sleeps, unless a helper thread has news, before it looks at MPI and at signals again."""
_PULSE_SECONDS = 0.05
_NEIGHBOUR_PATIENCE = 1.25
"""A rank waits this much longer for a neighbour than for its own disks, so that the rank next to the trouble names it."""

Task: TypeAlias = Literal["read", "write"]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that this rank has finished and those it has to finish."""


@dataclass
class Transfer:
    """What one rank moved. `verified_chunks` counts every check of a chunk against its sum; times add up over helper threads."""

    read_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    written_bytes: int = 0
    verified_chunks: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0


class Buffers:
    """A fixed set of page-aligned buffers of one chunk each, and who still uses them. Only the main thread takes and releases."""

    def __init__(self, number: int, buffer_bytes: int) -> None:
        self._memory = mmap.mmap(-1, max(1, number * buffer_bytes))
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._views = memoryview(self._memory)
        self._buffer_bytes = buffer_bytes
        self._free = list(range(number))  # the one freed last is taken first: it may still be in a CPU cache
        self._uses = [0] * number

    @property
    def free(self) -> int:
        return len(self._free)

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
    seconds: float
    error: StageinError | None
    finished: bool


class Helpers:
    """Threads that read and write chunks, and what they have to say about it."""

    def __init__(self, reader: ChunkReader, writer: ChunkWriter, buffers: Buffers, table: ChunkTable) -> None:
        self._reader, self._writer, self._buffers, self._table = reader, writer, buffers, table
        self._reads: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._writes: queue.SimpleQueue[tuple[int, int, bool] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self.stopping = False
        """Set when the transfer has failed: what is still queued is handed back undone."""
        self.outstanding = 0
        """Tasks whose results have not been taken yet."""
        jobs = [self._read_all] * READER_THREADS + [self._write_all] * WRITER_THREADS
        self._threads = [threading.Thread(target=job, daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()

    def read(self, chunk: int, buffer: int) -> None:
        self.outstanding += 1
        self._reads.put((chunk, buffer))

    def write(self, chunk: int, buffer: int, arrived: bool) -> None:
        self.outstanding += 1
        self._writes.put((chunk, buffer, arrived))

    def finish(self) -> None:
        """End the threads; nothing is outstanding any more."""
        for _ in range(READER_THREADS):
            self._reads.put(None)
        for _ in range(WRITER_THREADS):
            self._writes.put(None)
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

    def _read_all(self) -> None:
        while (task := self._reads.get()) is not None:
            self._do("read", *task, self._reader.read)
        self._reader.close()

    def _write_all(self) -> None:
        while (task := self._writes.get()) is not None:
            chunk, buffer, arrived = task
            self._do("write", chunk, buffer, partial(self._writer.write, arrived=arrived))
        self._writer.close()

    def _do(self, task: Task, chunk: int, buffer: int, action: Callable[[int, memoryview], None]) -> None:
        start, error, skipped = time.monotonic(), None, self.stopping
        if not skipped:
            try:
                action(chunk, self._buffers.view(buffer, int(self._table.nbytes[chunk])))
            except StageinError as problem:
                error = problem
            except Exception as problem:  # a bug here must end the job, not hang it
                error = StageinError(f"the {task} of chunk {chunk} failed: {type(problem).__name__}: {problem}")
                error.__cause__ = problem
        self._done.put(
            Done(task, chunk, buffer, time.monotonic() - start, error, finished=not skipped and error is None)
        )


@dataclass(frozen=True)
class Arrival:
    """A message from the left, in buffer number `buffer`."""

    kind: Literal["chunk", "been everywhere", "end"]
    buffer: int
    chunk: int = -1
    origin: int = -1


@dataclass(frozen=True)
class Sent:
    """What a finished send was: bytes of a chunk in a buffer, or a mere word without one."""

    nbytes: int = 0
    buffer: int | None = None


class Neighbours:
    """The MPI side of one rank of a ring: messages come from the left and go to the right, in order.

    A message's tag is the node that read the chunk. As messages of one sender do not overtake each other, the tag and the plan
    say which chunk it is. An empty message with this node's own number says that one of its chunks has been everywhere; the
    last message has the tag `nodes`.
    """

    def __init__(self, mpi: MPI.Comm, ring: Sequence[int], node: int, by_origin: Sequence[Chunks]) -> None:
        from mpi4py import MPI

        self._mpi, self._MPI = mpi, MPI
        self.node, self.nodes = node, len(ring)
        self.left_rank, self.right_rank = ring[node - 1], ring[(node + 1) % len(ring)]
        self._coming = [iter(chunks.tolist()) for chunks in by_origin]
        self.to_receive = sum(map(len, by_origin))
        """Chunks of others that have not arrived, and own chunks that have not been everywhere."""
        self.receives: deque[tuple[MPI.Request, int]] = deque()
        self._sends: deque[tuple[MPI.Request, Sent]] = deque()
        self.left_ended = False
        self.end_sent = False

    def post_receive(self, buffer: int, view: memoryview) -> None:
        """Have the next message stored in `view`, that of buffer number `buffer`."""
        request = self._mpi.Irecv([view, self._MPI.BYTE], source=self.left_rank, tag=self._MPI.ANY_TAG)
        self.receives.append((request, buffer))

    def next_arrival(self) -> Arrival | None:
        """The oldest message from the left, if it is here."""
        if not self.receives:
            return None
        status = self._MPI.Status()
        request, buffer = self.receives[0]
        if not request.Test(status):
            return None
        self.receives.popleft()
        origin = status.Get_tag()
        if origin == self.nodes:
            self.left_ended = True
            return Arrival("end", buffer)
        self.to_receive -= 1
        chunk = next(self._coming[origin])
        return Arrival("been everywhere" if origin == self.node else "chunk", buffer, chunk, origin)

    def send_chunk(self, view: memoryview, origin: int, sent: Sent) -> None:
        """Send a chunk to the right; `next_sent` returns `sent` when the buffer is no longer needed for that."""
        self._send(view, origin, sent)

    def send_been_everywhere(self) -> None:
        """Tell the right neighbour that a chunk it has read has arrived here, its last place."""
        self._send(b"", (self.node + 1) % self.nodes, Sent())

    def send_end(self) -> None:
        """Tell the right neighbour that nothing more comes."""
        self._send(b"", self.nodes, Sent())
        self.end_sent = True

    def _send(self, content: memoryview | bytes, tag: int, sent: Sent) -> None:
        self._sends.append((self._mpi.Isend([content, self._MPI.BYTE], dest=self.right_rank, tag=tag), sent))

    def next_sent(self) -> Sent | None:
        """The oldest send, if it is complete."""
        if not self._sends or not self._sends[0][0].Test():
            return None
        return self._sends.popleft()[1]

    def cancel_receives(self) -> list[int]:
        """Take back the receives that wait for nothing any more, and return their buffers."""
        buffers = []
        while self.receives:
            request, buffer = self.receives.popleft()
            request.Cancel()
            request.Wait()
            buffers.append(buffer)
        return buffers

    @property
    def closed(self) -> bool:
        """Nothing more comes from the left or goes to the right, and no request is open."""
        return self.left_ended and self.end_sent and not self._sends


class Pulse:
    """A small allreduce, over and over: are all ranks done, has one failed, does each one still answer?"""

    def __init__(self, mpi: MPI.Comm) -> None:
        from mpi4py import MPI

        self._mpi, self._MPI = mpi, MPI
        self._request: MPI.Request | None = None
        self._mine = np.zeros(2, dtype=np.int64)
        self._all = np.zeros(2, dtype=np.int64)
        self._started = self._answered = time.monotonic()
        self.all_done = False
        self.any_failed = False

    def beat(self, done: bool, failed: bool) -> None:
        """Call often. Sets `any_failed` soon after a rank fails, and `all_done` on every rank after the same beat."""
        now = time.monotonic()
        if self._request is None:
            if self.all_done or (now - self._started < _PULSE_SECONDS and not done):
                return
            self._mine[:] = not done, failed
            self._request, self._started = self._mpi.Iallreduce(self._mine, self._all, op=self._MPI.SUM), now
        if self._request.Test():
            self._request, self._answered = None, now
            self.any_failed = bool(self._all[1])
            self.all_done = not self._all[0]

    def silent_seconds(self) -> float:
        """How long the ranks have not answered together."""
        return time.monotonic() - self._answered


class Engine:
    """Moves the chunks of one rank's work. Use it once."""

    def __init__(
        self,
        work: RankWork,
        table: ChunkTable,
        wanted: Flags,
        reader: ChunkReader,
        writer: ChunkWriter,
        *,
        memory_bytes: int,
        timeout_seconds: float,
        stop_requested: Callable[[], bool],
        progress: Progress | None,
        neighbours: Neighbours | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        """`wanted` flags the chunks that this node does not have yet and therefore writes."""
        self._table, self._wanted = table, wanted
        self._neighbours, self._pulse = neighbours, pulse
        self._timeout_seconds, self._stop_requested, self._progress = timeout_seconds, stop_requested, progress
        traveling = work.by_origin[neighbours.node] if neighbours else np.zeros(0, np.int64)
        self._own, self._local = deque(traveling.tolist()), deque(work.local.tolist())
        passing = [*work.by_origin, work.local]
        self._to_finish_bytes = sum(table.total_bytes(chunks) for chunks in passing)
        self._finished_bytes = self._reported_bytes = 0
        buffer_bytes = max((int(table.nbytes[chunks].max()) for chunks in passing if len(chunks)), default=1)
        number = max(
            MINIMUM_BUFFERS, min(memory_bytes // buffer_bytes, MAXIMUM_BUFFERS, 2 * sum(map(len, passing)) + 2)
        )
        self._buffers = Buffers(number, buffer_bytes)
        self._most_under_way = number // 2
        self._most_receives = min(_MOST_POSTED_RECEIVES, number // 2)
        self._under_way = 0
        """Chunks that this rank reads, or has read, for the ring and that have not been everywhere."""
        self._reading: dict[int, bool] = {}  # chunks being read: do they travel?
        self._turns = deque(traveling.tolist())  # own chunks that have not been sent
        self._to_send: dict[int, int] = {}  # those of them that are in a buffer, before their turn
        self._helpers = Helpers(reader, writer, self._buffers, table)
        self._failure: StageinError | None = None
        self._failed = False
        self._poll_seconds = _POLL_SECONDS_ALONE if pulse is None else _POLL_SECONDS
        self._last_progress = time.monotonic()
        self.transfer = Transfer()

    def run(self) -> Transfer:
        """Move everything. Raises the error of this rank; when another rank failed, returns early and leaves it to
        `Communicator.together` to say so. Raises WatchdogError when nothing has moved for `timeout_seconds`."""
        wait_seconds = 0.0
        while not self._finished():
            moved = self._handle_done(wait_seconds) + self._handle_arrivals() + self._handle_sent()
            self._post_receives()
            moved += self._start_reads()
            self._end_stream()
            if self._stop_requested() and not self._failed:
                self._fail(
                    InterruptedRunError("stage-in was stopped by a signal: run the same command again to resume it")
                )
            if moved:
                self._last_progress = time.monotonic()
                self._report_progress()
            else:
                self._watch()
            wait_seconds = 0.0 if moved else self._poll_seconds
        self._helpers.finish()
        if self._failure is not None:
            raise self._failure
        return self.transfer

    def _report_progress(self) -> None:
        if self._progress is None or self._failed or self._finished_bytes == self._reported_bytes:
            return
        self._reported_bytes = self._finished_bytes
        try:
            self._progress(self._finished_bytes, self._to_finish_bytes)
        except Exception as problem:  # the caller's mistake must not leave the other ranks waiting
            self._fail(StageinError(f"the progress callback failed: {type(problem).__name__}: {problem}"))

    def _finished(self) -> bool:
        """Whether this rank may go; with other ranks, only when all of them are done."""
        neighbours, pulse = self._neighbours, self._pulse
        idle = not self._helpers.outstanding and (neighbours is None or neighbours.closed)
        done = idle and (self._failed or not (self._own or self._local))
        if pulse is None:
            return done
        pulse.beat(done, self._failed)
        if pulse.any_failed and not self._failed:
            self._fail(None)
        return pulse.all_done

    def _fail(self, error: StageinError | None) -> None:
        """Stop reading, hand on nothing more. `error` is this rank's own, None when it only learned of another's."""
        self._failed = True
        self._failure = self._failure or error
        self._helpers.stopping = True
        self._own.clear()
        self._local.clear()
        self._turns.clear()
        for buffer in self._to_send.values():
            self._buffers.release(buffer)
        self._to_send.clear()

    def _handle_done(self, wait_seconds: float) -> int:
        """Take over what the helper threads have finished; wait for the first of it."""
        handled = 0
        while (done := self._helpers.next_done(0.0 if handled else wait_seconds)) is not None:
            handled += 1
            if done.error is not None:
                self._fail(done.error)
            if done.task == "read":
                self._after_read(done)
            else:
                self._after_write(done)
            self._buffers.release(done.buffer)
        return handled

    def _after_read(self, done: Done) -> None:
        travels = self._reading.pop(done.chunk)
        if done.finished:
            self.transfer.read_bytes += int(self._table.nbytes[done.chunk])
            self.transfer.read_seconds += done.seconds
            self.transfer.verified_chunks += 1
        if not self._failed:
            if travels:
                self._send_in_turn(done.chunk, done.buffer)
            self._keep(done.chunk, done.buffer, arrived=False)

    def _send_in_turn(self, chunk: int, buffer: int) -> None:
        """Send own chunks in the order of the plan, by which the others know them; reads may finish in another order."""
        assert self._neighbours is not None
        self._buffers.use_again(buffer)
        self._to_send[chunk] = buffer
        while self._turns and self._turns[0] in self._to_send:
            chunk = self._turns.popleft()
            buffer = self._to_send.pop(chunk)
            self._pass_on(chunk, buffer, self._neighbours.node)
            self._buffers.release(buffer)

    def _after_write(self, done: Done) -> None:
        if done.finished:
            nbytes = int(self._table.nbytes[done.chunk])
            self.transfer.written_bytes += nbytes
            self.transfer.write_seconds += done.seconds
            self._finished_bytes += nbytes

    def _keep(self, chunk: int, buffer: int, arrived: bool) -> None:
        """Have the chunk written if this node misses it."""
        if self._wanted[chunk]:
            self._buffers.use_again(buffer)
            self.transfer.verified_chunks += arrived
            self._helpers.write(chunk, buffer, arrived)
        else:
            self._finished_bytes += int(self._table.nbytes[chunk])

    def _pass_on(self, chunk: int, buffer: int, origin: int) -> None:
        assert self._neighbours is not None
        self._buffers.use_again(buffer)
        nbytes = int(self._table.nbytes[chunk])
        self._neighbours.send_chunk(self._buffers.view(buffer, nbytes), origin, Sent(nbytes, buffer))

    def _handle_arrivals(self) -> int:
        handled = 0
        while self._neighbours is not None and (arrival := self._neighbours.next_arrival()) is not None:
            handled += 1
            if arrival.kind == "chunk":
                self._after_arrival(arrival, self._neighbours)
            elif arrival.kind == "been everywhere":
                self._under_way -= 1
            else:
                self._after_end(self._neighbours)
            self._buffers.release(arrival.buffer)
        return handled

    def _after_arrival(self, arrival: Arrival, neighbours: Neighbours) -> None:
        """Pass the chunk on, unless it has been everywhere, and have it checked and written."""
        self.transfer.received_bytes += int(self._table.nbytes[arrival.chunk])
        if self._failed:
            return
        if arrival.origin == (neighbours.node + 1) % neighbours.nodes:
            neighbours.send_been_everywhere()
        else:
            self._pass_on(arrival.chunk, arrival.buffer, arrival.origin)
        self._keep(arrival.chunk, arrival.buffer, arrived=True)

    def _after_end(self, neighbours: Neighbours) -> None:
        """The left neighbour is done, or has failed when something is missing."""
        if neighbours.to_receive:
            self._fail(None)
        for buffer in neighbours.cancel_receives():
            self._buffers.release(buffer)

    def _handle_sent(self) -> int:
        handled = 0
        while self._neighbours is not None and (sent := self._neighbours.next_sent()) is not None:
            handled += 1
            if sent.buffer is not None:
                self.transfer.sent_bytes += sent.nbytes
                self._buffers.release(sent.buffer)
        return handled

    def _post_receives(self) -> None:
        """Keep a few buffers ready for what comes from the left, its end message included."""
        neighbours = self._neighbours
        if neighbours is None or neighbours.left_ended:
            return
        while len(neighbours.receives) < min(self._most_receives, neighbours.to_receive + 1) and self._buffers.free:
            buffer = self._buffers.take()
            neighbours.post_receive(buffer, self._buffers.view(buffer))

    def _start_reads(self) -> int:
        """Give the reader threads enough to do, and no more: a chunk that waits to be read would hold a buffer.

        Chunks that travel come first, as other nodes wait for them.
        """
        started = 0
        while self._buffers.free and len(self._reading) < _MOST_READS:
            if self._own and self._under_way < self._most_under_way:
                self._under_way += 1
                self._read(self._own.popleft(), travels=True)
            elif self._local and not self._own:
                self._read(self._local.popleft(), travels=False)
            else:
                break
            started += 1
        return started

    def _read(self, chunk: int, travels: bool) -> None:
        self._reading[chunk] = travels
        self._helpers.read(chunk, self._buffers.take())

    def _end_stream(self) -> None:
        """Tell the right neighbour that nothing more comes, once that is so."""
        neighbours = self._neighbours
        if neighbours is None or neighbours.end_sent:
            return
        nothing_to_pass_on = neighbours.to_receive == 0 and not self._turns
        if self._failed or nothing_to_pass_on:
            neighbours.send_end()

    def _watch(self) -> None:
        """Raise WatchdogError when nothing has moved for too long, naming what this rank waits for."""
        still_seconds = time.monotonic() - self._last_progress
        waits_for_others = self._helpers.outstanding == 0
        if self._pulse is not None and waits_for_others and (self._neighbours is None or self._neighbours.closed):
            still_seconds = self._pulse.silent_seconds()
        if still_seconds > self._timeout_seconds * (_NEIGHBOUR_PATIENCE if waits_for_others else 1):
            raise WatchdogError(
                f"nothing has moved for {still_seconds:.0f} s: waiting for {self._waited_for()}; look at that place, then run "
                "the same command again to resume"
            )

    def _waited_for(self) -> str:
        if self._reading and self._helpers.outstanding:
            return f"the source to deliver {self._table.place(next(iter(self._reading)))}"
        if self._helpers.outstanding:
            return "the local disk to take a chunk"
        if self._neighbours is not None and not self._neighbours.left_ended:
            return f"the next chunk from rank {self._neighbours.left_rank}"
        if self._neighbours is not None and not self._neighbours.closed:
            return f"rank {self._neighbours.right_rank} to take a chunk"
        return "the other ranks to answer"
