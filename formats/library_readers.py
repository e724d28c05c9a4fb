"""Records of a tensor field through the libraries of the containers, and by the system alone, to measure our own reader against."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .dataset import Dataset

Read = Callable[[Sequence[int], NDArray[np.generic]], object]
"""Fills the rows of an array with the records of these numbers."""


def read_by_h5py(path: Path) -> Read:
    """By h5py, a slice a record."""
    import h5py
    import hdf5plugin  # noqa: F401 (registers the filters)

    dataset = Dataset(path)
    name, shards = dataset.schema.primary, dataset.manifest.shards
    opened = [h5py.File(path / shard.file, "r", locking=False)[f"{name}/data"] for shard in shards]
    firsts = [shard.first for shard in shards]

    def read(records: Sequence[int], out: NDArray[np.generic]) -> None:
        for row, record in enumerate(records):
            shard = int(np.searchsorted(firsts, record, side="right")) - 1
            opened[shard].read_direct(out, np.s_[record - firsts[shard]], np.s_[row])

    return read


def read_by_tensorstore(path: Path, threads: int) -> Read:
    """By tensorstore, a batch at a time, with `threads` of its own."""
    import tensorstore

    name = Dataset(path).schema.primary
    limits = {"data_copy_concurrency": {"limit": threads}, "file_io_concurrency": {"limit": threads}}
    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}, "context": limits}, read=True
    ).result()

    def read(records: Sequence[int], out: NDArray[np.generic]) -> None:
        out[:] = array[list(records)].read().result()

    return read


def read_by_preadv(path: Path) -> Read:
    """By nothing but `os.preadv`, unchecked; of records that are not compressed."""
    dataset = Dataset(path)
    index = dataset.index
    descriptors = [os.open(dataset.path / shard.file, os.O_RDONLY) for shard in dataset.manifest.shards]

    def read(records: Sequence[int], out: NDArray[np.generic]) -> None:
        for row, record in zip(out, records, strict=True):
            os.preadv(descriptors[index.shard[record]], [row], int(index.offset[record]))

    return read
