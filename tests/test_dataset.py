"""Reading records: by number, in batches, from threads, with few file descriptors, from a staged copy."""

import pickle
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from stagein.formats import Dataset
from stagein.formats.errors import SourceError


def test_records_by_number(jpeg_dataset: Dataset) -> None:
    assert np.array_equal(jpeg_dataset[-1]["image"], jpeg_dataset[len(jpeg_dataset) - 1]["image"])
    with pytest.raises(IndexError):
        jpeg_dataset[len(jpeg_dataset)]
    assert sum(1 for _ in jpeg_dataset) == len(jpeg_dataset) == 85


def test_batches_come_in_the_order_asked_for_into_the_buffer_given(jpeg_dataset: Dataset) -> None:
    wanted = [84, 3, 3, 50]
    sizes = jpeg_dataset.index.nbytes[wanted]
    buffer = memoryview(bytearray(int(sizes.sum())))
    views = jpeg_dataset.read_records(wanted, buffer)
    assert [len(view) for view in views] == sizes.tolist()
    for number, view in zip(wanted, views, strict=True):
        assert np.array_equal(view, jpeg_dataset[number]["image"])
    assert b"".join(view.tobytes() for view in views) == bytes(buffer)
    assert jpeg_dataset.read_records([]) == []


def test_many_threads_read_through_few_descriptors(jpeg_dataset: Dataset) -> None:
    script = (
        "import resource, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (260, 260))\n"  # room for four shards
        "from stagein.formats import Dataset\n"
        "dataset = Dataset(sys.argv[1])\n"
        "assert len(dataset.manifest.shards) > 4\n"
        "expected = [record['image'].tobytes() for record in dataset]\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    for _ in range(20):\n"
        "        got = list(pool.map(lambda number: dataset[number]['image'].tobytes(), range(len(dataset))))\n"
        "        assert got == expected\n"
    )
    subprocess.run([sys.executable, "-c", script, jpeg_dataset.path], check=True, timeout=60)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_threads_see_the_right_bytes(jpeg_dataset: Dataset) -> None:
    expected = [record["image"].tobytes() for record in jpeg_dataset]
    orders = [np.random.default_rng(seed).permutation(len(jpeg_dataset)) for seed in range(8)]

    def read(order: np.ndarray) -> bool:
        return all(
            view.tobytes() == expected[number]
            for number, view in zip(order, jpeg_dataset.read_records(order), strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, orders))


def test_it_can_be_sent_to_another_process(jpeg_dataset: Dataset) -> None:
    copy = pickle.loads(pickle.dumps(jpeg_dataset))
    assert np.array_equal(copy[7]["image"], jpeg_dataset[7]["image"])


def test_a_staged_copy_is_read_where_it_has_the_shard(jpeg_dataset_path: Path, tmp_path: Path) -> None:
    staged = shutil.copytree(jpeg_dataset_path, tmp_path / "staged", symlinks=True)
    source = shutil.copytree(jpeg_dataset_path, tmp_path / "source", symlinks=True)
    (staged / "shards/00001.h5").unlink()
    (source / "shards/00000.h5").unlink()
    shards = {"shards/00000.h5"}
    dataset = Dataset(source, staged_path=staged, staged_shards=shards)
    first, second = (int(np.flatnonzero(dataset.index.shard == shard)[0]) for shard in (0, 1))
    expected = Dataset(jpeg_dataset_path)
    for number in (first, second):
        assert np.array_equal(dataset[number]["image"], expected[number]["image"])
    with pytest.raises(SourceError, match="it is missing"):
        Dataset(source)[first]
