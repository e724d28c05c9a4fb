"""Other loaders of tensors, to measure ours against: whole batches of records into memory, done their way."""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray

from stagein.formats import Dataset
from stagein.formats.library_readers import Read, read_by_h5py, read_by_preadv, read_by_tensorstore

from .engine import Batch

_FIELD = "record"
_RING = 4


@dataclass(frozen=True)
class TensorWork:
    """What every contestant does: records of `dataset`, a single tensor field, in random order, in batches."""

    dataset: Path
    folder: Path
    batch_size: int
    threads: int

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Numbers of records, for ever."""
        records = len(Dataset(self.dataset))
        for epoch in range(1 << 30):
            order = np.random.default_rng(epoch).permutation(records)
            yield from order[: records // self.batch_size * self.batch_size].reshape(-1, self.batch_size)

    def new_batch(self) -> NDArray[Any]:
        field = Dataset(self.dataset).schema.primary_field
        return np.zeros((self.batch_size, *field.fixed_shape), field.stored_dtype)


def stagein_loader(work: TensorWork) -> Iterator[Batch]:
    """Ours."""
    from .dataloader import DataLoader
    from .dataset import RecordDataset

    loader = DataLoader(
        RecordDataset(work.dataset, staged=None),
        work.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=work.threads,
    )
    while True:
        yield from loader


def reading_alone(work: TensorWork) -> Iterator[Batch]:
    """No loader at all: our reader, in `threads` threads, each a batch, into a ring of buffers that never leave it."""
    reader = Dataset(work.dataset).reader
    return _in_threads(work, lambda records, out: reader.read_tensors(records, out))


def preadv_alone(work: TensorWork) -> Iterator[Batch]:
    """The same by the system alone, unchecked."""
    return _in_threads(work, read_by_preadv(work.dataset))


def h5py_slices(work: TensorWork) -> Iterator[Batch]:
    """h5py, in the caller: it runs one thread at a time whatever is asked."""
    read, out = read_by_h5py(work.dataset), work.new_batch()
    for records in work.batches():
        read(records.tolist(), out)
        yield {_FIELD: torch.from_numpy(out)}


def tensorstore(work: TensorWork) -> Iterator[Batch]:
    """tensorstore, a batch ahead."""
    return _in_threads(work, read_by_tensorstore(work.dataset, work.threads))


def _in_threads(work: TensorWork, read: Read) -> Iterator[Batch]:
    ring = [work.new_batch() for _ in range(_RING)]
    with ThreadPoolExecutor(work.threads) as pool:
        pending: list[Any] = []
        for number, records in enumerate(work.batches()):
            pending.append((pool.submit(read, records.tolist(), ring[number % _RING]), ring[number % _RING]))
            if len(pending) == _RING - 1:
                done, out = pending.pop(0)
                done.result()
                yield {_FIELD: torch.from_numpy(out)}


class _NpyFiles(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, folder: Path, records: int) -> None:
        self._folder, self._records = folder, records

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.load(self._folder / f"{index}.npy"))


def torch_npy(work: TensorWork) -> Iterator[Batch]:
    """torch's DataLoader over a file a record, in worker processes."""
    dataset = Dataset(work.dataset)
    for number in range(len(dataset)):
        np.save(work.folder / f"{number}.npy", dataset[number][dataset.schema.primary])
    return _by_torch(work, _NpyFiles(work.folder, len(dataset)))


class _Hdf5Records(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, work: TensorWork) -> None:
        dataset = Dataset(work.dataset)
        self._path, self._records, self._field = work.dataset, len(dataset), dataset.schema.primary_field

    def __len__(self) -> int:
        return self._records

    @functools.cached_property
    def _read(self) -> Read:  # in the worker process: files opened before a fork are shared
        return read_by_h5py(self._path)

    def __getitem__(self, index: int) -> torch.Tensor:
        record = np.empty((1, *self._field.fixed_shape), self._field.stored_dtype)
        self._read([index], record)
        return torch.from_numpy(record[0])


def torch_h5py(work: TensorWork) -> Iterator[Batch]:
    """torch's DataLoader over h5py, in worker processes: on as many cores as ours."""
    return _by_torch(work, _Hdf5Records(work))


def _by_torch(work: TensorWork, dataset: torch.utils.data.Dataset[torch.Tensor]) -> Iterator[Batch]:
    loader = torch.utils.data.DataLoader(
        dataset,
        work.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=work.threads,
        persistent_workers=True,
    )
    while True:
        yield from ({_FIELD: batch} for batch in loader)


class _LitRecord:
    def __init__(self, dataset: Path) -> None:
        self._dataset = dataset

    def __call__(self, number: int) -> dict[str, torch.Tensor]:
        dataset = Dataset(self._dataset)
        return {_FIELD: torch.from_numpy(np.array(dataset[number][dataset.schema.primary]))}


def litdata(work: TensorWork) -> Iterator[Batch]:
    """LitData over its own chunks, which it maps into memory, in the caller: its worker processes are slower here."""
    import litdata as lit  # type: ignore[import-not-found, unused-ignore]

    folder = str(work.folder / "chunks")
    lit.optimize(
        _LitRecord(work.dataset), list(range(len(Dataset(work.dataset)))), folder, chunk_bytes="256MB", num_workers=1
    )
    dataset = lit.StreamingDataset(folder, shuffle=True, drop_last=True)
    loader = lit.StreamingDataLoader(dataset, batch_size=work.batch_size, num_workers=0)
    while True:
        yield from loader


PEERS: dict[str, Callable[[TensorWork], Iterator[Batch]]] = {
    "reading alone": reading_alone,
    "preadv alone": preadv_alone,
    "h5py": h5py_slices,
    "tensorstore": tensorstore,
    "torch + h5py": torch_h5py,
    "torch + npy": torch_npy,
    "litdata": litdata,
}
"""By name; what cannot be imported is left out by the benchmark, which says so."""
