"""What many tests need: a small folder of real JPEGs, the data set made from it, and stagein commands run in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from stagein.formats import Dataset, convert, scan_imagefolder
from stagein.loaders.synthetic import make_image_folder
from stagein.tools.cli import main

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # how long an example takes, beside other work of the machine, fails no test

IMAGES_PER_CLASS = 17
NUM_CLASSES = 5


@pytest.fixture(scope="session")
def jpeg_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """85 JPEGs of 48 x 72 pixels in 5 class folders. Read only."""
    root = tmp_path_factory.mktemp("jpegs") / "train"
    make_image_folder(root, images_per_class=IMAGES_PER_CLASS, num_classes=NUM_CLASSES, height=48, width=72)
    return root


@pytest.fixture(scope="session")
def jpeg_dataset_path(jpeg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set made from `jpeg_folder`: 85 records in several shards of 64 KiB. Read only."""
    target = tmp_path_factory.mktemp("dataset") / "train.st"
    convert(scan_imagefolder(jpeg_folder), target, shard_bytes=64 << 10, chunk_bytes=16 << 10)
    return target


@pytest.fixture
def jpeg_dataset(jpeg_dataset_path: Path) -> Dataset:
    return Dataset(jpeg_dataset_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` say why they do not run where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # a second that other tests do without

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture
def stagein(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a stagein command in this process: exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stagein", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run
