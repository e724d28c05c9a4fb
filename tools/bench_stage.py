"""`stagein bench stage`: our stage-in beside a chunked MPI broadcast and `cp` on every node, in interleaved rounds of one job.

Every rank plays a node of its own, unless STAGEIN_NODE says otherwise. All contestants bring all files of the data set to a
folder of each node and make them durable; a round counts as long as its slowest rank.
"""

import fcntl
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from stagein.chunk_io import ChunkReader
from stagein.formats.checksums import pwrite_all
from stagein.formats.errors import UsageError
from stagein.formats.manifest import Manifest
from stagein.stage_plan import ChunkTable, Place
from stagein.staging import DEFAULT_MEMORY_BYTES, StageJob
from stagein.world import NODE_VARIABLE, Communicator, connect

from .rates import print_rates

BASELINE = "Bcast of chunks"
_WARM_UP_ROUNDS = 1

Contestant = Callable[[Path], object]
"""Brings the data set below this node's folder."""


class SharedRate:
    """A source that gives so many bytes a second to all ranks of this machine together, as a busy file system does."""

    def __init__(self, folder: Path, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._clock = os.open(folder / "source-clock", os.O_CREAT | os.O_RDWR)

    def reserve(self, nbytes: int) -> float:
        """Book the next slot for `nbytes`; returns the time (monotonic, seconds) at which it ends."""
        fcntl.flock(self._clock, fcntl.LOCK_EX)
        booked_until = float(os.pread(self._clock, 32, 0) or b"0")
        end = max(booked_until, time.monotonic()) + nbytes / self._bytes_per_second
        os.pwrite(self._clock, b"%032.9f" % end, 0)
        fcntl.flock(self._clock, fcntl.LOCK_UN)
        return end


class PacedReader(ChunkReader):
    """Reads at the rate of a shared source; `verifies` says whether sums are checked."""

    def __init__(self, root: Path, table: ChunkTable, *, rate: SharedRate | None = None, verifies: bool = True) -> None:
        super().__init__(root, table)
        self._rate, self._verifies = rate, verifies

    def _fill(self, place: Place, buffer: memoryview) -> None:
        end = self._rate.reserve(place.nbytes) if self._rate else 0.0
        super()._fill(place, buffer)
        time.sleep(max(0.0, end - time.monotonic()))

    def _is_right(self, place: Place, buffer: memoryview) -> bool:
        return not self._verifies or super()._is_right(place, buffer)


def run_stage(source: Path, work: Path, rounds: int, source_rate: int | None) -> None:
    """Measure and print on rank 0: a line of JSON for each contestant, then a table of ratios to the broadcast.

    work         folder for the copies, one folder a node in it; removed at the end.
    source_rate  bytes a second that the source gives to all nodes together; None: as it is.

    Raises UsageError on a single node.
    """
    communicator = connect()
    if communicator.world.nodes == 1 and NODE_VARIABLE not in os.environ:
        os.environ[NODE_VARIABLE] = f"node{communicator.world.rank}"
        communicator = connect()
    if communicator.world.nodes == 1:
        raise UsageError("there is nobody to pass anything on to: start it with mpirun -n 2 or more")
    manifest = Manifest.load(source)
    try:
        rates = _bench(communicator, source, work, rounds, source_rate)
    finally:
        communicator.barrier()
        shutil.rmtree(work, ignore_errors=True)
    if communicator.world.rank == 0:
        settings = {"nodes": communicator.world.nodes, "mb": manifest.nbytes // 10**6, "source_rate": source_rate}
        print_rates("stage", rates, BASELINE, unit="MB/s", **settings)


def _bench(
    communicator: Communicator, source: Path, work: Path, rounds: int, source_rate: int | None
) -> dict[str, list[float]]:
    """MB a second that reach every node, for each contestant and round."""
    work.mkdir(parents=True, exist_ok=True)
    rate = SharedRate(work, source_rate) if source_rate else None
    contestants: dict[str, Contestant] = {
        BASELINE: partial(_broadcast, communicator, source, rate),
        "stagein": partial(_stage, communicator, source, partial(PacedReader, rate=rate)),
        "stagein, unverified": partial(_stage, communicator, source, partial(PacedReader, rate=rate, verifies=False)),
        "every node reads" if rate else "cp on every node": partial(_copy, communicator, source, rate),
    }
    nbytes = Manifest.load(source).nbytes
    order = random.Random(0)  # the same on every rank
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(_WARM_UP_ROUNDS + rounds):
        for name in order.sample(list(contestants), len(contestants)):
            folder = work / communicator.world.node_name
            if communicator.world.local_rank == 0:
                folder.mkdir()
            communicator.barrier()
            started = time.perf_counter()
            contestants[name](folder)
            slowest = max(communicator.gather_all(time.perf_counter() - started))
            if communicator.world.local_rank == 0:
                shutil.rmtree(folder)
            if number >= _WARM_UP_ROUNDS:
                rates[name].append(nbytes / 1e6 / slowest)
    if source_rate:
        rates["read-once bound"] = [source_rate / 1e6] * rounds
    return rates


def _stage(
    communicator: Communicator, source: Path, open_source: Callable[[Path, ChunkTable], ChunkReader], folder: Path
) -> None:
    job = StageJob(source, str(folder), communicator, policy="replicate", open_source=open_source)
    job.run(DEFAULT_MEMORY_BYTES)


def _broadcast(communicator: Communicator, source: Path, rate: SharedRate | None, folder: Path) -> None:
    """Rank 0 reads a chunk, MPI broadcasts it, every node writes it; the next one follows."""
    assert communicator.mpi is not None
    table = ChunkTable(Manifest.load(source))
    reader = PacedReader(source, table, rate=rate, verifies=False)
    buffer = memoryview(bytearray(table.longest_bytes))
    with _Files(folder, table) as files:
        for chunk in range(len(table)):
            content = buffer[: table.nbytes[chunk]]
            if communicator.world.rank == 0:
                reader.read(chunk, content)
            communicator.mpi.Bcast(content, root=0)
            if communicator.world.local_rank == 0:
                files.write(table.place(chunk), content)
    reader.close()


def _copy(communicator: Communicator, source: Path, rate: SharedRate | None, folder: Path) -> None:
    """Every node reads all of the source: with cp, or chunk by chunk from a source with a rate."""
    if communicator.world.local_rank != 0:
        return
    if rate is None:
        subprocess.run(["cp", "-r", str(source), str(folder / "copy")], check=True)
        return
    table = ChunkTable(Manifest.load(source))
    reader = PacedReader(source, table, rate=rate, verifies=False)
    buffer = memoryview(bytearray(table.longest_bytes))
    with _Files(folder, table) as files:
        for chunk in range(len(table)):
            content = buffer[: table.nbytes[chunk]]
            reader.read(chunk, content)
            files.write(table.place(chunk), content)
    reader.close()


class _Files:
    """The files of a data set as a peer writes them: one after the other, each made durable."""

    def __init__(self, folder: Path, table: ChunkTable) -> None:
        self._folder, self._table = folder, table
        self._descriptor, self._file = -1, -1

    def write(self, place: Place, content: memoryview) -> None:
        if place.file != self._file:
            self._finish()
            path = self._folder / place.name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor, self._file = os.open(path, os.O_WRONLY | os.O_CREAT), place.file
        pwrite_all(self._descriptor, content, place.offset)

    def _finish(self) -> None:
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
            os.close(self._descriptor)

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
