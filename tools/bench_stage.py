"""`stagein bench stage`: our stage-in beside a chunked MPI broadcast and `cp` on every node, in interleaved rounds of one job.

Every rank plays a node of its own, unless STAGEIN_NODE says otherwise. All contestants bring all files of the data set to a
folder of each node; a round counts as long as its slowest rank. The others run as people use them, which trusts every byte and
leaves it in the page cache, and once more made as trustworthy as ours: sums checked where bytes are read and where they
arrive, files made durable before they get their names.
"""

import fcntl
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from stagein.chunk_io import ChunkReader
from stagein.formats.checksums import pwrite_all
from stagein.formats.errors import UsageError
from stagein.formats.manifest import Manifest
from stagein.formats.publish import PART_SUFFIX, fsync_folder
from stagein.stage_plan import ChunkTable, Place
from stagein.staging import DEFAULT_MEMORY_BYTES, StageJob
from stagein.world import NODE_VARIABLE, Communicator, connect

from .rates import print_rates, print_ratio

OURS = "stagein"
BASELINE = "Bcast of chunks"
_NO_SOURCE = "writing alone"
_BOUND = "read-once bound"
_EQUALS = ("Bcast, verified", "cp, verified")
_DOES = {
    BASELINE: "the first rank reads a chunk, MPI broadcasts it, every node writes it to its page cache; then the next",
    "Bcast, verified": "the same, sums checked at the source and on arrival, files made durable, then named",
    "cp on every node": "every node reads all of the source and writes it to its page cache; without a source rate by `cp -r`",
    "cp, verified": "the same, sums checked in what was read (of cp in its copy), files made durable, then named",
    OURS: "every node reads its part and passes it on; checked and made durable as the verified ones, resumable",
    f"{OURS}, unverified": "the same without sums",
    _NO_SOURCE: "every node writes as many bytes, read from nowhere: what none of the others can outdo here",
    _BOUND: "each byte read once at the rate of the source",
}
"""What each contestant does, for those who read its rate."""
_WARM_UP_ROUNDS = 1

Contestant = Callable[[Path], object]
"""Brings the data set below this node's folder."""


