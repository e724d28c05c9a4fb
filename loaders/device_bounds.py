"""Our loader as batches reach a device, and what bounds it: the same engine, fed with batches that lie in memory."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from stagein.formats.record_reader import PackedRecords

from .batches import BatchTask, HostBatch
from .dataloader import DataLoader
from .dataset import RecordDataset
from .engine import Batch, EngineOptions, raise_first
from .fastpath import choose_engine
from .graphs import Graph
from .sampler import GlobalOrder, Progress
from .to_device import CudaSender

BATCHES_OF_FILES = 512
"""Planned ahead: a minute or two of the fastest loader, so that rounds of both come to the same images and windows."""
_BATCHES_OF_TENSORS = 16
_SEED = 0
_AHEAD = 1


def our_loader(
    dataset: RecordDataset, graph: Graph | None, device: torch.device, batch_size: int, threads: int
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2 if graph is not None else threads,
        transform=graph,
        device=device,
        decode_threads=None if graph is None else threads,
    )


def first_tasks(num_samples: int, batch_size: int, num_batches: int, *, shuffle: bool = True) -> list[BatchTask]:
    """The first batches that a loader with the default seed has, epoch after epoch."""
    order = GlobalOrder(num_samples, batch_size, rank=0, world_size=1, seed=_SEED, shuffle=shuffle, tail="drop")
    tasks = (
        BatchTask(epoch, number, rows)
        for epoch in itertools.count()
        for number, rows in enumerate(order.batches(Progress(epoch)))
    )
    return list(itertools.islice(tasks, num_batches))


class FilesInMemory:
    """The files of some batches, as they are stored, each read once."""

    def __init__(self, dataset: RecordDataset, tasks: Sequence[BatchTask]) -> None:
        self._ids = np.unique([task.rows.ids for task in tasks])
        self._files = dataset.records.read_packed(self._ids)

    def of(self, ids: NDArray[np.int64]) -> PackedRecords:
        """Those of these samples, which must be in the batches."""
        places = np.searchsorted(self._ids, ids)
        return PackedRecords(self._files.buffer, self._files.start[places], self._files.nbytes[places])


def from_memory(
    dataset: RecordDataset,
    graph: Graph | None,
    device: torch.device,
    batch_size: int,
    threads: int,
    *,
    shuffle: bool = True,
) -> Iterator[Batch]:
    """The first batches of a loader with the default seed, then from the first on again, planned and read before the first one is made:
    decompressed there only if that is not done on the device.

    Of files it is `BATCHES_OF_FILES`: how much there is to decode and to resize differs from batch to batch, and from epoch to epoch.
    Tensors are alike, and as many as memory easily holds will do.
    """
    records = dataset.records
    options = EngineOptions(threads, device, pin_memory=device.type == "cuda", keep_between_epochs=False)
    engine = choose_engine(dataset, graph, _SEED, options, raise_first)
    if records.schema.primary_field.kind == "encoded" and not records.is_seekable:
        tasks = first_tasks(len(dataset), batch_size, BATCHES_OF_FILES, shuffle=shuffle)
        files = FilesInMemory(dataset, tasks)
        read = [_with_files(engine.load(task), records.schema.primary, files) for task in tasks]
    else:
        num_batches = min(len(dataset) // batch_size, _BATCHES_OF_TENSORS)
        read = [engine.load(task) for task in first_tasks(len(dataset), batch_size, num_batches, shuffle=shuffle)]
    batches = (batch for _, batch in engine.transform(itertools.cycle(read)))
    return batches if engine.delivers_on == device else _sent(batches, device)


def _with_files(batch: HostBatch, field: str, files: FilesInMemory) -> HostBatch:
    return replace(batch, inputs={**batch.inputs, field: files.of(batch.ids)})


def _sent(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copied as `to_device` does it, one ahead of the caller."""
    send = CudaSender(device)
    under_way = [send(next(batches)) for _ in range(_AHEAD)]
    for batch in batches:
        under_way.append(send(batch))
        first = under_way.pop(0)
        yield first.receive()
        first.wait()
