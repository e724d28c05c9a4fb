"""Our loader as batches reach a device, and what bounds it: the same engine, fed with batches that lie in memory."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from stagein.formats.located import LocatedRecords

from .batches import BatchTask, HostBatch
from .dataloader import DataLoader
from .dataset import RecordDataset
from .engine import Batch, EngineOptions, raise_first
from .fastpath import choose_engine
from .graphs import Graph
from .order import RankBatch
from .to_device import CudaSender

_MAX_BATCHES_IN_MEMORY = 16
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


def shuffled_rows(num_samples: int, batch_size: int, num_batches: int) -> NDArray[np.int64]:
    """The samples of some batches, [num_batches, batch_size], in random order; all of them again where they do not suffice."""
    order = np.random.default_rng(0).permutation(num_samples)
    return np.resize(order, (num_batches, batch_size)).astype(np.int64)


def some_rows(num_samples: int, batch_size: int) -> NDArray[np.int64]:
    """As many whole batches as there are, up to what memory easily holds, as `shuffled_rows`."""
    return shuffled_rows(num_samples, batch_size, min(num_samples // batch_size, _MAX_BATCHES_IN_MEMORY))


def from_memory(
    dataset: RecordDataset, graph: Graph | None, device: torch.device, rows: NDArray[np.int64], threads: int
) -> Iterator[Batch]:
    """The batches of `rows`, over and over, read before the first: decompressed there only if that is not done on the device."""
    options = EngineOptions(threads, device, pin_memory=device.type == "cuda", keep_between_epochs=False)
    engine = choose_engine(dataset, graph, 0, options, raise_first)
    read = [_in_memory(engine.load(BatchTask(0, number, RankBatch(ids, len(ids))))) for number, ids in enumerate(rows)]
    batches = (batch for _, batch in engine.transform(itertools.cycle(read)))
    return batches if engine.delivers_on == device else _sent(batches, device)


def _in_memory(batch: HostBatch) -> HostBatch:
    """With what its engine would have read itself."""
    inputs = {name: each.read() if isinstance(each, LocatedRecords) else each for name, each in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def _sent(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copied as `to_device` does it, one ahead of the caller."""
    send = CudaSender(device)
    under_way = [send(next(batches)) for _ in range(_AHEAD)]
    for batch in batches:
        under_way.append(send(batch))
        first = under_way.pop(0)
        yield first.receive()
        first.wait()
