"""Stage-in: bring a data set from the parallel file system to the local disks of the nodes of a job, once, and verified.

The story of `stage`: read the manifest, look at the destinations, make the plan (`stage_plan.py`), take the lease and reuse what
is there (`node_copy.py`), move the rest (`ring.py`), publish. Every step either succeeds on all ranks or fails on all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stagein import __version__
from stagein.formats.errors import (
    InterruptedRunError,
    NoSpaceError,
    SourceError,
    StageinError,
    UsageError,
    WatchdogError,
    source_error,
)
from stagein.formats.manifest import MANIFEST_NAME, Manifest

from . import inventory
from .bad_files import bad_files_word, refuse_bad_files
from .cache import Store, check_destination, expand_node, mount_of, refuse_odd_mounts
from .chunk_io import ChunkReader, ChunkWriter, describe_changed_file
from .finding import note_destination, note_use
from .live import Live, Watch
from .neighbours import Neighbours, Pulse
from .node_copy import NodeCopy
from .probes import direct_is_faster, probe_disk, probe_network, probe_source
from .receipt import NodeReceipt, Receipt, find_bound
from .ring import Engine, Progress, Transfer
from .stage_plan import ChunkTable, Flags, NodeRates, NodeSpace, PlanSummary, Policy, make_plan, rank_work, stored_bytes
from .stop_signals import STOP_SIGNALS, StopSignals
from .time_left import job_seconds_left
from .world import NODE_VARIABLE, Communicator, World, connect

if TYPE_CHECKING:
    from mpi4py import MPI

DEFAULT_MEMORY_BYTES = 128 << 20
DEFAULT_TIMEOUT_SECONDS = 300.0
DEFAULT_PROBE_SECONDS = 1.0

_PROBED_BYTES = 8 << 30
_DIRECT_PROBE_SECONDS = 0.3
"""A node that gets so much tries for so long, twice, how its disk is written fastest."""


_ENOUGH_BYTES = 1 << 62


def stage(
    source: Path | str,
    to: str,
    *,
    policy: Policy = "auto",
    copies: int | None = None,
    world: Communicator | MPI.Comm | None = None,
    make_room: bool = False,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Receipt:
    """Stage the data set `source` below the node-local folder `to`, in which `{node}` stands for the node's name.

    All ranks of the job call it together and get the same receipt. Each byte of the source is read once, checked against the
    manifest where it is read and where it arrives, and published only when all of it is right and durable. What is already
    there is reused, so that the same call after an interruption resumes, and after a success returns at once.

    policy, copies   as `make_plan` has them: auto, replicate, partition, or a number of nodes that get each shard.
    world            the ranks that stage together; None: all that the launcher started, or this process alone.
    make_room        evict other data sets, those unused for longest first, where this one would not fit otherwise.
    memory_bytes     upper bound of the buffers of each rank; at least four chunks are taken.
    timeout_seconds  how long nothing may move before the job is given up, with a sentence that names what was waited for.
    progress         called on each rank with the bytes it has finished and has to finish.
    watch            called on the first rank with a view of all nodes, about once a second and when a phase begins.

    Raises a StageinError on every rank: UsageError, SourceError, NoSpaceError, ChecksumError, InterruptedRunError (after
    SIGTERM, SIGINT or SIGUSR1; resumable). A WatchdogError ends all ranks of an MPI job with exit code 75.
    """
    communicator = _join(world, timeout_seconds)
    try:
        with StopSignals((*STOP_SIGNALS, signal.SIGINT)) as signals:
            job = StageJob(
                Path(source),
                to,
                communicator,
                policy=policy,
                copies=copies,
                make_room=make_room,
                stop_requested=lambda: signals.received is not None,
            )
            return job.run(memory_bytes, progress, watch)
    except WatchdogError as error:
        if (
            communicator.mpi is not None and not error.reported_by_peer
        ):  # the other ranks cannot be reached in an orderly way any more
            print(f"stagein: {error}", file=sys.stderr, flush=True)
            communicator.abort(error.exit_code)
        raise


def plan_stage(
    source: Path | str,
    to: str,
    *,
    policy: Policy = "auto",
    copies: int | None = None,
    world: Communicator | MPI.Comm | None = None,
    probe_seconds: float = DEFAULT_PROBE_SECONDS,
    seconds_left: float | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> PlanSummary:
    """What `stage` would do, and how long it would take at least; leaves nothing behind.

    probe_seconds  how long the source, the network and the disks are probed, each; 0: not at all, and nothing is predicted.
    seconds_left   what is left to the job; None: what Slurm says of it.

    Raises as `stage` does before it moves the first byte.
    """
    job = StageJob(Path(source), to, _join(world, timeout_seconds), policy=policy, copies=copies)
    return job.preview(probe_seconds, seconds_left)


def _join(world: Communicator | MPI.Comm | None, timeout_seconds: float) -> Communicator:
    if world is None:
        return connect(timeout_seconds)
    return world.within(timeout_seconds) if isinstance(world, Communicator) else Communicator(world, timeout_seconds)


@dataclass
class Phases:
    """Wall-clock seconds of the phases on this rank."""

    prepare_seconds: float = 0.0
    transfer_seconds: float = 0.0
    publish_seconds: float = 0.0


class StageJob:
    """One stage-in as one rank sees it. The constructor makes the plan and moves nothing."""

    def __init__(
        self,
        source: Path,
        to: str,
        communicator: Communicator,
        *,
        policy: Policy = "auto",
        copies: int | None = None,
        make_room: bool = False,
        stop_requested: Callable[[], bool] = lambda: False,
        open_source: Callable[[Path, ChunkTable], ChunkReader] = ChunkReader,
    ) -> None:
        self._start = time.monotonic()
        self._source, self._open_source = source, open_source
        self._all, self._world = communicator, communicator.world
        self._leads = self._world.local_rank == 0
        self._stop_requested = stop_requested
        with communicator.together():
            if not to:
                raise UsageError("the destination is empty: is the variable set that should name it?")
        self.manifest = self._load_manifest()
        self._table = ChunkTable(self.manifest)
        self._store = Store(expand_node(to, self._world.node_name), self.manifest)
        self._check_source()
        space = self._look_at_destination()
        self._check_mounts(to)
        self._evicted_bytes = 0
        if make_room:
            self._make_room(space, policy, copies)
            space = self._look_at_destination()
        with self._all.together():
            self.plan = make_plan(self.manifest, space, policy, copies)
        files = self.plan.files_of(self._world.node)
        self._copy = NodeCopy(communicator, self._store, self._table, self.plan.policy, files, stop_requested)

    def preview(self, probe_seconds: float, seconds_left: float | None) -> PlanSummary:
        """The plan in numbers, with a prediction from probes of all nodes; what a journal lists is taken as there."""
        here = self._all.on_this_node()
        is_there = self._copy.complete(here)
        here.free()
        missing = np.zeros(len(self._table), dtype=np.bool_)
        if self._leads:
            missing = self._table.of_files(self._copy.new_files) & ~self._store.journaled()
        gathered = self._all.gather_all(self._table.total_bytes(missing) if self._leads else None)
        gets_bytes = [nbytes for nbytes in gathered if nbytes is not None]
        rates = self._probe(probe_seconds) if probe_seconds and not is_there else []
        if seconds_left is None and self._world.rank == 0:
            seconds_left = job_seconds_left()
        seconds_left = self._all.broadcast(seconds_left)
        return self.plan.summary(
            self.manifest,
            gets_bytes,
            self._all.any_rank(missing),
            is_there=is_there,
            rates=rates,
            seconds_left=seconds_left,
        )

    def _probe(self, seconds: float) -> list[NodeRates]:
        """The rates of every node; those of its ranks are added."""
        everything = np.ones(len(self._table), dtype=np.bool_)
        work = rank_work(self.plan, self._table, self._world, everything)
        network, source, disk = 0.0, 0.0, 0.0
        ring = self._ring()
        apart = self._all.duplicate()
        with self._all.together():
            if apart.mpi is not None and work.by_origin:
                network = probe_network(self._all, apart.mpi, ring, seconds)
        apart.free()
        with self._all.together():
            source = probe_source(self._open_source(self._source, self._table), self._table, work.reads, seconds)
        with self._all.together():
            if self._leads:
                disk = probe_disk(self._store.to, seconds, self._store.free_bytes() // 2)
        of_ranks = self._all.gather_all((self._world.node, source, network, disk))
        sums = [
            [sum(rank[part] for rank in of_ranks if rank[0] == node) for part in (1, 2, 3)]
            for node in range(self._world.nodes)
        ]
        return [NodeRates(source=source, network=network or None, disk=disk) for source, network, disk in sums]

    def _choose_direct_writes(self, here: Communicator, missing: Flags) -> bool:
        """Whether this node writes past its page cache: probed where there is enough to write for that to matter."""
        direct = False
        with self._all.together():
            if self._leads and self._table.total_bytes(missing) >= _PROBED_BYTES:
                direct = direct_is_faster(self._store.to, _DIRECT_PROBE_SECONDS, self._store.free_bytes() // 2)
        return bool(here.broadcast(direct))

    @cached_property
    def _worlds(self) -> list[World]:
        """The places of all ranks; collective when it is first asked for."""
        return self._all.gather_all(self._world)

    def _ring(self) -> list[World]:
        """The ranks that pass chunks on with this one, by their place."""
        mates = [world for world in self._worlds if world.local_rank == self._world.local_rank]
        return sorted(mates, key=lambda world: self.plan.ring.index(world.node))

    def run(self, memory_bytes: int, progress: Progress | None = None, watch: Watch | None = None) -> Receipt:
        """Bring this node's files here, unless they are here already."""
        here = self._all.on_this_node()
        receipt = self._bring_files(here, memory_bytes, progress, watch)
        here.free()
        with self._all.together():  # a signal that came when nothing was left to do is not to be lost, either
            if self._stop_requested():
                raise InterruptedRunError(
                    "stage-in was asked to stop when it was done: the same command finds it complete"
                )
        return receipt

    def _bring_files(
        self, here: Communicator, memory_bytes: int, progress: Progress | None, watch: Watch | None
    ) -> Receipt:
        phases = Phases()
        nothing = np.zeros(len(self._table), dtype=np.bool_)
        if self._copy.complete(here):
            return self._make_receipt(Transfer(), nothing, phases)
        words = self._all.duplicate()
        live = Live(self._all, words, self._worlds, watch)
        with self._copy.lease(live.wait):
            if self._copy.complete(here):  # another job had the lease before us and did the work
                live.close()
                words.free()
                return self._make_receipt(Transfer(), nothing, phases)
            live.begin("preparing")
            missing = self._copy.find_missing(here)
            phases.prepare_seconds = time.monotonic() - self._start
            live.begin("moving")
            transfer = self._move(here, words, missing, memory_bytes, progress, live)
            live.close()
            words.free()
            live.begin("publishing")
            phases.transfer_seconds = time.monotonic() - self._start - phases.prepare_seconds
            self._copy.publish(str(self._source.absolute()))
            phases.publish_seconds = time.monotonic() - self._start - phases.prepare_seconds - phases.transfer_seconds
            return self._make_receipt(transfer, missing, phases)

    def _load_manifest(self) -> Manifest:
        with self._all.together() as contents:
            if self._world.rank == 0:
                manifest = Manifest.load(self._source)
                contents.mine = manifest.to_bytes()
        return manifest if self._world.rank == 0 else Manifest.parse(contents.all[0], self._source / MANIFEST_NAME)

    def _check_source(self) -> None:
        """Find files that are missing or changed before anything is moved; each rank looks at its share of them.

        A folder of the data set may be a link to another place in it, but not to one outside: what lies there is not its own.
        """
        bad: dict[int, StageinError] = {}
        with self._all.together() as reports:
            root, resolve = self._source.resolve(), cache(Path.resolve)
            for file in range(self._world.rank, len(self._table.files), self._world.size):
                entry = self._table.files[file]
                path = self._source / entry.file
                try:
                    status = path.lstat()
                except OSError as error:
                    bad[file] = source_error(error, "reading", path)
                    continue
                if status.st_size != entry.nbytes or not stat.S_ISREG(status.st_mode):
                    bad[file] = SourceError(describe_changed_file(path, status, entry.nbytes))
                elif not resolve(path.parent).is_relative_to(root):
                    bad[file] = SourceError(
                        f"{path} lies outside the data set, in {resolve(path.parent)}: a link on its way leads there; put the "
                        "files themselves in its place"
                    )
            reports.mine = bad_files_word(bad)
        refuse_bad_files(reports.all, self._world.rank)

    def _look_at_destination(self) -> list[NodeSpace]:
        """The room on every node, as its first rank sees it."""
        with self._all.together() as spaces:
            if self._leads:
                node = self._world.node_name
                check_destination(self._store.to, self._source, node, must_be_local=self._has_real_nodes)
                free_bytes, held_bytes = self._store.free_bytes(), self._store.held_bytes()
                spaces.mine = NodeSpace(node, self._world.local_size, free_bytes, held_bytes)
        return [space for space in spaces.all if space is not None]

    @property
    def _has_real_nodes(self) -> bool:
        """Whether there are several nodes, and not one machine that plays them."""
        return self._world.nodes > 1 and NODE_VARIABLE not in os.environ

    def _check_mounts(self, to: str) -> None:
        """The destination is on its own disk on every node, or a sentence says where it is not."""
        if not self._has_real_nodes:
            return
        mount = (self._world.node_name, mount_of(self._store.to)) if self._leads else None
        mounts = dict(filter(None, self._all.gather_all(mount)))
        with self._all.together():
            if self._world.rank == 0:
                refuse_odd_mounts(to, mounts)

    def _make_room(self, space: Sequence[NodeSpace], policy: Policy, copies: int | None) -> None:
        """Evict other data sets where this one would not fit, planned as if every node had all the room it could need."""
        with self._all.together():
            roomy = [replace(node, free_bytes=_ENOUGH_BYTES) for node in space]
            wish = make_plan(self.manifest, roomy, policy, copies)
            if self._leads:
                files = (self._table.files[file] for file in wish.files_of(self._world.node))
                wanted_bytes = sum(map(stored_bytes, files)) - space[self._world.node].held_bytes
                evicted = inventory.make_room(self._store.to, self._world.node_name, wanted_bytes, self.manifest.id)
                self._evicted_bytes = sum(entry.disk_bytes for entry in evicted)

    def _move(
        self,
        here: Communicator,
        words: Communicator,
        missing: Flags,
        memory_bytes: int,
        progress: Progress | None,
        live: Live,
    ) -> Transfer:
        """Move the missing chunks. Where a disk gets full, the work of that node is removed; elsewhere it can be resumed.

        `words` is where the ranks send each other what is no chunk.

        Bad files of the source do not keep the others from being moved: they are listed at the end.
        """

        def note(done_bytes: int, total_bytes: int) -> None:
            live.note(done_bytes, total_bytes)
            if progress is not None:
                progress(done_bytes, total_bytes)

        def stop_requested() -> bool:
            """The engine asks this at every turn, whether anything moves on this rank or not."""
            live.look()
            return self._stop_requested()

        work = rank_work(self.plan, self._table, self._world, self._all.any_rank(missing))
        direct = self._choose_direct_writes(here, missing)
        ring = self._ring()
        chunks = self._all.duplicate()
        neighbours = None
        if chunks.mpi is not None and words.mpi is not None and work.by_origin:
            neighbours = Neighbours(chunks.mpi, words.mpi, ring, work)
        transfer, disk_is_full = Transfer(), False
        try:
            with contextlib.ExitStack() as stack:
                with self._all.together() as to_finish_bytes:
                    journal = (
                        stack.enter_context(self._store.journal(self._world.local_rank)) if missing.any() else None
                    )
                    engine = Engine(
                        work,
                        self._table,
                        missing,
                        self._open_source(self._source, self._table),
                        ChunkWriter(self._store.work, self._table, journal, direct=direct),
                        memory_bytes=memory_bytes,
                        timeout_seconds=self._all.timeout_seconds,
                        stop_requested=stop_requested,
                        progress=note,
                        neighbours=neighbours,
                        pulse=Pulse(words.mpi) if words.mpi is not None else None,
                    )
                    to_finish_bytes.mine = engine.to_finish_bytes
                live.expect(to_finish_bytes.all)
                with self._all.together() as reports:
                    try:
                        transfer = engine.run()
                    except NoSpaceError:
                        disk_is_full = True
                        raise
                    reports.mine = bad_files_word(engine.bad_files)
                refuse_bad_files(reports.all, self._world.rank)
        except WatchdogError:
            raise
        except StageinError:
            if any(here.gather_all(disk_is_full)) and self._leads:
                self._store.discard_work()
            raise
        chunks.free()
        return transfer

    def _make_receipt(self, transfer: Transfer, missing: Flags, phases: Phases) -> Receipt:
        """Add up what the ranks did, and leave the receipt beside READY on every node that got something."""
        transfers = self._all.gather_all((self._world.node, transfer))
        moved = _add_up([transfer for node, transfer in transfers if node == self._world.node])
        here_ranks = self._world.local_size
        nbytes = sum(self._table.files[file].nbytes for file in self._copy.files)
        on_this_node = NodeReceipt(
            node=self._world.node_name,
            path=str(self._store.final),
            ranks=here_ranks,
            files=len(self._copy.files),
            nbytes=nbytes,
            evicted_bytes=self._evicted_bytes,
            reused_bytes=nbytes - self._table.total_bytes(missing),
            **moved,
            **asdict(phases),
        )
        nodes = tuple(filter(None, self._all.gather_all(on_this_node if self._leads else None)))
        receipt = Receipt(
            stagein_version=__version__,
            dataset_id=self.manifest.id,
            source=str(self._source.absolute()),
            policy=self.plan.policy,
            copies=self.plan.copies,
            dataset_bytes=self.manifest.nbytes,
            moved_nothing=all(node.reused_bytes == node.nbytes for node in nodes),
            seconds=time.monotonic() - self._start,
            bound=find_bound(nodes),
            nodes=nodes,
        )
        with self._all.together() as receipts:
            receipts.mine = receipt if self._world.rank == 0 else None
            if self._leads:
                note_destination(self._store.to, self._world.node_name)
                note_use(self._store.final)
                if self._copy.lacks_something:
                    self._store.write_receipt(receipt.to_bytes())
        receipt = receipts.all[0]
        assert isinstance(receipt, Receipt)
        return receipt


def _add_up(transfers: Sequence[Transfer]) -> dict[str, Any]:
    """What the ranks of a node did together: counts are added, of times the longest is taken."""
    return {
        field.name: (max if field.name.endswith("_seconds") else sum)(getattr(moved, field.name) for moved in transfers)
        for field in fields(Transfer)
    }
