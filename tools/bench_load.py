"""`stagein bench load`: our loader beside its peers, in interleaved rounds of one process."""

import time
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path

from .rates import print_rates

_SETTLE_SECONDS = 0.5
"""Pause between two contestants: what one still has in its queue must not cost the other."""
_WARM_UP_BATCHES = 4
"""Not timed at the start of a round: what lay ready in the queue, and the start of the threads."""
_TIMED_BATCHES = 12


def run_load(dataset: Path, images: Path, rounds: int, batch_size: int, size: int, threads: int) -> None:
    """Measure and print: a line of JSON for each contestant, then a table of ratios to DALI's own file reader.

    dataset, images  the same pictures, as a converted data set and as the image folder it was made from.
    size             of the square that the random crops are resized to.
    threads          decoding threads of each contestant.
    """
    rates = bench_load(dataset, images, rounds=rounds, batch_size=batch_size, size=size, threads=threads)
    print_rates(
        "load", rates, baseline="dali readers.file", unit="images/s", batch_size=batch_size, size=size, threads=threads
    )


def bench_load(
    dataset: Path, images: Path, *, rounds: int, batch_size: int, size: int, threads: int
) -> dict[str, list[float]]:
    """Images a second of every contestant in every round: random crop, resize, flip, normalise, on the CPU."""
    from torch.utils.data import RandomSampler

    from stagein.loaders import DataLoader, RecordDataset, image_train
    from stagein.loaders.peers import dali_file_reader

    records = RecordDataset(dataset)
    graph = image_train(size)
    batches_of_all = rounds * (_WARM_UP_BATCHES + _TIMED_BATCHES)
    endless = RandomSampler(records, replacement=True, num_samples=batches_of_all * batch_size)
    loader = DataLoader(
        records, batch_size, sampler=endless, num_workers=1, transform=graph, device="cpu", decode_threads=threads
    )
    contestants: dict[str, Iterator[Mapping[str, Sized]]] = {
        "stagein": iter(loader),
        "dali readers.file": dali_file_reader(images, batch_size, threads, graph.output),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, batches in contestants.items():
            rates[name].append(_images_per_second(batches))
            time.sleep(_SETTLE_SECONDS)
    return rates


def _images_per_second(batches: Iterator[Mapping[str, Sized]]) -> float:
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    started = time.perf_counter()
    images = sum(len(next(batches)["image"]) for _ in range(_TIMED_BATCHES))
    return images / (time.perf_counter() - started)
