"""Shards made on all ranks of a job: rank 0 leads, which is to say it deals out tasks as ranks finish theirs; the others follow.

Every rank has worker processes, so that its main thread is free to move messages (MPI stays in that thread) and to say
every few seconds that it is alive. What rank 0 does besides, finding the source and publishing the result, runs in a thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from stagein.formats.errors import InterruptedRunError, StageinError, WatchdogError, destination_error
from stagein.formats.shard_tasks import ShardResult, ShardTask
from stagein.formats.shard_workers import ShardWorkers, result_of

from .world import Communicator

if TYPE_CHECKING:
    from mpi4py import MPI

_T = TypeVar("_T")
_LEADER = 0
_BEAT_SECONDS = 5.0
_PAUSE_SECONDS = 2e-3
_STOP_SECONDS = 10.0
"""A rank that is told to stop is waited for so long."""


@dataclass(frozen=True)
class _Do:
    ticket: int
    task: ShardTask


@dataclass(frozen=True)
class _Done:
    ticket: int
    outcome: ShardResult | StageinError


@dataclass(frozen=True)
class _Stop:
    """To a follower: end, with this failure if there is one. From a follower: it must end, or, without a failure, it has."""

    failure: StageinError | None


class RankPool:
    """Rank 0's end: a ShardExecutor whose shards are made on all ranks. Tasks come from the thread that `lead` runs."""

    def __init__(self, communicator: Communicator, workers: ShardWorkers) -> None:
        """Collective with `follow`; `workers` make the shards of this rank."""
        self._workers = workers
        capacities = communicator.gather_all(workers.capacity)
        self.capacity = sum(capacities)
        self._free = dict(enumerate(capacities))
        self._followers = [rank for rank in self._free if rank != _LEADER]
        self._mail = _Mail(communicator, self._followers)
        self._submitted: queue.SimpleQueue[tuple[ShardTask, Future[ShardResult]]] = queue.SimpleQueue()
        self._dealt: dict[int, tuple[int, Future[ShardResult]]] = {}
        self._own: dict[int, Future[ShardResult]] = {}
        self._tickets = 0
        self._failure: StageinError | None = None
        self._at_rest = threading.Event()

    def submit(self, task: ShardTask) -> Future[ShardResult]:
        future: Future[ShardResult] = Future()
        self._submitted.put((task, future))
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After a failure no rank works on a shard any more."""
        if error is not None:
            self._failure = self._failure or _as_stagein_error(error)
            self._at_rest.wait(2 * _STOP_SECONDS)

    def lead(self, work: Callable[[], _T], stopping_signal: Callable[[], str | None]) -> _T:
        """Run `work` in a thread and its shards on all ranks. All ranks end as it does: returns and raises what it does.

        `stopping_signal` names a signal that was received; it ends all ranks with an InterruptedRunError. Raises
        WatchdogError when a rank is not heard of within the communicator's limit; only `abort` is left to do then.
        """
        outcome = _Outcome(work)
        outcome.thread.start()
        while outcome.thread.is_alive() and self._failure is None:
            self._move()
            if signal_name := stopping_signal():
                self._failure = _interrupted(signal_name)
            time.sleep(_PAUSE_SECONDS)
        failure = self._failure or outcome.failure
        self._stop_all(failure)
        if failure is not None:
            for future in self._unfinished():
                future.set_exception(failure)
            outcome.thread.join(_STOP_SECONDS)
            raise outcome.failure or failure
        return outcome.values[0]

    def _unfinished(self) -> Iterator[Future[ShardResult]]:
        for _, future in self._dealt.values():
            yield future
        while not self._submitted.empty():
            yield self._submitted.get_nowait()[1]

    def _move(self) -> None:
        """Take in what is finished, deal out what is waiting."""
        for rank, message in self._mail.received():
            self._take(rank, message)
        for done in _finished(self._own):
            self._take(_LEADER, done)
        while self._free[rank := max(self._free, key=self._free.__getitem__)]:
            try:
                task, future = self._submitted.get_nowait()
            except queue.Empty:
                return
            self._tickets += 1
            self._dealt[self._tickets] = rank, future
            self._free[rank] -= 1
            if rank == _LEADER:
                self._own[self._tickets] = _submit(self._workers, task)
            else:
                self._mail.send(rank, _Do(self._tickets, task))

    def _take(self, rank: int, message: _Done | _Stop) -> None:
        if isinstance(message, _Stop):
            self._failure = self._failure or message.failure
        elif isinstance(message.outcome, StageinError):
            self._failure = self._failure or message.outcome
        else:
            _, future = self._dealt.pop(message.ticket)
            self._free[rank] += 1
            future.set_result(message.outcome)

    def _stop_all(self, failure: StageinError | None) -> None:
        """Have every rank end its workers; those that do not say so in time are not waited for."""
        waited_for = set(self._followers)
        for rank in waited_for:
            self._mail.send(rank, _Stop(failure))
        self._workers.close(at_once=failure is not None)
        deadline = time.monotonic() + _STOP_SECONDS
        while waited_for and time.monotonic() < deadline:
            waited_for -= {rank for rank, message in self._mail.received() if message == _Stop(None)}
            time.sleep(_PAUSE_SECONDS)
        self._at_rest.set()


def follow(communicator: Communicator, workers: ShardWorkers, stopping_signal: Callable[[], str | None]) -> None:
    """Make the shards that rank 0 deals to this rank, until it says that all is done.

    Raises what ended the conversion, as reported by a peer: rank 0 prints it. WatchdogError as `RankPool.lead`.
    """
    communicator.gather_all(workers.capacity)
    mail = _Mail(communicator, [_LEADER])
    futures: dict[int, Future[ShardResult]] = {}
    end: _Stop | None = None
    is_reported = False
    where = f"rank {communicator.world.rank} on {communicator.world.node_name}"
    while end is None:
        for _, message in mail.received():
            if isinstance(message, _Stop):
                end = message
            else:
                futures[message.ticket] = _submit(workers, message.task)
        for done in _finished(futures):
            outcome = done.outcome
            if isinstance(outcome, StageinError):
                outcome = type(outcome)(f"{where}: {outcome}")
            mail.send(_LEADER, _Done(done.ticket, outcome))
        signal_name = stopping_signal()
        if signal_name and not is_reported:
            mail.send(_LEADER, _Stop(_interrupted(f"{signal_name} to {where}")))
            is_reported = True
        time.sleep(_PAUSE_SECONDS)
    workers.close(at_once=end.failure is not None)
    mail.send(_LEADER, _Stop(None))
    mail.flush()
    if end.failure is not None:
        end.failure.reported_by_peer = True
        raise end.failure


class _Mail:
    """Messages of any size between ranks, of which none waits to be received, and signs of life."""

    def __init__(self, communicator: Communicator, peers: Iterable[int]) -> None:
        """`peers` are the ranks that are missed when they are silent, and told that this one is alive."""
        communicator = communicator.duplicate()
        assert communicator.mpi is not None
        self._mpi: MPI.Comm = communicator.mpi
        self._world, self._limit_seconds = communicator.world, communicator.timeout_seconds
        self._heard = dict.fromkeys(peers, time.monotonic())
        self._beaten = 0.0
        self._sending: list[MPI.Request] = []

    def send(self, peer: int, message: object) -> None:
        self._sending.append(self._mpi.isend(message, dest=peer))

    def received(self) -> Iterator[tuple[int, Any]]:
        """The messages that are there, each with its sender. Raises WatchdogError when a peer was silent for too long."""
        from mpi4py import MPI

        now = time.monotonic()
        if now - self._beaten > _BEAT_SECONDS:
            self._beaten = now
            for peer in self._heard:
                self.send(peer, None)
        self._sending = [request for request in self._sending if not request.Test()]
        status = MPI.Status()
        while self._mpi.iprobe(status=status):
            peer = status.Get_source()
            message = self._mpi.recv(source=peer)
            self._heard[peer] = now
            if message is not None:
                yield peer, message
        for peer, heard in self._heard.items():
            if now - heard > self._limit_seconds:
                raise WatchdogError(
                    f"rank {peer} was not heard of for {self._limit_seconds:g} s by rank {self._world.rank} on "
                    f"{self._world.node_name}: look at its node, then run the same command again, it resumes"
                )

    def flush(self) -> None:
        """Wait, but not for long, until what was sent is received."""
        deadline = time.monotonic() + _STOP_SECONDS
        while self._sending and time.monotonic() < deadline:
            self._sending = [request for request in self._sending if not request.Test()]
            time.sleep(_PAUSE_SECONDS)


@dataclass
class _Outcome(Generic[_T]):
    """What comes of work that runs in a thread: the one value, or a failure."""

    work: Callable[[], _T]
    values: list[_T] = field(default_factory=list)
    failure: StageinError | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="conversion", daemon=True)

    def _run(self) -> None:
        try:
            self.values.append(self.work())
        except BaseException as error:
            self.failure = _as_stagein_error(error)


def _submit(workers: ShardWorkers, task: ShardTask) -> Future[ShardResult]:
    """The future of a task; it has failed already when there is nobody left to work on it."""
    future: Future[ShardResult] = Future()
    try:
        return workers.submit(task)
    except StageinError as error:
        future.set_exception(error)
    return future


def _finished(futures: dict[int, Future[ShardResult]]) -> list[_Done]:
    """Take the futures that are done out of `futures`: what has become of them."""
    tickets = [ticket for ticket, future in futures.items() if future.done()]
    return [_Done(ticket, _outcome(futures.pop(ticket))) for ticket in tickets]


def _outcome(future: Future[ShardResult]) -> ShardResult | StageinError:
    try:
        return result_of(future)
    except Exception as error:
        return _as_stagein_error(error)


def _as_stagein_error(error: BaseException) -> StageinError:
    """Any error as one that has a sentence and an exit code; a bug must end the other ranks, too."""
    if isinstance(error, StageinError):
        return error
    if isinstance(error, OSError):
        return destination_error(error, "writing", error.filename or "a shard")
    wrapped = StageinError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _interrupted(signal_name: str) -> InterruptedRunError:
    return InterruptedRunError(f"stopped by {signal_name}: finished shards are kept, the same command again resumes")
