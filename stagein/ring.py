"""The engine of stage-in: every chunk is read once, travels a ring of nodes, and is checked and written on each of them.

One rank of each node forms a ring; k ranks a node form k rings that share the chunks. A rank's main thread alone talks to MPI
(`neighbours.py`), checks what arrives, and never blocks; helper threads (`chunk_threads.py`) read and write with the lock released.
Reads, sends and writes of different chunks overlap, in a fixed set of buffers.

A chunk is checked before it is passed on. One that was damaged on the way is read from the source instead, so that damage
costs one more read of that chunk and goes no further.

Why it cannot lock up, with buffers that do not grow with the number of nodes: the last node that gets a chunk tells the one
that read it; and no rank has more chunks under way than half the buffers that it uses. So there is always a free buffer
somewhere on the ring, and the chunk to the left of it can move on.

A file of the source that turns out bad costs the others nothing: an empty message takes the place of each of its chunks, so that all
bad files can be told at the end, and what is good is kept for the next run.

How it ends: a rank sends an empty end message when it has nothing more to send. One that fails sends it early; its neighbour sees
that chunks are missing, does the same, and so the news goes round while no request is left open. Ranks outside that ring
hear of it by the *pulse*, a small allreduce that also tells when all are done and that every rank is alive.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from stagein.formats.errors import ChecksumError, InterruptedRunError, SourceError, StageinError, WatchdogError

from .chunk_io import ChunkReader, ChunkWriter
from .chunk_threads import READER_THREADS, Buffers, ChunkThreads, Done
from .neighbours import Arrival, Neighbours, Pulse, Sent
from .stage_plan import BLOCK_BYTES, ChunkTable, Flags, RankWork, buffers_within

_MOST_POSTED_RECEIVES = 4
_LOOK_SECONDS = 5e-3
_HELD_BACK_SHARE = 0.25
"""A rank that had too few buffers for so much of the time, while its disk had nothing to do, gets another one."""
_MOST_DAMAGED_CHUNKS = 64
"""A rank that gets more of them gives up: a network or memory that bad should be taken out of the job."""
_MOST_BAD_FILES = 20
"""A rank that meets more of them gives up: the source is away, and every try to read takes its time."""

_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 50e-6, 1e-3
_POLL_SECONDS_ALONE = 0.2
"""How long a rank sleeps, unless a helper thread has news, before it looks at MPI and at signals again: the longer, the longer
nothing has moved. Every look takes a core from the threads that move bytes."""

_WARN_SECONDS = 15.0
"""When nothing has moved for so long, a rank says what it waits for, and goes on waiting."""

_NEIGHBOUR_PATIENCE = 1.25
"""A rank waits this much longer for a neighbour than for its own disks, so that the rank next to the trouble names it."""

_log = logging.getLogger("stagein")

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that this rank has finished and those it has to finish."""


