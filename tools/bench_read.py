"""`stagein bench read` and `bench write`: records of one size, random ones read from memory, beside raw files and installed peers."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stagein.formats import Dataset, Field, Schema, Writer
from stagein.formats.peers import PEERS, Read
from stagein.formats.publish import publish_file

from .console import say
from .rates import print_rates

_BATCH_BYTES = 8 << 20
_MOST_IN_BATCH = 256
_ROUND_SECONDS = 0.4
_START_SECONDS = 60
_MOST_IN_WRITE = 1024
"""Pieces of memory that one writev takes (IOV_MAX)."""
_SHARD_BYTES = 64 << 20
_SCHEMA = Schema(fields={"x": Field(kind="encoded", encoding="bytes", shape=(None,))})


def run_read(record_bytes: int, total_bytes: int, threads: int, rounds: int, work: Path | None) -> None:
    """Write `total_bytes` of records in every format below `work`, and read random batches of them in interleaved rounds."""
    records = _make_records(record_bytes, total_bytes)
    batch = max(1, min(_MOST_IN_BATCH, _BATCH_BYTES // record_bytes))
    with tempfile.TemporaryDirectory(prefix="stagein-bench-", dir=work) as folder:
        contestants = _prepare(Path(folder), records)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, open_reader in contestants.items():
                rates[name].append(_records_per_second(open_reader, len(records), batch, threads))
    settings = {"record_bytes": record_bytes, "batch": batch, "threads": threads, "records": len(records)}
    print_rates("read", rates, baseline="os.preadv", unit="records/s", **settings)


def run_write(record_bytes: int, total_bytes: int, rounds: int, work: Path | None) -> None:
    """Write the same records in every format, and raw: to files as large by `writev`, fsync and rename; in interleaved rounds."""
    records = _make_records(record_bytes, total_bytes)
    writers: dict[str, Callable[[Path, Sequence[bytes]], None]] = {
        "raw, fsync, rename": _write_raw,
        "stagein": _write_ours,
    }
    writers |= {peer.name: peer.write for peer in PEERS if peer.name != "tensorstore"}
    rates: dict[str, list[float]] = {name: [] for name in writers}
    with tempfile.TemporaryDirectory(prefix="stagein-bench-", dir=work) as folder:
        for number in range(rounds):
            for name in list(rates)[:: 1 if number % 2 == 0 else -1]:  # none always comes after the same other
                target = Path(folder) / "x"
                os.sync()
                started = time.perf_counter()
                try:
                    writers[name](target, records)
                except ImportError as error:
                    say(f"{name} is left out: {error}")
                    del rates[name]
                    continue
                os.sync()  # peers leave their bytes in memory
                rates[name].append(len(records) * record_bytes / 1e6 / (time.perf_counter() - started))
                shutil.rmtree(target)
    print_rates(
        "write", rates, baseline="raw, fsync, rename", unit="MB/s", record_bytes=record_bytes, records=len(records)
    )


def _make_records(record_bytes: int, total_bytes: int) -> list[bytes]:
    random = np.random.default_rng(0)
    return [random.bytes(record_bytes) for _ in range(max(2, total_bytes // record_bytes))]


def _prepare(folder: Path, records: Sequence[bytes]) -> dict[str, Callable[[], Read]]:
    """Write every format; a function a contestant that opens it for a thread."""
    _write_ours(folder / "stagein", records)
    dataset = Dataset(folder / "stagein")
    contestants: dict[str, Callable[[], Read]] = {
        "os.preadv": lambda: _open_preadv(dataset),
        "stagein": lambda: _open_ours(dataset, check=True),
        "stagein, no crc32c": lambda: _open_ours(dataset, check=False),
    }
    for peer in PEERS:
        target = folder / peer.name.split(",")[0]
        try:
            peer.write(target, records)
            assert peer.open_reader(target)(np.array([1, 0])) == 2 * len(records[0])
        except ImportError as error:
            say(f"{peer.name} is left out: {error}")
            continue
        contestants[peer.name] = lambda peer=peer, target=target: peer.open_reader(target)  # type: ignore[misc]
    return contestants


def _write_ours(target: Path, records: Sequence[bytes]) -> None:
    with Writer(target, _SCHEMA, shard_bytes=_SHARD_BYTES) as writer:
        for record in records:
            writer.write({"x": record})


def _write_raw(target: Path, records: Sequence[bytes]) -> None:
    """The same bytes in files as large as shards, straight from where they are, each made durable as shards are."""
    target.mkdir()
    each = max(1, _SHARD_BYTES // len(records[0]))
    for first in range(0, len(records), each):
        with publish_file(target / f"{first}") as part, open(part, "wb", buffering=0) as file:
            stop = min(first + each, len(records))
            for start in range(first, stop, _MOST_IN_WRITE):
                pieces = records[start : min(start + _MOST_IN_WRITE, stop)]
                assert os.writev(file.fileno(), pieces) == sum(map(len, pieces))


def _open_ours(dataset: Dataset, *, check: bool) -> Read:
    reader, buffer = dataset.reader, _Buffer(dataset)

    def read(numbers: NDArray[np.int64]) -> int:
        packed = reader.read_packed(numbers, buffer.room(len(numbers)), check=check)
        return int(packed.start[-1] + packed.nbytes[-1])

    return read


def _open_preadv(dataset: Dataset) -> Read:
    """The same bytes from the same files into the same kind of buffer, by nothing but `os.preadv`."""
    index, buffer = dataset.index, _Buffer(dataset)
    descriptors = [os.open(dataset.path / shard.file, os.O_RDONLY) for shard in dataset.manifest.shards]

    def read(numbers: NDArray[np.int64]) -> int:
        places = [array[numbers].tolist() for array in (index.shard, index.offset, index.nbytes)]
        room, position, preadv = buffer.room(len(numbers)), 0, os.preadv
        for shard, offset, nbytes in zip(*places, strict=True):
            preadv(descriptors[shard], [room[position : position + nbytes]], offset)
            position += nbytes
        return position

    return read


class _Buffer:
    """Memory of a thread, used for one batch after the other."""

    def __init__(self, dataset: Dataset) -> None:
        self._largest_bytes = int(dataset.index.nbytes.max())
        self._memory = np.zeros(0, np.uint8)

    def room(self, num_records: int) -> memoryview:
        """For so many records, of whatever size."""
        if len(self._memory) < num_records * self._largest_bytes:
            self._memory = np.zeros(num_records * self._largest_bytes, np.uint8)
        return memoryview(self._memory)


def _records_per_second(open_reader: Callable[[], Read], num_records: int, batch: int, threads: int) -> float:
    """Of all threads together, from the start of the first to the end of the last; each has a reader and an order of its own.

    The last thread that is ready sets the clock: one that only looks on may wait for the GIL for seconds while they work.
    """
    started_at = 0.0

    def set_clock() -> None:
        nonlocal started_at
        started_at = time.perf_counter()

    start = threading.Barrier(threads, set_clock, timeout=_START_SECONDS)

    def work(number: int) -> tuple[int, float]:
        """How many records it read, and when it ended."""
        read, random, count = open_reader(), np.random.default_rng(number), 0
        read(random.integers(0, num_records, batch))
        start.wait()
        while (now := time.perf_counter()) < started_at + _ROUND_SECONDS:
            read(random.integers(0, num_records, batch))
            count += batch
        return count, now

    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(work, range(threads)))
    return sum(count for count, _ in done) / (max(ended_at for _, ended_at in done) - started_at)
