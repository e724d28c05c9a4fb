"""`stagein bench decode`: compressed tensors from memory into the caller's array, with one thread and with several."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stagein.formats import Dataset, Writer
from stagein.formats.codecs import Codec, CodecName
from stagein.formats.library_readers import Read, read_by_h5py, read_by_tensorstore

from .console import say
from .rates import print_rates

_SHAPE = (4, 64, 64, 64)
_RECORDS, _BATCH = 64, 8
_ROUND_SECONDS = 0.4


def run_decode(codec: CodecName, threads: int, rounds: int, work: Path | None) -> None:
    """Write counts of particles as CosmoFlow has them, and read random batches of them in interleaved rounds."""
    with tempfile.TemporaryDirectory(prefix="stagein-bench-", dir=work) as folder:
        path = Path(folder) / "x.st"
        container: Literal["hdf5", "hdf5+zarr"] = "hdf5" if codec == "lz4" else "hdf5+zarr"
        with Writer(path, codec={"x": Codec(name=codec)}, container=container) as writer:
            for record in np.random.default_rng(0).poisson(0.6, (_RECORDS, *_SHAPE)).astype(np.int16):
                writer.write({"x": record})
        out = np.zeros((_BATCH, *_SHAPE), np.int16)
        contestants = _prepare(path, threads)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for read in contestants.values():
            read(range(_BATCH), out)
        for _ in range(rounds):
            for name, read in contestants.items():
                rates[name].append(_megabytes_per_second(read, out))
        stored = int(Dataset(path).index.nbytes.sum())
    ratio = round(_RECORDS * out[0].nbytes / stored, 2)
    print_rates("decode", rates, baseline="stagein, 1 thread", unit="MB/s", codec=codec, threads=threads, ratio=ratio)


def _prepare(path: Path, threads: int) -> dict[str, Read]:
    reader = Dataset(path).reader

    def ours(count: int) -> Read:
        return lambda records, out: reader.read_tensors(records, out, threads=count)

    contestants: dict[str, Read] = {"stagein, 1 thread": ours(1), f"stagein, {threads} threads": ours(threads)}
    openers: dict[str, Callable[[], Read]] = {"h5py": lambda: read_by_h5py(path)}
    if "zarr" in Dataset(path).manifest.container:
        openers["tensorstore"] = lambda: read_by_tensorstore(path, threads)
    for name, open_reader in openers.items():
        try:
            contestants[name] = open_reader()
        except ImportError as error:
            say(f"{name} is left out: {error}")
    return contestants


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
