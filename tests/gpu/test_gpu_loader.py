"""The same graphs on a GPU: batches are delivered there, and their pixels are the CPU's within a tolerance."""

from pathlib import Path

import pytest
import torch

from stagein.loaders import DataLoader, RecordDataset, image_eval, image_train

pytest.importorskip("nvidia.dali")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch without CUDA"),
]
MEAN_TOLERANCE = 0.02
"""Of normalised values: the GPU's JPEG decoder interpolates colour and rounds differently."""


@pytest.mark.parametrize("graph", [image_train(32), image_eval(32, resize=40)])
def test_pixels_are_those_of_the_cpu(jpeg_dataset_path: Path, graph) -> None:
    dataset = RecordDataset(jpeg_dataset_path, staged=None)
    on_gpu, on_cpu = (
        list(DataLoader(dataset, 16, num_workers=2, transform=graph, device=device)) for device in ("cuda", "cpu")
    )
    for there, here in zip(on_gpu, on_cpu, strict=True):
        assert there["image"].device.type == there["label"].device.type == "cuda"
        assert torch.equal(there["label"].cpu(), here["label"])
        assert (there["image"].cpu() - here["image"]).abs().mean() < MEAN_TOLERANCE


def test_batches_keep_their_pixels_while_later_ones_are_made(jpeg_dataset_path: Path) -> None:
    dataset = RecordDataset(jpeg_dataset_path, staged=None)
    kept = [
        (batch["image"], batch["image"].clone())
        for batch in DataLoader(dataset, 4, transform=image_train(32), device="cuda")
    ]
    assert all(torch.equal(image, copy) for image, copy in kept)


def test_padding_is_masked_on_the_gpu(jpeg_dataset_path: Path) -> None:
    loader = DataLoader(
        RecordDataset(jpeg_dataset_path, staged=None),
        60,
        transform=image_eval(32, resize=32),
        device="cuda",
        tail="pad",
    )
    *_, last = loader
    assert last["valid"].device.type == "cuda"
    assert int(last["valid"].sum()) == 25


def test_batches_on_the_cpu_are_pinned_when_asked(jpeg_dataset_path: Path) -> None:
    dataset = RecordDataset(jpeg_dataset_path, staged=None)
    batch = next(iter(DataLoader(dataset, 4, transform=image_train(32), device="cpu", pin_memory=True)))
    assert batch["image"].is_pinned() and batch["label"].is_pinned()
