"""Our image loader as a benchmark runs it, and what bounds it: the same work on bytes that lie in memory, with no loader around it.

Each takes an `ImageWork` and a data set, and yields batches for ever.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.dlpack

from .dali import import_dali
from .dali_pipeline import QUEUE_DEPTH
from .dataloader import DataLoader
from .dataset import RecordDataset
from .device_bounds import BATCHES_OF_FILES, FilesInMemory, first_tasks, from_memory
from .engine import CPU, Batch
from .graphs import Nodes
from .image_peers import ImageWork, dali_image

_BATCHES_AHEAD = 4
"""As many as the peers have, with two workers of two each."""


def stagein_loader(work: ImageWork, dataset: Path) -> Iterator[Batch]:
    """Our loader with the ready graph: on the CPU, our own engine."""
    return _loader(work, dataset, work.graph)


def stagein_dali(work: ImageWork, dataset: Path) -> Iterator[Batch]:
    """Our loader with a graph of the user's, which DALI runs."""

    def graph(nodes: Nodes) -> Nodes:
        return {"image": dali_image(work, nodes["image"]), "label": nodes["label"]}

    return _loader(work, dataset, graph)


def _loader(work: ImageWork, dataset: Path, transform: Any) -> Iterator[Batch]:
    loader = DataLoader(
        RecordDataset(dataset, staged=None),
        work.batch_size,
        shuffle=work.is_shuffled,
        drop_last=True,
        num_workers=1,
        prefetch_factor=_BATCHES_AHEAD,
        persistent_workers=True,
        transform=transform,
        device="cpu",
        decode_threads=work.threads,
    )
    while True:
        yield from loader


def engine_alone(work: ImageWork, dataset: Path) -> Iterator[Batch]:
    """Our engine, of the batches of `stagein_loader`: the same images and windows in the same order, planned and in memory
    before it starts, for `BATCHES_OF_FILES`."""
    records = RecordDataset(dataset, staged=None)
    return from_memory(records, work.graph, CPU, work.batch_size, work.threads, shuffle=work.is_shuffled)


def dali_alone(work: ImageWork, dataset: Path) -> Iterator[Batch]:
    """A DALI pipeline with the operators of `stagein_dali`, of its images in its order, in memory before it starts; DALI draws the
    same windows of them."""
    records = RecordDataset(dataset, staged=None)
    tasks = first_tasks(len(records), work.batch_size, BATCHES_OF_FILES, shuffle=work.is_shuffled)
    files = FilesInMemory(records, tasks)
    batches = [(list(files.of(task.rows.ids)), records.rows("label", task.rows.ids)) for task in tasks]
    dali, source = import_dali(), itertools.cycle(batches)
    pipeline = dali.Pipeline(
        batch_size=work.batch_size, num_threads=work.threads, device_id=None, prefetch_queue_depth=QUEUE_DEPTH
    )
    with pipeline:
        encoded, label = dali.fn.external_source(lambda: next(source), num_outputs=2, no_copy=True)
        pipeline.set_outputs(dali_image(work, encoded), label)
    pipeline.build()
    while True:
        image, label = (torch.utils.dlpack.from_dlpack(each.as_tensor()) for each in pipeline.run())
        yield {"image": image, "label": label}


OURS: dict[str, Callable[[ImageWork, Path], Iterator[Batch]]] = {
    "stagein": stagein_loader,
    "stagein, seekable": stagein_loader,
    "engine alone": engine_alone,
    "stagein, DALI graph": stagein_dali,
    "DALI alone": dali_alone,
}
"""By name. The second gets a data set of seekable JPEGs, the others one of the JPEGs as they are."""
