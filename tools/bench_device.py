"""`stagein bench device`: what reaches a device, beside the same work on data in memory, in interleaved rounds."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .rates import print_rates, rate_of_batches

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Work:
    """What is loaded: `images`, a folder of class folders (None: a synthetic one), or synthetic `tensors` of a `codec`."""

    images: Path | None
    tensors: Literal["float32", "int16"] | None
    codec: str | None
    device: str | None
    batch_size: int
    size: int
    threads: int


def run_device(work: Work, rounds: int, round_s: float) -> None:
    """Measure and print: a line of JSON for each, a table of shares of the rate from memory, then what `explain()` says."""
    from stagein.loaders import RecordDataset, image_train
    from stagein.loaders.device_bounds import from_memory, our_loader
    from stagein.loaders.devices import delivery_device

    device = delivery_device(work.device, "--device {}")
    with tempfile.TemporaryDirectory(prefix="stagein-bench-") as made:
        dataset = RecordDataset(_data_set(work, Path(made)), staged=None)
        graph = None if work.tensors else image_train(work.size)
        loader = our_loader(dataset, graph, device, work.batch_size, work.threads)
        contestants = {
            "from memory": from_memory(dataset, graph, device, work.batch_size, work.threads),
            "stagein": _for_ever(loader),
        }
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        amount = len if graph is not None else _gigabytes
        for _ in range(rounds):
            for name, batches in contestants.items():
                rates[name].append(rate_of_batches(batches, round_s, amount, partial(_wait_for, device)))
        for batches in contestants.values():
            batches.close()  # type: ignore[attr-defined]  # generators
    settings = {"batch_size": work.batch_size, "threads": work.threads, "codec": work.codec or "none"}
    unit = "images/s" if graph is not None else "GB/s"
    print_rates("device", rates, "from memory", unit, device=_name_of(device), **settings)
    print(loader.explain())


def _data_set(work: Work, folder: Path) -> Path:
    from .bench_load import make_tensors, refuse_less_than_a_batch

    dataset = folder / "records.st"
    if work.tensors is not None:
        make_tensors(dataset, work.tensors, work.codec)
    else:
        _convert_images(work, folder, dataset)
    refuse_less_than_a_batch(dataset, work.batch_size)
    return dataset


def _convert_images(work: Work, folder: Path, dataset: Path) -> None:
    from stagein.formats import convert, scan_imagefolder
    from stagein.loaders.synthetic import make_image_folder

    images = work.images or folder / "images"
    if work.images is None:
        make_image_folder(images, images_per_class=max(32, 2 * work.batch_size), height=375, width=500)
    convert(scan_imagefolder(images), dataset)


def _for_ever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _gigabytes(tensor: "torch.Tensor") -> float:
    return tensor.nbytes / 1e9


def _wait_for(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name_of(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
