"""`stagein bench decode`: compressed tensors from memory into the caller's array, with one thread and with several.

As many processes, each with one thread and a batch of its own, say what the machine has for so many threads: they share nothing.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stagein.formats import Dataset, Writer
from stagein.formats.codecs import Codec, CodecName
from stagein.formats.library_readers import Read, read_by_h5py, read_by_tensorstore

from .console import say
from .rates import print_rates, print_ratio

_SHAPE = (4, 64, 64, 64)
_RECORDS, _BATCH = 64, 8
_ROUND_SECONDS = 0.4
_START_SECONDS = 60


def run_decode(codec: CodecName, threads: int, rounds: int, work: Path | None) -> None:
    """Write counts of particles as CosmoFlow has them, and read random batches of them in interleaved rounds."""
    with tempfile.TemporaryDirectory(prefix="stagein-bench-", dir=work) as folder:
        path = Path(folder) / "x.st"
        container: Literal["hdf5", "hdf5+zarr"] = "hdf5" if codec == "lz4" else "hdf5+zarr"
        with Writer(path, codec={"x": Codec(name=codec)}, container=container) as writer:
            for record in np.random.default_rng(0).poisson(0.6, (_RECORDS, *_SHAPE)).astype(np.int16):
                writer.write({"x": record})
        out = _room()
        contestants = _prepare(path, threads)
        for read in contestants.values():
            read(range(_BATCH), out)
        rounds_of: dict[str, Callable[[], float]] = {
            name: lambda read=read: _megabytes_per_second(read, out)  # type: ignore[misc]
            for name, read in contestants.items()
        }
        with _processes(path, threads) as in_processes:
            rounds_of[f"{threads} processes"] = in_processes
            rates: dict[str, list[float]] = {name: [] for name in rounds_of}
            for _ in range(rounds):
                for name, rate in rounds_of.items():
                    rates[name].append(rate())
        stored = int(Dataset(path).index.nbytes.sum())
    ratio = round(_RECORDS * out[0].nbytes / stored, 2)
    print_rates("decode", rates, baseline="stagein, 1 thread", unit="MB/s", codec=codec, threads=threads, ratio=ratio)
    print_ratio(rates, f"stagein, {threads} threads", f"{threads} processes")


def _prepare(path: Path, threads: int) -> dict[str, Read]:
    contestants = {"stagein, 1 thread": _ours(path, 1), f"stagein, {threads} threads": _ours(path, threads)}
    openers: dict[str, Callable[[], Read]] = {"h5py": lambda: read_by_h5py(path)}
    if "zarr" in Dataset(path).manifest.container:
        openers["tensorstore"] = lambda: read_by_tensorstore(path, threads)
    for name, open_reader in openers.items():
        try:
            contestants[name] = open_reader()
        except ImportError as error:
            say(f"{name} is left out: {error}")
    return contestants


def _ours(path: Path, threads: int) -> Read:
    reader = Dataset(path).reader
    return lambda records, out: reader.read_tensors(records, out, threads=threads)


@contextmanager
def _processes(path: Path, count: int) -> Iterator[Callable[[], float]]:
    """Yields what runs a round in so many processes at once and returns their rates together."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(count, _start_process, (path, context.Barrier(count, timeout=_START_SECONDS))) as pool:
        yield lambda: sum(pool.map(_rate_of_process, range(count), chunksize=1))


def _start_process(path: Path, barrier: Barrier) -> None:
    """Have in this process what its rounds take."""
    global _work
    _work = _ours(path, 1), _room(), barrier
    _work[0](range(_BATCH), _work[1])


def _rate_of_process(number: int) -> float:
    read, out, barrier = _work
    barrier.wait()  # for the others: none takes the part of two
    return _megabytes_per_second(read, out)


_work: tuple[Read, NDArray[np.int16], Barrier]
"""Of a process of `_processes`."""


def _room() -> NDArray[np.int16]:
    return np.zeros((_BATCH, *_SHAPE), np.int16)


def _megabytes_per_second(
    read: Callable[[Sequence[int], NDArray[np.generic]], object], out: NDArray[np.int16]
) -> float:
    """Of decoded bytes."""
    random, batches = np.random.default_rng(0), 0
    started = time.perf_counter()
    while (taken := time.perf_counter() - started) < _ROUND_SECONDS:
        read(random.integers(0, _RECORDS, _BATCH).tolist(), out)
        batches += 1
    return batches * out.nbytes / 1e6 / taken
