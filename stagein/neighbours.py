"""The MPI side of one rank of a ring: chunks from the left, chunks to the right, and the pulse that all ranks share."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from .chunk_threads import BusyClock
from .stage_plan import RankWork
from .world import World

if TYPE_CHECKING:
    from mpi4py import MPI

_PULSE_SECONDS = 0.05

_EVERYWHERE_TAG, PROGRESS_TAG = 0, 1
"""Of words beside the ring: a chunk has arrived at its last place; how far a rank is (`live.py`)."""


@dataclass(frozen=True)
class Arrival:
    """A message from the left, in buffer number `buffer`; `origin` is the place in the ring of the node that read the chunk.

    `is_lost`: that node could not read it; the message is empty.
    """

    kind: Literal["chunk", "end"]
    buffer: int
    chunk: int = -1
    origin: int = -1
    is_lost: bool = False


@dataclass(frozen=True)
class Sent:
    """What a finished send was: bytes of a chunk in a buffer, or a mere word without one."""

    nbytes: int = 0
    buffer: int | None = None


class Neighbours:
    """Messages come from the left and go to the right, in order.

    A message's tag is the place of the node that read the chunk. As messages of one sender do not overtake each other, the tag
    and the plan say which chunk it is; an empty message stands for a chunk that could not be read. The last message is empty, with the number of places as its tag. Beside the ring, on
    `words`, the last node that gets a chunk says so to the one that read it.
    """

    def __init__(self, mpi: MPI.Comm, words: MPI.Comm, ring: Sequence[World], work: RankWork) -> None:
        """`ring` has the ranks of the ring by place."""
        from mpi4py import MPI

        self._mpi, self._words, self._MPI = mpi, words, MPI
        self.position, self.places = work.position, len(ring)
        self._ring = ring
        self.left, self.right = ring[self.position - 1], ring[(self.position + 1) % len(ring)]
        self._coming = work.by_origin
        self._come = [0] * len(ring)
        self.to_receive = sum(map(len, work.by_origin)) - len(work.traveling)
        """Chunks of others that have not arrived."""
        self.receives: deque[tuple[MPI.Request, int]] = deque()
        self._sends: deque[tuple[MPI.Request, Sent]] = deque()
        self._word: MPI.Request | None = None
        self.sending = BusyClock()
        self.left_ended = False
        self.end_sent = False

    def post_receive(self, buffer: int, view: memoryview) -> None:
        """Have the next message stored in `view`, that of buffer number `buffer`."""
        request = self._mpi.Irecv([view, self._MPI.BYTE], source=self.left.rank, tag=self._MPI.ANY_TAG)
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
        if origin == self.places:
            self.left_ended = True
            return Arrival("end", buffer)
        self.to_receive -= 1
        chunk = int(self._coming[origin][self._come[origin]])
        self._come[origin] += 1
        return Arrival("chunk", buffer, chunk, origin, is_lost=not status.Get_count(self._MPI.BYTE))

    def send_chunk(self, view: memoryview, origin: int, sent: Sent) -> None:
        """Send a chunk to the right; `next_sent` returns `sent` when the buffer is no longer needed for that."""
        self.sending.start()
        self._sends.append((self._mpi.Isend([view, self._MPI.BYTE], dest=self.right.rank, tag=origin), sent))

    def send_end(self) -> None:
        """Tell the right neighbour that nothing more comes."""
        self._sends.append((self._mpi.Isend([b"", self._MPI.BYTE], dest=self.right.rank, tag=self.places), Sent()))
        self.end_sent = True

    def send_been_everywhere(self, origin: int) -> None:
        """Tell the rank that read a chunk that it has arrived here, its last place."""
        rank = self._ring[origin].rank
        self._sends.append((self._words.Isend([b"", self._MPI.BYTE], dest=rank, tag=_EVERYWHERE_TAG), Sent()))

    def next_sent(self) -> Sent | None:
        """The oldest send, if it is complete."""
        if not self._sends or not self._sends[0][0].Test():
            return None
        sent = self._sends.popleft()[1]
        if sent.buffer is not None:
            self.sending.stop()
        return sent

    def next_been_everywhere(self) -> bool:
        """Whether another of this rank's chunks has arrived at its last place."""
        if self._word is None:
            self._word = self._words.Irecv(
                [bytearray(), self._MPI.BYTE], source=self._MPI.ANY_SOURCE, tag=_EVERYWHERE_TAG
            )
        if not self._word.Test():
            return False
        self._word = None
        return True

    def cancel_receives(self) -> list[int]:
        """Take back the receives that wait for nothing any more, and return their buffers."""
        buffers = []
        while self.receives:
            request, buffer = self.receives.popleft()
            _take_back(request)
            buffers.append(buffer)
        return buffers

    def close(self) -> None:
        """Leave no request open."""
        if self._word is not None:
            _take_back(self._word)

    @property
    def closed(self) -> bool:
        """Nothing more comes from the left or goes to the right, and no request of the ring is open."""
        return self.left_ended and self.end_sent and not self._sends


def _take_back(request: MPI.Request) -> None:
    request.Cancel()
    request.Wait()


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