class SharedRate:
    """A source that gives so many bytes a second to all ranks of this machine together, as a busy file system does."""

    def __init__(self, folder: Path, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._clock = os.open(folder / "source-clock", os.O_CREAT | os.O_RDWR)
        self._turn = threading.Lock()  # the lock of the file holds off other ranks, not other threads of this one

    def reserve(self, nbytes: int) -> float:
        """Book the next slot for `nbytes`; returns the time (monotonic, seconds) at which it ends."""
        with self._turn:
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

    def is_right(self, chunk: int, buffer: memoryview) -> bool:
        return not self._verifies or super().is_right(chunk, buffer)


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
    with communicator.together():
        manifest = Manifest.load(source)
    try:
        rates = _bench(communicator, source, work, rounds, source_rate)
    finally:
        communicator.barrier()
        shutil.rmtree(work, ignore_errors=True)
    if communicator.world.rank == 0:
        for name in rates:
            print(f"{name}: {_DOES[name]}")
        settings = {"nodes": communicator.world.nodes, "mb": manifest.nbytes // 10**6, "source_rate": source_rate}
        print_rates("stage", rates, BASELINE, unit="MB/s", **settings)
        for theirs in [*_EQUALS, f"{OURS}, unverified", _BOUND if source_rate else _NO_SOURCE]:
            print_ratio(rates, OURS, theirs)


def _bench(
    communicator: Communicator, source: Path, work: Path, rounds: int, source_rate: int | None
) -> dict[str, list[float]]:
    """MB a second that reach every node, for each contestant and round."""
    work.mkdir(parents=True, exist_ok=True)
    rate = SharedRate(work, source_rate) if source_rate else None
    contestants: dict[str, Contestant] = {
        BASELINE: partial(_broadcast, communicator, source, rate, verifies=False),
        "Bcast, verified": partial(_broadcast, communicator, source, rate, verifies=True),
        "cp on every node": partial(_copy, communicator, source, rate, verifies=False),
        "cp, verified": partial(_copy, communicator, source, rate, verifies=True),
        OURS: partial(_stage, communicator, source, partial(PacedReader, rate=rate)),
        f"{OURS}, unverified": partial(_stage, communicator, source, partial(PacedReader, rate=rate, verifies=False)),
    }
    if rate is None:
        contestants[_NO_SOURCE] = partial(_write, communicator, source)
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
        rates[_BOUND] = [source_rate / 1e6] * rounds
    return rates


def _stage(
    communicator: Communicator, source: Path, open_source: Callable[[Path, ChunkTable], ChunkReader], folder: Path
) -> None:
    job = StageJob(source, str(folder), communicator, policy="replicate", open_source=open_source)
    job.run(DEFAULT_MEMORY_BYTES)


def _broadcast(
    communicator: Communicator, source: Path, rate: SharedRate | None, folder: Path, *, verifies: bool
) -> None:
    """Rank 0 reads a chunk, MPI broadcasts it, every node writes it; the next one follows."""
    assert communicator.mpi is not None
    table = ChunkTable(Manifest.load(source))
    reader = PacedReader(source, table, rate=rate, verifies=verifies)
    buffer = memoryview(bytearray(table.longest_bytes))
    with _Files(folder, table, durable=verifies) as files:
        for chunk in range(len(table)):
            content = buffer[: table.nbytes[chunk]]
            if communicator.world.rank == 0:
                reader.read(chunk, content)
            communicator.mpi.Bcast(content, root=0)
            if communicator.world.rank != 0 and not reader.is_right(chunk, content):
                reader.read(chunk, content)
            if communicator.world.local_rank == 0:
                files.write(table.place(chunk), content)
    reader.close()


def _copy(communicator: Communicator, source: Path, rate: SharedRate | None, folder: Path, *, verifies: bool) -> None:
    """Every node reads all of the source: with cp, or, as that cannot be paced, chunk by chunk from a source with a rate.

    verifies  the bytes are checked, those of cp by reading its copies back, the others when they are read; the copies are
              made durable, and renamed.
    """
    if communicator.world.local_rank != 0:
        return
    table = ChunkTable(Manifest.load(source))
    buffer = memoryview(bytearray(table.longest_bytes))
    if rate is None:
        copy = folder / f"copy{PART_SUFFIX if verifies else ''}"
        subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
        if verifies:
            _check_and_publish(copy, table, buffer)
        return
    reader = PacedReader(source, table, rate=rate, verifies=verifies)
    with _Files(folder, table, durable=verifies) as files:
        for chunk in range(len(table)):
            content = buffer[: table.nbytes[chunk]]
            reader.read(chunk, content)
            files.write(table.place(chunk), content)
    reader.close()


def _check_and_publish(copy: Path, table: ChunkTable, buffer: memoryview) -> None:
    """What a careful script does after cp: every file is read back and checked, made durable, and gets its name."""
    reader = ChunkReader(copy, table)
    for chunk in range(len(table)):
        reader.read(chunk, buffer[: table.nbytes[chunk]])
    reader.close()
    for entry in table.files:
        with open(copy / entry.file, "rb") as file:
            os.fsync(file.fileno())
    copy.rename(copy.with_suffix(""))
    fsync_folder(copy.parent)


def _write(communicator: Communicator, source: Path, folder: Path) -> None:
    """Every node writes as many bytes to its files, read from nowhere: no stage-in to these disks can be faster."""
    if communicator.world.local_rank != 0:
        return
    table = ChunkTable(Manifest.load(source))
    buffer = memoryview(bytearray(table.longest_bytes))
    with _Files(folder, table, durable=False) as files:
        for chunk in range(len(table)):
            files.write(table.place(chunk), buffer[: table.nbytes[chunk]])


class _Files:
    """The files of a data set as a peer writes them, one after the other; if wanted each is made durable, then named."""

    def __init__(self, folder: Path, table: ChunkTable, *, durable: bool) -> None:
        self._folder, self._table, self._durable = folder, table, durable
        self._descriptor, self._file = -1, -1

    def write(self, place: Place, content: memoryview) -> None:
        if place.file != self._file:
            self._finish()
            path = self._path(place.file, PART_SUFFIX if self._durable else "")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor, self._file = os.open(path, os.O_WRONLY | os.O_CREAT), place.file
        pwrite_all(self._descriptor, content, place.offset)

    def _path(self, file: int, suffix: str) -> Path:
        return self._folder / (self._table.files[file].file + suffix)

    def _finish(self) -> None:
        if self._descriptor < 0:
            return
        if self._durable:
            os.fsync(self._descriptor)
            path = self._path(self._file, "")
            self._path(self._file, PART_SUFFIX).rename(path)
            fsync_folder(path.parent)
        os.close(self._descriptor)

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
