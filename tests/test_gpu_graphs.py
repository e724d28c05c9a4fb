"""The ready graphs for a GPU: put together here without one; where there is one, the numbers are those of the CPU."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from jpegs import picture, pillow_jpeg
from PIL import Image

from stagein.formats import Field, Schema, Writer, convert, scan_imagefolder
from stagein.formats.seekable_images import SeekableJpegs
from stagein.formats.sources.images import change_images
from stagein.loaders import (
    DataLoader,
    RecordDataset,
    image_eval,
    image_train,
    segmentation_eval,
    segmentation_train,
    volume_eval,
    volume_train,
)
from stagein.loaders.batches import BatchReader, BatchTask
from stagein.loaders.dali_pipeline import define_pipeline
from stagein.loaders.engine import raise_first
from stagein.loaders.order import RankBatch

pytest.importorskip("nvidia.dali")
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SIZES = [(200, 301), (120, 80), (90, 151), (127, 125), (353, 400), (100, 75), (81, 64), (256, 256)]
MIN_PSNR = 35.0
"""In dB: nvJPEG's inverse transform and colours are its own, and so is the GPU's resize."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images plain and seekable, pairs of an image and its mask, volumes with masks."""
    root = tmp_path_factory.mktemp("graphs")
    (root / "images" / "all").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        (root / "images" / "all" / f"{number}.jpg").write_bytes(pillow_jpeg(picture(*size, seed=number), quality=92))
    convert(scan_imagefolder(root / "images"), root / "plain.st")
    convert(change_images(scan_imagefolder(root / "images"), SeekableJpegs()), root / "seekable.st")
    fields = {
        "image": Field(kind="encoded", shape=(None, None, 3), encoding="jpeg"),
        "mask": Field(kind="encoded", shape=(None, None), encoding="png"),
        "hw": Field(kind="tensor", dtype="int32", shape=(2,)),
    }
    with Writer(root / "pairs.st", Schema(fields=fields, primary="image")) as writer:
        for number, (height, width) in enumerate(SIZES):
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width), np.uint8)).save(file, "png")
            image = pillow_jpeg(picture(height, width, seed=number), quality=92)
            writer.write({"image": image, "mask": file.getvalue(), "hw": [height, width]})
    volumes = {
        "volume": Field(kind="tensor", dtype="int16", shape=(2, 12, 14, 16)),
        "mask": Field(kind="tensor", dtype="uint8", shape=(12, 14, 16)),
    }
    with Writer(root / "volumes.st", Schema(fields=volumes), shard_bytes=1 << 20) as writer:
        for number in range(len(SIZES)):
            numbers = np.random.default_rng(number)
            writer.write(
                {name: numbers.integers(-90, 90, each.fixed_shape).astype(each.dtype) for name, each in volumes.items()}
            )
    return root


STATISTICS = {"mean": (3.0, -20.0), "std": (40.0, 7.5)}
GRAPHS = {
    "image, train": ("plain.st", image_train(64, **PLAIN)),
    "image, train, not antialiased": ("plain.st", image_train(64, antialias=False, **PLAIN)),
    "image, eval": ("plain.st", image_eval(56, resize=64, **PLAIN)),
    "image, train, seekable": ("seekable.st", image_train(64, **PLAIN)),
    "segmentation, train": ("pairs.st", segmentation_train(64, **PLAIN)),
    "segmentation, eval": ("pairs.st", segmentation_eval(56, resize=64, **PLAIN)),
    "volume, train": ("volumes.st", volume_train((5, 14, 9), **STATISTICS)),
    "volume, eval": ("volumes.st", volume_eval((5, 14, 9), **STATISTICS)),
    "volume and mask, train": ("volumes.st", volume_train((5, 14, 9), **STATISTICS, mask="mask")),
    "volume and mask, eval": ("volumes.st", volume_eval((5, 14, 9), **STATISTICS, mask="mask")),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_is_put_together_without_a_gpu(name, root):
    file, graph = GRAPHS[name]
    reader = BatchReader(RecordDataset(root / file, staged=None), graph, 0, raise_first, read_for_empty=True)
    inputs = reader.read(BatchTask(0, 0, RankBatch(np.arange(3), 3))).inputs
    device = torch.device("cuda", 0)
    pipeline, outputs = define_pipeline(graph, lambda: tuple(inputs.values()), tuple(inputs), 3, device, 1)
    assert {node.device for node in pipeline._graph_out} == {"gpu"}
    assert set(outputs) == {name for name in ("image", "mask", "volume") if any(key.startswith(name) for key in inputs)}


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * torch.log10(torch.mean((one - other) ** 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_gpu_makes_what_the_cpu_makes(name, num_workers, root):
    file, graph = GRAPHS[name]
    dataset = RecordDataset(root / file, staged=None)
    loaders = [
        DataLoader(dataset, 3, shuffle=True, transform=graph, device=device, num_workers=num_workers, seed=5)
        for device in ("cpu", "cuda")
    ]
    for ours, theirs in zip(*loaders, strict=True):
        assert ours.keys() == theirs.keys()
        for field, value in theirs.items():
            assert value.is_cuda
            here = value.cpu()
            assert (here.dtype, here.shape) == (ours[field].dtype, ours[field].shape)
            if field == "image":
                assert all(psnr(one, other) > MIN_PSNR for one, other in zip(here, ours[field], strict=True))
            elif field == "volume":
                torch.testing.assert_close(here, ours[field], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(here, ours[field])


@pytest.mark.gpu
def test_of_seekable_shards_the_gpu_decodes_the_same_pixels(root):
    graph = image_train(64, area=(0.1, 0.4), **PLAIN)
    loaders = [
        DataLoader(RecordDataset(root / f"{kind}.st", staged=None), 4, transform=graph, device="cuda")
        for kind in ("plain", "seekable")
    ]
    for plain, cut in zip(*loaders, strict=True):
        assert all(psnr(*pair) > 50 for pair in zip(plain["image"], cut["image"], strict=True))
    assert loaders[1].stats().bytes_read < loaders[0].stats().bytes_read


@pytest.mark.gpu
def test_batches_of_the_gpu_are_kept_and_none_of_its_memory_is_left(root):
    dataset = RecordDataset(root / "plain.st", staged=None)
    loader = DataLoader(dataset, 2, transform=image_train(64), device="cuda", num_workers=2, prefetch_to_device=3)
    kept = [(batch["image"], batch["image"].clone()) for _ in range(4) for batch in loader]
    torch.cuda.synchronize()
    assert all(torch.equal(image, copy) for image, copy in kept)