@dataclass
class Transfer:
    """What one rank moved.

    `verified_chunks` counts every check of a chunk against its sum, `damaged_chunks` those that came damaged over the network
    and were read from the source instead. The seconds are those in which at least one read, send or write was under way.
    """

    read_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    written_bytes: int = 0
    verified_chunks: int = 0
    damaged_chunks: int = 0
    source_seconds: float = 0.0
    network_seconds: float = 0.0
    disk_seconds: float = 0.0


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
        self._work, self._table, self._wanted = work, table, wanted
        self._neighbours, self._pulse = neighbours, pulse
        self._timeout_seconds, self._stop_requested, self._progress = timeout_seconds, stop_requested, progress
        self._own, self._local = deque(work.traveling.tolist()), deque(work.local.tolist())
        passing = [*work.by_origin, work.local]
        self.to_finish_bytes = sum(table.total_bytes(chunks) for chunks in passing)
        """Bytes that will pass or reach this rank."""
        self._finished_bytes = self._reported_bytes = 0
        longest_bytes = max((int(table.nbytes[chunks].max()) for chunks in passing if len(chunks)), default=1)
        buffer_bytes = -(-longest_bytes // BLOCK_BYTES) * BLOCK_BYTES
        number = buffers_within(memory_bytes, buffer_bytes, sum(map(len, passing)))
        self._buffers = Buffers(number, buffer_bytes)
        self._under_way = 0
        """Chunks that this rank reads, or has read, for the ring and that have not been everywhere."""
        self._looks_since = self._last_turn = time.monotonic()
        self._is_held_back, self._held_back_seconds = False, 0.0
        """Whether more buffers would let this rank do more just now, and for how long they would have `_looks_since`."""
        self._reading: dict[int, bool] = {}  # chunks being read: do they travel?
        self._mending: dict[int, int] = {}  # chunks that came damaged, being read, and their origin
        self._turns: dict[int, deque[int]] = defaultdict(deque)  # chunks in the order in which they go on, by origin
        self._turns[work.position].extend(work.traveling.tolist())
        self._ready: dict[int, int] = {}  # those of them that are right, in a buffer, before their turn
        self._to_pass_on = len(work.traveling)  # how many chunks are in all turns
        self._reader = reader
        self._threads = ChunkThreads(reader, writer, self._buffers, table)
        self._lost: set[int] = set()  # chunks that could not be read, here or at their origin
        self.bad_files: dict[int, StageinError] = {}
        """Files of the source, by number, of which this rank could not read a chunk, and why."""
        self._failure: StageinError | None = None
        self._failed = False
        self._longest_poll_seconds = _POLL_SECONDS_ALONE if pulse is None else _LONGEST_POLL_SECONDS
        self._last_progress = time.monotonic()
        self._warned = False
        self.transfer = Transfer()

    def run(self) -> Transfer:
        """Move everything but what is in `bad_files`. Raises the error of this rank; when another rank failed, returns early and
        leaves it to `Communicator.together` to say so. Raises WatchdogError when nothing has moved for `timeout_seconds`."""
        wait_seconds = 0.0
        while not self._finished():
            moved = self._handle_done(wait_seconds) + self._handle_arrivals() + self._handle_sent()
            moved += self._handle_been_everywhere()
            self._post_receives()
            moved += self._start_reads()
            self._circulate_more()
            self._end_stream()
            if self._stop_requested() and not self._failed:
                self._fail(
                    InterruptedRunError("stage-in was stopped by a signal: run the same command again to resume it")
                )
            if moved:
                self._last_progress, self._warned = time.monotonic(), False
                self._report_progress()
            else:
                self._watch()
            wait_seconds = (
                0.0 if moved else min(max(2 * wait_seconds, _SHORTEST_POLL_SECONDS), self._longest_poll_seconds)
            )
        self._close()
        if self._failure is not None:
            raise self._failure
        return self.transfer

    def _close(self) -> None:
        self._threads.finish()
        self.transfer.source_seconds = self._threads.busy["read"].seconds
        self.transfer.disk_seconds = self._threads.busy["write"].seconds
        if self._neighbours is not None:
            self._neighbours.close()
            self.transfer.network_seconds = self._neighbours.sending.seconds

    def _report_progress(self) -> None:
        if self._progress is None or self._failed or self._finished_bytes == self._reported_bytes:
            return
        self._reported_bytes = self._finished_bytes
        try:
            self._progress(self._finished_bytes, self.to_finish_bytes)
        except Exception as problem:  # the caller's mistake must not leave the other ranks waiting
            self._fail(StageinError(f"the progress callback failed: {type(problem).__name__}: {problem}"))

    def _finished(self) -> bool:
        """Whether this rank may go; with other ranks, only when all of them are done."""
        neighbours, pulse = self._neighbours, self._pulse
        idle = not self._threads.outstanding and (neighbours is None or neighbours.closed)
        done = idle and (self._failed or not (self._own or self._local or self._under_way))
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
        self._threads.stopping = True
        self._own.clear()
        self._local.clear()
        self._turns.clear()
        self._to_pass_on = 0
        for buffer in self._ready.values():
            self._buffers.release(buffer)
        self._ready.clear()

    def _handle_done(self, wait_seconds: float) -> int:
        """Take over what the helper threads have finished; wait for the first of it."""
        handled = 0
        while (done := self._threads.next_done(0.0 if handled else wait_seconds)) is not None:
            handled += 1
            if done.task != "write" and isinstance(done.error, ChecksumError | SourceError):
                self._note_bad_file(done.chunk, done.error)
            elif done.error is not None:
                self._fail(done.error)
            if done.task == "write":
                self._after_write(done)
            elif done.chunk in self._mending:
                self._after_mending(done)
            else:
                self._after_read(done)
            self._buffers.release(done.buffer)
        return handled

    def _after_read(self, done: Done) -> None:
        travels = self._reading.pop(done.chunk)
        if done.finished:
            self.transfer.read_bytes += int(self._table.nbytes[done.chunk])
            self.transfer.verified_chunks += 1
        if not self._failed:
            if travels:
                self._pass_on_in_turn(done.chunk, done.buffer, self._work.position)
            self._keep(done.chunk, done.buffer)

    def _note_bad_file(self, chunk: int, error: StageinError) -> None:
        """A chunk cannot be had: the others are told that it will not come, and this rank reads no more of that file."""
        self._lost.add(chunk)
        self.bad_files.setdefault(int(self._table.file_of[chunk]), error)
        if len(self.bad_files) > _MOST_BAD_FILES:
            self._fail(None)

    def _after_mending(self, done: Done) -> None:
        origin = self._mending.pop(done.chunk)
        if done.finished:
            self._note_damage(int(self._table.nbytes[done.chunk]))
        self._take_over(done.chunk, done.buffer, origin)

    def _take_over(self, chunk: int, buffer: int, origin: int) -> None:
        """A chunk of another node is right, or lost: pass it on and keep it."""
        self.transfer.verified_chunks += chunk not in self._lost
        if not self._failed:
            self._pass_on_in_turn(chunk, buffer, origin)
            self._keep(chunk, buffer)

    def _note_damage(self, nbytes: int) -> None:
        """A chunk came damaged and was read from the source: often enough is a failure."""
        assert self._neighbours is not None
        self.transfer.read_bytes += nbytes
        self.transfer.damaged_chunks += 1
        if self.transfer.damaged_chunks > _MOST_DAMAGED_CHUNKS:
            left = self._neighbours.left
            self._fail(
                ChecksumError(
                    f"{self.transfer.damaged_chunks} chunks from rank {left.rank} on {left.node_name} differed from the manifest as "
                    "they arrived over the network: its memory, this node's or the network fails; leave these nodes out, then "
                    "run the same command again"
                )
            )

    def _pass_on_in_turn(self, chunk: int, buffer: int, origin: int) -> None:
        """Pass chunks on in the order of the plan, by which the others know them; reads may end in another."""
        self._buffers.use_again(buffer)
        self._ready[chunk] = buffer
        turns = self._turns[origin]
        while turns and turns[0] in self._ready:
            chunk = turns.popleft()
            buffer = self._ready.pop(chunk)
            self._to_pass_on -= 1
            self._pass_on(chunk, buffer, origin)
            self._buffers.release(buffer)

    def _pass_on(self, chunk: int, buffer: int, origin: int) -> None:
        """Send a chunk to the next node, or tell the one that read it that it has been everywhere."""
        assert self._neighbours is not None
        if self._work.hops[chunk] == (self._work.position - origin) % self._neighbours.places:
            self._neighbours.send_been_everywhere(origin)
            return
        self._buffers.use_again(buffer)
        nbytes = 0 if chunk in self._lost else int(self._table.nbytes[chunk])
        self._neighbours.send_chunk(self._buffers.view(buffer, nbytes), origin, Sent(nbytes, buffer))

    def _keep(self, chunk: int, buffer: int) -> None:
        """Have the chunk written if this node misses it."""
        if chunk in self._lost:
            return
        if self._wanted[chunk]:
            self._buffers.use_again(buffer)
            self._threads.start("write", chunk, buffer)
        else:
            self._finished_bytes += int(self._table.nbytes[chunk])

    def _after_write(self, done: Done) -> None:
        if done.finished:
            nbytes = int(self._table.nbytes[done.chunk])
            self.transfer.written_bytes += nbytes
            self._finished_bytes += nbytes

    def _handle_arrivals(self) -> int:
        handled = 0
        while self._neighbours is not None and (arrival := self._neighbours.next_arrival()) is not None:
            handled += 1
            if arrival.kind == "chunk":
                self._after_arrival(arrival)
            else:
                self._after_end(self._neighbours)
            self._buffers.release(arrival.buffer)
        return handled

    def _after_arrival(self, arrival: Arrival) -> None:
        """Check the chunk, pass it on and have it written when it is right.

        That is done here and not in a helper thread: the chunk is in the caches now, and the others would wait for the thread.
        """
        chunk, nbytes = arrival.chunk, int(self._table.nbytes[arrival.chunk])
        if not arrival.is_lost:
            self.transfer.received_bytes += nbytes
        if self._failed:
            return
        self._turns[arrival.origin].append(chunk)
        self._to_pass_on += 1
        if arrival.is_lost:
            self._lost.add(chunk)
        elif not self._reader.is_right(chunk, self._buffers.view(arrival.buffer, nbytes)):
            self._mending[chunk] = arrival.origin
            self._buffers.use_again(arrival.buffer)
            self._threads.start("read", chunk, arrival.buffer)
            return
        self._take_over(chunk, arrival.buffer, arrival.origin)

    def _after_end(self, neighbours: Neighbours) -> None:
        """The left neighbour is done, or has failed when something is missing."""
        if neighbours.to_receive:
            self._fail(None)
        for buffer in neighbours.cancel_receives():
            self._buffers.release(buffer)

    def _handle_been_everywhere(self) -> int:
        handled = 0
        while self._under_way and self._neighbours is not None and self._neighbours.next_been_everywhere():
            self._under_way -= 1
            handled += 1
        return handled

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
        most = min(_MOST_POSTED_RECEIVES, self._buffers.circulating // 2, neighbours.to_receive + 1)
        while len(neighbours.receives) < most and self._buffers.free:
            buffer = self._buffers.take()
            neighbours.post_receive(buffer, self._buffers.view(buffer))

    def _start_reads(self) -> int:
        """Give the reader threads enough to do, and no more: a chunk that waits to be read would hold a buffer.

        Chunks that travel come first, as other nodes wait for them.
        """
        started = 0
        while self._buffers.free and len(self._reading) < READER_THREADS:
            if self._own and self._under_way < self._buffers.circulating // 2:
                self._under_way += 1
                self._read(self._own.popleft(), travels=True)
            elif self._local and not self._own:
                self._read(self._local.popleft(), travels=False)
            else:
                break
            started += 1
        return started

    def _circulate_more(self) -> None:
        """Bring another buffer into use where too few of them hold this rank back, and not its disk."""
        now = time.monotonic()
        self._held_back_seconds += (now - self._last_turn) * self._is_held_back
        self._last_turn, seconds = now, now - self._looks_since
        if seconds > _LOOK_SECONDS and self._held_back_seconds > _HELD_BACK_SHARE * seconds:
            self._buffers.circulate_more()
            self._looks_since, self._held_back_seconds = now, 0.0
        is_writing = self._threads.outstanding > len(self._reading) + len(self._mending)
        could_read = len(self._reading) < READER_THREADS and bool(self._own or self._local)
        could_receive = self._neighbours is not None and self._neighbours.to_receive > 0 == len(
            self._neighbours.receives
        )
        self._is_held_back = not is_writing and (could_read or could_receive)

    def _read(self, chunk: int, travels: bool) -> None:
        buffer = self._buffers.take()
        if int(self._table.file_of[chunk]) not in self.bad_files:
            self._reading[chunk] = travels
            self._threads.start("read", chunk, buffer)
            return
        self._lost.add(chunk)
        if travels:
            self._pass_on_in_turn(chunk, buffer, self._work.position)
        self._buffers.release(buffer)

    def _end_stream(self) -> None:
        """Tell the right neighbour that nothing more comes, once that is so."""
        neighbours = self._neighbours
        if neighbours is None or neighbours.end_sent:
            return
        nothing_to_pass_on = neighbours.to_receive == 0 and self._to_pass_on == 0
        if self._failed or nothing_to_pass_on:
            neighbours.send_end()

    def _watch(self) -> None:
        """Say when nothing has moved for long what this rank waits for; after too long raise it as a WatchdogError."""
        still_seconds = time.monotonic() - self._last_progress
        waits_for_others = self._threads.outstanding == 0
        if self._pulse is not None and waits_for_others and (self._neighbours is None or self._neighbours.closed):
            still_seconds = self._pulse.silent_seconds()
        if still_seconds > _WARN_SECONDS and not self._warned:
            self._warned = True
            _log.warning("nothing has moved for %.0f s: waiting for %s", still_seconds, self._waited_for())
        if still_seconds > self._timeout_seconds * (_NEIGHBOUR_PATIENCE if waits_for_others else 1):
            raise WatchdogError(
                f"nothing has moved for {still_seconds:.0f} s: waiting for {self._waited_for()}; look at that place, then run "
                "the same command again to resume"
            )

    def _waited_for(self) -> str:
        if (self._reading or self._mending) and self._threads.outstanding:
            return f"the source to deliver {self._table.place(next(iter([*self._reading, *self._mending])))}"
        if self._threads.outstanding:
            return "the local disk to take a chunk"
        if self._neighbours is not None and not self._neighbours.left_ended:
            return f"the next chunk from rank {self._neighbours.left.rank} on {self._neighbours.left.node_name}"
        if self._neighbours is not None and not self._neighbours.closed:
            return f"rank {self._neighbours.right.rank} on {self._neighbours.right.node_name} to take a chunk"
        return "the other ranks to answer"
