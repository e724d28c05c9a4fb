"""How far a stage-in is, node by node, while it runs: every rank sends the first one a word now and then, which waits for none.

The words are two numbers a second from each rank, by a tag of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .neighbours import PROGRESS_TAG
from .world import Communicator, World

if TYPE_CHECKING:
    from mpi4py import MPI

_WORD_SECONDS = 1.0

Phase: TypeAlias = Literal["waiting", "preparing", "moving", "publishing"]


@dataclass(frozen=True)
class NodeProgress:
    """Bytes that have passed or reached a node, and those that will have, in `seconds` of this phase."""

    name: str
    done_bytes: int
    total_bytes: int
    seconds: float

    @property
    def share(self) -> float:
        return self.done_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def bytes_per_second(self) -> float:
        return self.done_bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class LiveView:
    """A stage-in at one moment. Nodes are empty until something moves; `waits_for` says who has the lease while it waits for it."""

    phase: Phase
    seconds: float
    """Since the phase began."""
    nodes: tuple[NodeProgress, ...] = ()
    waits_for: str | None = None

    @property
    def done_bytes(self) -> int:
        return sum(node.done_bytes for node in self.nodes)

    @property
    def total_bytes(self) -> int:
        return sum(node.total_bytes for node in self.nodes)

    @property
    def slowest(self) -> NodeProgress | None:
        """The node that will be done last."""
        return min(self.nodes, key=lambda node: node.share, default=None)

    @property
    def seconds_left(self) -> float | None:
        """Until the slowest node is done, if it goes on as it went; None before anything has moved."""
        slowest = self.slowest
        if slowest is None or not slowest.done_bytes:
            return None
        return (slowest.total_bytes - slowest.done_bytes) / slowest.bytes_per_second


Watch: TypeAlias = Callable[[LiveView], None]


class Live:
    """The words of one stage-in. `watch` is called on the first rank, about once a second and at the begin of each phase."""

    def __init__(
        self, communicator: Communicator, words: Communicator, worlds: Sequence[World], watch: Watch | None
    ) -> None:
        """The words go over `words`, by a tag of their own; `worlds` are the places of all ranks."""
        self._all, self._words, self._watch = communicator, words, watch
        self._worlds = worlds
        self._progress: NDArray[np.int64] = np.zeros((len(worlds), 2), dtype=np.int64)
        """Bytes done and in all, of each rank."""
        self._word = np.zeros(2, dtype=np.int64)
        self._sending: MPI.Request | None = None
        self._sent = self._received = 0
        self._problem: Exception | None = None
        self._phase: Phase = "preparing"
        self._waits_for: str | None = None
        self._phase_start = self._last = time.monotonic()
        self._show()

    def begin(self, phase: Phase) -> None:
        """Another phase begins on this rank."""
        self._phase, self._phase_start, self._waits_for = phase, time.monotonic(), None
        self._show()

    def wait(self, holder: str) -> None:
        """The lease is still held by `holder`; called again and again."""
        if self._phase != "waiting":
            self.begin("waiting")
        self._waits_for = holder
        self.look()

    def expect(self, total_bytes: Sequence[int]) -> None:
        """Told what each rank has to do: one that is not heard of afterwards is seen to have done none of it."""
        self._progress[:, 1] = total_bytes

    def note(self, done_bytes: int, total_bytes: int) -> None:
        """What this rank has done, and has to do. Raises what `watch` raised, if it did."""
        if self._problem is not None:
            raise self._problem
        self._progress[self._all.world.rank] = done_bytes, total_bytes

    def look(self) -> None:
        """Send this rank's word, or on the first rank take the others' and show them; cheap enough to be called all the time."""
        now = time.monotonic()
        if now - self._last < _WORD_SECONDS:
            return
        self._last = now
        if self._all.world.rank:
            self._send()
        else:
            self._receive()
            self._show()

    def _send(self) -> None:
        if self._words.mpi is None or (self._sending is not None and not self._sending.Test()):
            return
        self._word[:] = self._progress[self._all.world.rank]
        self._sending = self._words.mpi.Isend(self._word, dest=0, tag=PROGRESS_TAG)
        self._sent += 1

    def _receive(self) -> None:
        from mpi4py import MPI

        status, word = MPI.Status(), np.zeros(2, dtype=np.int64)
        while self._words.mpi is not None and self._words.mpi.Iprobe(tag=PROGRESS_TAG, status=status):
            self._words.mpi.Recv(word, source=status.Get_source(), tag=PROGRESS_TAG)
            self._progress[status.Get_source()] = word
            self._received += 1

    def _show(self) -> None:
        if self._watch is None or self._all.world.rank:
            return
        seconds = time.monotonic() - self._phase_start
        of_node: dict[str, NDArray[np.int64]] = {}
        for world, progress in zip(self._worlds, self._progress, strict=True):
            of_node[world.node_name] = of_node.get(world.node_name, np.zeros(2, dtype=np.int64)) + progress
        nodes = tuple(NodeProgress(name, int(done), int(total), seconds) for name, (done, total) in of_node.items())
        try:
            self._watch(LiveView(self._phase, seconds, nodes if self._progress.any() else (), self._waits_for))
        except Exception as problem:  # it is raised where the other ranks hear of it, too
            self._watch, self._problem = None, problem

    def close(self) -> None:
        """Called by all ranks when nothing more moves: takes the words that are still on their way."""
        sent = sum(self._all.gather_all(self._sent))
        while self._all.world.rank == 0 and self._received < sent:
            self._receive()
        if self._sending is not None:
            self._sending.Wait()
