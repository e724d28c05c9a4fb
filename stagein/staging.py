"""Stage-in: bring a data set from the parallel file system to the local disks of the nodes of a job, once, and verified.

The story of `stage`: read the manifest, look at the destinations, make the plan, take the lease, reuse what is there, move the
rest (`ring.py`), make it durable, publish. Every step either succeeds on all ranks or fails on all of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from stagein import __version__
from stagein.formats.errors import (
    ChecksumError,
    InterruptedRunError,
    NoSpaceError,
    SourceError,
    StageinError,
    UsageError,
    WatchdogError,
)
from stagein.formats.manifest import MANIFEST_NAME, Manifest

from .cache import Store, check_destination, expand_node, note_destination
from .chunk_io import ChunkReader, ChunkWriter, describe_changed_file
from .receipt import NodeReceipt, Receipt
from .ring import Engine, Neighbours, Progress, Pulse, Transfer
from .stage_plan import ChunkTable, Flags, NodeSpace, Policy, StagePlan, make_plan, rank_work
from .world import Communicator, connect

DEFAULT_MEMORY_BYTES = 256 << 20
DEFAULT_TIMEOUT_SECONDS = 300.0

_SLICE_SECONDS = 2.0
"""Long local work is done in slices of this length, after each of which the ranks hear from each other."""

_LISTED = 5
"""Of a long list of files or nodes, an error names this many."""

_LEASE_PAUSE_SECONDS = (0.1, 0.4)
"""Jobs that want the same leases look again after a random time between these, so that one of them gets all."""


def stage(
    source: Path | str,
    to: str,
    *,
    policy: Policy = "auto",
    communicator: Communicator | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    progress: Progress | None = None,
) -> Receipt:
    """Stage the data set `source` below the node-local folder `to`, in which `{node}` stands for the node's name.

    All ranks of the job call it together and get the same receipt. Each byte of the source is read once, checked against the
    manifest where it is read and where it arrives, and published only when all of it is right and durable. What is already
    there is reused, so that the same call after an interruption resumes, and after a success returns at once.

    memory_bytes     upper bound of the buffers of each rank; at least four chunks are taken.
    timeout_seconds  how long nothing may move before the job is given up, with a sentence that names what was waited for.
    progress         called on each rank with the bytes it has finished and has to finish.

    Raises a StageinError on every rank: UsageError, SourceError, NoSpaceError, ChecksumError, InterruptedRunError (after
    SIGTERM or SIGINT; resumable). A WatchdogError ends all ranks of an MPI job with exit code 75.
    """
    communicator = communicator or connect()
    try:
        with _stop_on_signals() as stop_requested:
            job = _Job(Path(source), to, policy, communicator, timeout_seconds, stop_requested)
            return job.run(memory_bytes, progress)
    except WatchdogError as error:
        if (
            communicator.mpi is not None and not error.reported_by_peer
        ):  # the other ranks cannot be reached in an orderly way any more
            print(f"stagein: {error}", file=sys.stderr, flush=True)
            communicator.abort(error.exit_code)
        raise


def plan_stage(
    source: Path | str, to: str, *, policy: Policy = "auto", communicator: Communicator | None = None
) -> tuple[Manifest, StagePlan]:
    """What `stage` would do, without writing anything. Raises as `stage` does before it moves the first byte."""
    job = _Job(Path(source), to, policy, communicator or connect(), DEFAULT_TIMEOUT_SECONDS, lambda: False)
    return job.manifest, job.plan


@dataclass
class Phases:
    """Wall-clock seconds of the phases on this rank."""

    prepare_seconds: float = 0.0
    transfer_seconds: float = 0.0
    publish_seconds: float = 0.0


class _Job:
    """One stage-in as one rank sees it. The constructor makes the plan and moves nothing."""

    def __init__(
        self,
        source: Path,
        to: str,
        policy: Policy,
        communicator: Communicator,
        timeout_seconds: float,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._start = time.monotonic()
        self._source = source
        self._all, self._world = communicator, communicator.world
        self._leads = self._world.local_rank == 0
        self._timeout_seconds, self._stop_requested = timeout_seconds, stop_requested
        self.manifest = self._load_manifest()
        self._table = ChunkTable(self.manifest)
        self._store = Store(expand_node(to, self._world.node_name), self.manifest)
        with self._all.together(timeout_seconds):
            self._check_source()
        space = self._look_at_destination()
        with self._all.together(timeout_seconds):
            self.plan = make_plan(self.manifest, space, policy)
        self._files = self.plan.files_of(self._world.node)
        self._published = False

    def run(self, memory_bytes: int, progress: Progress | None) -> Receipt:
        """Bring this node's files here, unless they are here already."""
        phases = Phases()
        nothing = np.zeros(len(self._table), dtype=np.bool_)
        if self._complete():
            return self._make_receipt(Transfer(), nothing, phases)
        with self._lease():
            if self._complete():  # another job had the lease before us and did the work
                return self._make_receipt(Transfer(), nothing, phases)
            here = self._all.on_this_node()
            missing = self._find_missing(here)
            phases.prepare_seconds = time.monotonic() - self._start
            transfer = self._move(here, missing, memory_bytes, progress)
            phases.transfer_seconds = time.monotonic() - self._start - phases.prepare_seconds
            self._publish()
            here.free()
            phases.publish_seconds = time.monotonic() - self._start - phases.prepare_seconds - phases.transfer_seconds
            return self._make_receipt(transfer, missing, phases)

    def _load_manifest(self) -> Manifest:
        content = None
        with self._all.together(self._timeout_seconds):
            if self._world.rank == 0:
                manifest = Manifest.load(self._source)
                content = manifest.to_bytes()
        content = self._all.broadcast(content)
        return manifest if self._world.rank == 0 else Manifest.parse(content, self._source / MANIFEST_NAME)

    def _check_source(self) -> None:
        """Find files that are missing or changed before anything is moved; each rank looks at its share of them."""
        wrong = []
        for entry in self._table.files[self._world.rank :: self._world.size]:
            path = self._source / entry.file
            try:
                status = path.lstat()
            except OSError as error:
                wrong.append(f"{path} cannot be read: {error.strerror}")
                continue
            if status.st_size != entry.nbytes:
                wrong.append(describe_changed_file(path, status, entry.nbytes))
        if wrong:
            more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
            raise SourceError("; ".join(wrong[:_LISTED]) + more)

    def _look_at_destination(self) -> list[NodeSpace]:
        """The room on every node, as its first rank sees it."""
        space = None
        with self._all.together(self._timeout_seconds):
            if self._leads:
                check_destination(self._store.to, self._source, self._world.node_name)
                free_bytes, held_bytes = self._store.free_bytes(), self._store.held_bytes()
                space = NodeSpace(self._world.node_name, self._world.local_size, free_bytes, held_bytes)
        return [space for space in self._all.gather_all(space) if space is not None]

    def _complete(self) -> bool:
        """Whether every node has a published copy of its files. Sets `_published` for this node."""
        by_node = dict(self._all.gather_all((self._world.node, self._store.holds(self._files)))[::-1])
        self._published = by_node[self._world.node]
        return all(by_node.values())

    @contextlib.contextmanager
    def _lease(self) -> Iterator[None]:
        """Hold this data set's lease on every node."""
        with self._all.together(self._timeout_seconds):
            if self._leads:
                self._store.make_folder()
        self._refuse_shared_folder()
        lease = self._wait_for_lease()
        try:
            yield
        finally:
            if lease is not None:
                os.close(lease)

    def _refuse_shared_folder(self) -> None:
        """Two nodes that write to one folder would spoil each other's files. Raises UsageError."""
        if self._world.nodes == 1:
            return
        job = self._all.broadcast(uuid.uuid4().hex)
        with contextlib.ExitStack() as marks:
            with self._all.together(self._timeout_seconds):
                if self._leads:
                    marks.enter_context(self._store.mark(job))
            with self._all.together(self._timeout_seconds):
                sharing = self._store.marks(job) if self._leads else []
                if len(sharing) > 1:
                    raise UsageError(
                        f"the nodes {', '.join(sharing[:_LISTED])} share the destination {self._store.to}: name a node-local "
                        "folder, or put {node} into its name"
                    )
            self._all.barrier(self._timeout_seconds)

    def _wait_for_lease(self) -> int | None:
        """Take the lease on all nodes or on none, so that two jobs never wait for each other.

        Waits as long as the job that has it makes progress. Returns the descriptor on the node's first rank.
        """
        seen_bytes, seen_at = -1, time.monotonic()
        while True:
            lease = None
            with self._all.together(self._timeout_seconds):
                self._raise_if_stopped()
                lease = self._store.try_lease() if self._leads else None
            lacks = self._leads and lease is None
            lacking = [report for report in self._all.gather_all(self._describe_lease() if lacks else None) if report]
            if not lacking:
                return lease
            if lease is not None:
                os.close(lease)
            journal_bytes = sum(nbytes for _, nbytes in lacking)
            if journal_bytes != seen_bytes:
                seen_bytes, seen_at = journal_bytes, time.monotonic()
            if self._all.broadcast(time.monotonic() - seen_at > self._timeout_seconds):
                error = WatchdogError(
                    f"{lacking[0][0]} is staging the same data set, without progress for {self._timeout_seconds:g} s: end it, "
                    "then run the same command again"
                )
                error.reported_by_peer = self._world.rank != 0
                raise error
            time.sleep(random.uniform(*_LEASE_PAUSE_SECONDS))

    def _describe_lease(self) -> tuple[str, int]:
        """Who holds the lease of this node, and a number that grows while that job makes progress."""
        return f"{self._store.lease_holder()} (node {self._world.node_name})", self._store.journal_bytes()

    def _find_missing(self, here: Communicator) -> Flags:
        """Flags of the chunks that this node is to get. What an earlier run left is verified and kept."""
        claimed = np.zeros(len(self._table), dtype=np.bool_)
        with self._all.together(self._timeout_seconds):
            if self._leads and not self._published:
                claimed = self._prepare()
        claimed = here.broadcast(claimed)
        verified = np.zeros(len(self._table), dtype=np.bool_)
        reader = ChunkReader(self._store.work, self._table)
        buffer = memoryview(bytearray(self._table.longest_bytes))

        def verify(chunk: int) -> None:
            with contextlib.suppress(ChecksumError, SourceError):
                reader.read(chunk, buffer[: self._table.nbytes[chunk]])
                verified[chunk] = True

        share = np.flatnonzero(claimed)[self._world.local_rank :: self._world.local_size]
        self._in_slices(share.tolist(), verify)
        reader.close()
        wanted = self._table.of_files(() if self._published else self._files)
        return wanted & ~here.any_rank(verified)

    def _prepare(self) -> Flags:
        try:
            return self._store.prepare(self._files)
        except NoSpaceError:
            self._store.discard_work()
            raise

    def _move(self, here: Communicator, missing: Flags, memory_bytes: int, progress: Progress | None) -> Transfer:
        """Move the missing chunks. Where a disk gets full, the work of that node is removed; elsewhere it can be resumed."""
        work = rank_work(self.plan, self._table, self._world, self._all.any_rank(missing), missing)
        ranks = self._all.gather_all(self._world)
        mpi = self._all.mpi.Dup() if self._all.mpi is not None else None
        neighbours = None
        if mpi is not None and work.by_origin:
            ring = [w.rank for w in sorted(ranks, key=lambda w: w.node) if w.local_rank == self._world.local_rank]
            neighbours = Neighbours(mpi, ring, self._world.node, work.by_origin)
        transfer, disk_is_full = Transfer(), False
        try:
            with contextlib.ExitStack() as stack:
                with self._all.together(self._timeout_seconds):
                    note = stack.enter_context(self._store.journal(self._world.local_rank)) if missing.any() else None
                    engine = Engine(
                        work,
                        self._table,
                        missing,
                        ChunkReader(self._source, self._table),
                        ChunkWriter(self._store.work, self._table, note),
                        memory_bytes=memory_bytes,
                        timeout_seconds=self._timeout_seconds,
                        stop_requested=self._stop_requested,
                        progress=progress,
                        neighbours=neighbours,
                        pulse=Pulse(mpi) if mpi is not None else None,
                    )
                with self._all.together(self._timeout_seconds):
                    try:
                        transfer = engine.run()
                    except NoSpaceError:
                        disk_is_full = True
                        raise
        except WatchdogError:
            raise
        except StageinError:
            if any(here.gather_all(disk_is_full)) and self._leads:
                self._store.discard_work()
            raise
        if mpi is not None:
            mpi.Free()
        return transfer

    def _publish(self) -> None:
        """Make this node's files durable, each rank its share of them, and give them their final names."""
        new_files = () if self._published else self._files
        self._in_slices(new_files[self._world.local_rank :: self._world.local_size], self._store.sync)
        with self._all.together(self._timeout_seconds):
            if self._leads and not self._published:
                self._store.publish(self.plan.policy, self._files)

    def _in_slices(self, items: Sequence[int], action: Callable[[int], None]) -> None:
        """Run `action` on each of this rank's items, and hear from the other ranks every few seconds."""
        left = deque(items)
        while any(self._all.gather_all(bool(left))):
            with self._all.together(self._timeout_seconds):
                end = time.monotonic() + _SLICE_SECONDS
                while left and time.monotonic() < end:
                    self._raise_if_stopped()
                    action(left.popleft())

    def _raise_if_stopped(self) -> None:
        if self._stop_requested():
            raise InterruptedRunError("stage-in was stopped by a signal: run the same command again to resume it")

    def _make_receipt(self, transfer: Transfer, missing: Flags, phases: Phases) -> Receipt:
        """Add up what the ranks did, and leave the receipt beside READY on every node that got something."""
        transfers = self._all.gather_all((self._world.node, transfer))
        nbytes = sum(self._table.files[file].nbytes for file in self._files)
        on_this_node = NodeReceipt(
            node=self._world.node_name,
            path=str(self._store.final),
            ranks=self._world.local_size,
            files=len(self._files),
            nbytes=nbytes,
            reused_bytes=nbytes - self._table.total_bytes(missing),
            **_add_up([moved for node, moved in transfers if node == self._world.node]),
            **asdict(phases),
        )
        nodes = self._all.gather_all(on_this_node if self._leads else None)
        receipt = Receipt(
            stagein_version=__version__,
            dataset_id=self.manifest.id,
            source=str(self._source.absolute()),
            policy=self.plan.policy,
            dataset_bytes=self.manifest.nbytes,
            moved_nothing=not self._all.any_rank(missing).any(),
            seconds=time.monotonic() - self._start,
            nodes=tuple(node for node in nodes if node is not None),
        )
        with self._all.together(self._timeout_seconds):
            if self._leads:
                note_destination(self._store.to, self._world.node_name)
                if not self._published:
                    self._store.write_receipt(receipt.to_bytes())
        receipt = self._all.broadcast(receipt)
        assert isinstance(receipt, Receipt)
        return receipt


def _add_up(transfers: Sequence[Transfer]) -> dict[str, Any]:
    return {field.name: sum(getattr(transfer, field.name) for transfer in transfers) for field in fields(Transfer)}


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM and SIGINT instead of dying from them; yields a question to ask now and then."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    stopped = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, lambda *_: stopped.set()) for number in signals]
    try:
        yield stopped.is_set
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
