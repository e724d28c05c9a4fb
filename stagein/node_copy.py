"""This node's copy of a data set, as all ranks of a job bring it about: who may write it, what is there, and when it counts.

Every method is called by all ranks together, and succeeds or fails on all of them.
"""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from stagein.formats.errors import (
    ChecksumError,
    InterruptedRunError,
    NoSpaceError,
    SourceError,
    UsageError,
    WatchdogError,
)

from .cache import Store
from .chunk_io import ChunkReader
from .leases import WriterLease
from .stage_plan import ChosenPolicy, ChunkTable, Flags
from .world import Communicator

_SLICE_SECONDS = 2.0
"""Long local work is done in slices of this length, after each of which the ranks hear from each other."""

_LEASE_PAUSE_SECONDS = (0.1, 0.4)
"""Jobs that want the same leases look again after a random time between these, so that one of them gets all."""

_LISTED_NODES = 5
"""Of a long list of nodes, an error names this many."""


class NodeCopy:
    """The files of a plan that this node is to have, in its store."""

    def __init__(
        self,
        communicator: Communicator,
        store: Store,
        table: ChunkTable,
        policy: ChosenPolicy,
        files: Sequence[int],
        stop_requested: Callable[[], bool],
    ) -> None:
        self._all, self._world = communicator, communicator.world
        self._leads = self._world.local_rank == 0
        self.store, self._table = store, table
        self._policy, self.files = policy, files
        self._stop_requested = stop_requested
        self.new_files: tuple[int, ...] = tuple(files)
        """Those of `files` that this node's published copy does not have yet; `complete` finds out."""
        self.lacks_something = True
        """Whether this node has new files to publish, or no published copy at all, as when a data set has no files."""

    def complete(self, here: Communicator) -> bool:
        """Whether every node has a published copy of its files. Sets `new_files` and `lacks_something` for this node."""
        published = here.broadcast(self.store.published() if self._leads else None)
        self.new_files = tuple(file for file in self.files if file not in (published or ()))
        self.lacks_something = published is None or bool(self.new_files)
        return not any(self._all.gather_all(self.lacks_something))

    @contextlib.contextmanager
    def lease(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Hold this data set's lease on every node; `on_wait` is called now and then with who has it, until he gives it back."""
        with self._all.together() as jobs:
            jobs.mine = uuid.uuid4().hex
            if self._leads:
                self.store.make_folder()
        self._refuse_shared_folder(jobs.all[0])
        lease = self._wait_for_lease(on_wait)
        try:
            yield
        finally:
            if lease is not None:
                lease.close()

    def _refuse_shared_folder(self, job: str) -> None:
        """Two nodes that write to one folder would spoil each other's files. `job` is a name of its own. Raises UsageError."""
        if self._world.nodes == 1:
            return
        with contextlib.ExitStack() as marks:
            with self._all.together():
                if self._leads:
                    marks.enter_context(self.store.mark(job))
            with self._all.together():
                sharing = self.store.marks(job) if self._leads else []
                if len(sharing) > 1:
                    raise UsageError(
                        f"the nodes {', '.join(sharing[:_LISTED_NODES])} share the destination {self.store.to}: name a node-local "
                        "folder, or put {node} into its name"
                    )

    def _wait_for_lease(self, on_wait: Callable[[str], None]) -> WriterLease | None:
        """Take the lease on all nodes or on none, so that two jobs never wait for each other.

        Waits as long as the job that has it makes progress. Returns the lease on the node's first rank.
        """
        seen_bytes, seen_at = -1, time.monotonic()
        while True:
            lease = None
            with self._all.together() as reports:
                self._raise_if_stopped()
                if self._leads:
                    lease = self.store.try_lease()
                    reports.mine = self._describe_lease() if lease is None else None
            lacking = [report for report in reports.all if report]
            if not lacking:
                return lease
            if lease is not None:
                lease.close()
            on_wait(lacking[0][0])
            journal_bytes = sum(nbytes for _, nbytes in lacking)
            if journal_bytes != seen_bytes:
                seen_bytes, seen_at = journal_bytes, time.monotonic()
            if self._all.broadcast(time.monotonic() - seen_at > self._all.timeout_seconds):
                error = WatchdogError(
                    f"{lacking[0][0]} is staging the same data set, without progress for {self._all.timeout_seconds:g} s: end it, "
                    "then run the same command again"
                )
                error.reported_by_peer = self._world.rank != 0
                raise error
            time.sleep(random.uniform(*_LEASE_PAUSE_SECONDS))

    def _describe_lease(self) -> tuple[str, int]:
        """Who holds the lease of this node, and a number that grows while that job makes progress."""
        return f"{self.store.lease_holder()} (node {self._world.node_name})", self.store.journal_bytes()

    def find_missing(self, here: Communicator) -> Flags:
        """Flags of the chunks that this node is to get. What an earlier run left is verified and kept."""
        claimed = np.zeros(len(self._table), dtype=np.bool_)
        with self._all.together():
            if self._leads and self.lacks_something:
                claimed = self._prepare()
        claimed = here.broadcast(claimed)
        verified = np.zeros(len(self._table), dtype=np.bool_)
        reader = ChunkReader(self.store.work, self._table)
        buffer = memoryview(bytearray(self._table.longest_bytes))

        def verify(chunk: int) -> None:
            with contextlib.suppress(ChecksumError, SourceError):
                reader.read(chunk, buffer[: self._table.nbytes[chunk]])
                verified[chunk] = True

        share = np.flatnonzero(claimed)[self._world.local_rank :: self._world.local_size]
        self._in_slices(share.tolist(), verify)
        reader.close()
        wanted = self._table.of_files(self.new_files)
        return wanted & ~here.any_rank(verified)

    def _prepare(self) -> Flags:
        try:
            return self.store.prepare(self.new_files)
        except NoSpaceError:
            self.store.discard_work()
            raise

    def publish(self, source: str) -> None:
        """Make this node's files durable, each rank its share of them, and give them their final names."""
        self._in_slices(self.new_files[self._world.local_rank :: self._world.local_size], self.store.sync)
        with self._all.together():
            if self._leads and self.lacks_something:
                self.store.publish(self._policy, self.new_files, source)

    def _in_slices(self, items: Sequence[int], action: Callable[[int], None]) -> None:
        """Run `action` on each of this rank's items, and hear from the other ranks every few seconds."""
        left = deque(items)
        some_left = self._all.gather_all(bool(left))
        while any(some_left):
            with self._all.together() as words:
                end = time.monotonic() + _SLICE_SECONDS
                while left and time.monotonic() < end:
                    self._raise_if_stopped()
                    action(left.popleft())
                words.mine = bool(left)
            some_left = words.all

    def _raise_if_stopped(self) -> None:
        if self._stop_requested():
            raise InterruptedRunError("stage-in was stopped by a signal: run the same command again to resume it")
