"""How a rank tells all others, outside any collective, that it cannot go on: they look between two steps.

Ranks that train together wait for each other in every step. One that fails alone leaves the others waiting for ever in
an allreduce; a check by a collective of its own would cost every step. A board costs a look, and nothing is collective.
"""

import atexit
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol

from stagein.formats import errors
from stagein.formats.errors import ExitCode, StageinError

from .launchers import started_by_mpi
from .world import find_rank, node_name

_TAG, _SEEN_TAG = 21_539, 21_540
"""Of messages on MPI's COMM_WORLD, notices and that they were seen: numbers that nobody else is likely to choose."""
_SEEN_SECONDS = 30
"""How long a rank that cannot go on, and exits, waits for others to see why: they look once a step."""


@dataclass(frozen=True)
class Notice:
    """Why rank `rank` cannot go on, and with what: it will raise an error of this `kind` when it comes to `place`."""

    rank: int
    node: str
    place: list[int]
    kind: str
    sentence: str

    @classmethod
    def of(cls, error: Exception, place: list[int]) -> "Notice":
        if isinstance(error, StageinError):
            kind, sentence = type(error).__name__, str(error)
        else:
            kind, sentence = StageinError.__name__, f"{type(error).__name__}: {error}"
        return cls(find_rank().rank, node_name(), place, kind, sentence)

    def as_error(self) -> StageinError:
        """What the other ranks raise."""
        error: StageinError = getattr(errors, self.kind, StageinError)(
            f"rank {self.rank} on {self.node}: {self.sentence}"
        )
        error.reported_by_peer = True
        return error


class FailureBoard(Protocol):
    """Where notices are posted. Neither method waits for another rank."""

    def post(self, notice: Notice) -> None: ...

    def look(self) -> Notice | None:
        """A notice of another rank that was not seen yet."""


def join_board() -> FailureBoard | None:
    """The board of this job: torch.distributed's store where it is in use, else messages of MPI; None when alone."""
    rank, world_size, _ = find_rank()
    if world_size == 1:
        return None
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return _StoreBoard(rank)
    return _MpiBoard(rank, world_size) if started_by_mpi() else None


class _StoreBoard:
    """Notices in the key-value store that the ranks of torch.distributed met in."""

    def __init__(self, rank: int) -> None:
        import torch.distributed as dist

        # There is no public name for it; a store of our own would have to be agreed upon first.
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("stagein/failures", store)  # type: ignore[attr-defined]
        self._rank = rank
        self._seen = self._store.add("posted", 0)

    def post(self, notice: Notice) -> None:
        number = self._store.add("numbers", 1)
        self._store.set(f"notice {number}", json.dumps(asdict(notice)))
        self._store.add("posted", 1)

    def look(self) -> Notice | None:
        while self._seen < self._store.add("posted", 0):
            self._seen += 1
            notice = Notice(**json.loads(self._store.get(f"notice {self._seen}")))
            if notice.rank != self._rank:
                return notice
        return None


class _MpiBoard:
    """Notices as small messages to every rank: MPI takes them without a receiver waiting.

    A rank that posted one and then exits, however it does that, ends the job if others have not seen it: they may have been a step ahead,
    and wait for it in a collective, and it would wait for them at the end of MPI.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._others = [other for other in range(world_size) if other != rank]
        self._sent: list[Any] = []
        self._exit_code = ExitCode.OK
        """With which to end the job: another one once a notice was posted."""

    def post(self, notice: Notice) -> None:
        if not self._may_call():
            return
        _end_job_on_uncaught_error(self._mpi.COMM_WORLD)
        if self._exit_code == ExitCode.OK:
            atexit.register(self._end_job_unless_seen)
        self._exit_code = getattr(errors, notice.kind).exit_code
        message = json.dumps(asdict(notice)).encode()
        self._sent += [self._mpi.COMM_WORLD.Isend(message, dest=other, tag=_TAG) for other in self._others]

    def look(self) -> Notice | None:
        status = self._mpi.Status()
        if not self._may_call() or not self._mpi.COMM_WORLD.Iprobe(self._mpi.ANY_SOURCE, _TAG, status):
            return None
        message = bytearray(status.Get_count(self._mpi.BYTE))
        self._mpi.COMM_WORLD.Recv(message, source=status.Get_source(), tag=_TAG)
        self._sent.append(self._mpi.COMM_WORLD.Isend(b"", dest=status.Get_source(), tag=_SEEN_TAG))
        _end_job_on_uncaught_error(self._mpi.COMM_WORLD)
        return Notice(**json.loads(message))

    def _end_job_unless_seen(self) -> None:
        until, left = time.monotonic() + _SEEN_SECONDS, set(self._others)
        while left and self._may_call():
            for other in list(left):
                # One that posts a notice itself cannot go on either.
                if any(self._mpi.COMM_WORLD.Iprobe(other, tag) for tag in (_SEEN_TAG, _TAG)):
                    left.remove(other)
            if left and time.monotonic() > until:
                sys.stdout.flush()
                print(
                    f"rank {find_rank().rank} ends the job: {len(left)} other ranks have not seen in {_SEEN_SECONDS} s that it cannot go on",
                    file=sys.stderr,
                    flush=True,
                )
                self._mpi.COMM_WORLD.Abort(self._exit_code)
            time.sleep(0.01)

    def _may_call(self) -> bool:
        """MPI runs, and this thread may call it."""
        mpi = self._mpi
        if not mpi.Is_initialized() or mpi.Is_finalized():
            return False
        return mpi.Query_thread() == mpi.THREAD_MULTIPLE or threading.current_thread() is threading.main_thread()


def _end_job_on_uncaught_error(communicator: Any) -> None:
    """An error that ends this process from now on ends all ranks: MPI would let it wait at its exit for the others."""
    report = sys.excepthook
    if getattr(report, "_ends_job", False):
        return

    def report_and_abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        communicator.Abort(error.exit_code if isinstance(error, StageinError) else ExitCode.FAILED)

    report_and_abort._ends_job = True  # type: ignore[attr-defined]
    sys.excepthook = report_and_abort
