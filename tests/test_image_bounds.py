"""What bounds our loaders does their work: the same images, windows and flips in the same order, for several epochs."""

import itertools
from pathlib import Path

import pytest
import torch

from stagein.formats import convert, scan_imagefolder
from stagein.loaders.image_bounds import OURS
from stagein.loaders.image_peers import ImageWork
from stagein.loaders.synthetic import make_image_folder


@pytest.mark.parametrize(("loader", "bound"), [("stagein", "engine alone"), ("stagein, DALI graph", "DALI alone")])
def test_a_bound_makes_the_batches_of_its_loader(loader: str, bound: str, tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", images_per_class=11, height=60, width=80, num_classes=2)
    convert(scan_imagefolder(tmp_path / "images"), tmp_path / "images.st")
    work = ImageWork(tmp_path / "images", tmp_path, batch_size=4, size=16, threads=2, antialias=True)
    contestants = OURS[loader](work, tmp_path / "images.st"), OURS[bound](work, tmp_path / "images.st")
    num_batches = 22 // work.batch_size
    for of_loader, of_bound in itertools.islice(zip(*contestants, strict=True), 3 * num_batches):
        assert torch.equal(of_loader["label"].flatten(), of_bound["label"].flatten())
        assert torch.equal(of_loader["image"], of_bound["image"])
