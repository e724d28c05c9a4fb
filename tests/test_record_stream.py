"""Epochs that run into one another: with persistent workers the next one is worked on before it is asked for, and nothing else changes."""

import gc
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_dataloader import FORKED

from stagein.formats import Writer, convert, scan_imagefolder
from stagein.formats.errors import ChecksumError
from stagein.loaders import DataLoader, RecordDataset, batches, image_eval, image_train, record_stream, tensor_engine
from stagein.loaders.order import epoch_order

pytest.importorskip("nvidia.dali")
TENSORS, BATCH_SIZE = 40, 8


def dali_graph(nodes: dict[str, Any]) -> dict[str, Any]:
    import nvidia.dali.fn as fn

    return {"image": fn.resize(fn.decoders.image(nodes["image"]), size=[16, 16]), "label": nodes["label"]}


@pytest.fixture(scope="module")
def images(jpeg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.st"
    convert(scan_imagefolder(jpeg_folder), path)
    return path


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tensors") / "tensors.st"
    with Writer(path) as writer:
        for number in range(TENSORS):
            writer.write({"x": np.full((4, 5), number, np.float32)})
    return path


@pytest.fixture(params=["images", "DALI", "tensors"])
def make_loader(request: pytest.FixtureRequest, images: Path, tensors: Path) -> Callable[..., DataLoader]:
    """A loader of each engine."""
    path, transform = {"images": (images, image_train(16)), "DALI": (images, dali_graph), "tensors": (tensors, None)}[
        request.param
    ]

    def make(**arguments: Any) -> DataLoader:
        arguments = {"shuffle": True, "num_workers": 1, "persistent_workers": True, "transform": transform, **arguments}
        return DataLoader(RecordDataset(path, staged=None), BATCH_SIZE, device="cpu", **arguments)

    return make


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert_threads_end()


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("stagein")}


def assert_threads_end() -> None:
    """Some are told to and not waited for."""
    until = time.monotonic() + 20
    while threads := our_threads():
        assert time.monotonic() < until, threads
        time.sleep(0.01)


def assert_same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) > 0
    for here, there in zip(ours, theirs, strict=True):
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Epoch and number of every batch that is read, in the order in which that begins."""
    noted: list[tuple[int, int]] = []
    for owner in (batches.BatchReader, tensor_engine.TensorEngine):
        name = "read" if owner is batches.BatchReader else "load"
        whole = getattr(owner, name)

        def noting(self: Any, task: batches.BatchTask, whole: Any = whole) -> Any:
            noted.append((task.epoch, task.number))
            return whole(self, task)

        monkeypatch.setattr(owner, name, noting)
    return noted


def test_the_first_batches_of_the_next_epoch_are_read_before_they_are_asked_for(make_loader, read):
    loader = make_loader()
    assert len(list(loader)) == len(loader)
    until = time.monotonic() + 20
    while (1, 0) not in read:
        assert time.monotonic() < until
        time.sleep(0.01)
    begun = our_threads()
    list(loader)
    assert begun and begun <= set(threading.enumerate())
    steps = [step for step in read if step[0] < 2]
    assert steps == [(epoch, number) for epoch in (0, 1) for number in range(len(loader))]


def test_without_persistent_workers_nothing_is_read_of_the_next_epoch(make_loader, read):
    loader = make_loader(persistent_workers=False)
    list(loader)
    time.sleep(0.2)
    assert {epoch for epoch, _ in read} == {0}


def test_batches_are_those_of_epochs_apart(make_loader):
    ours, theirs = make_loader(), make_loader(persistent_workers=False)
    for _ in range(3):
        assert_same(list(ours), list(theirs))
    for loader in (ours, theirs):
        loader.set_epoch(7)
    assert_same(list(ours), list(theirs))
    for loader in (ours, theirs):
        loader.set_epoch(8)
    assert_same(list(ours), list(theirs))


def test_a_state_of_another_place_and_an_epoch_given_up_are_honoured(make_loader):
    ours, theirs = make_loader(), make_loader(persistent_workers=False)
    list(ours)
    batch_of_the_next = iter(ours)
    next(batch_of_the_next)
    state = ours.state_dict()
    assert (state["epoch"], state["samples_delivered"]) == (1, BATCH_SIZE)
    del batch_of_the_next
    for loader in (ours, theirs):
        loader.load_state_dict(state)
        assert loader.state_dict() == state
    assert_same(list(ours), list(theirs))
    assert ours.state_dict() == theirs.state_dict()
    assert_same(list(ours), list(theirs))
    for loader in (ours, theirs):
        loader.load_state_dict(state)
    assert_same(list(ours), list(theirs))


def test_an_epoch_that_is_left_after_its_last_batch_is_followed_by_the_next(make_loader):
    ours, theirs = make_loader(), make_loader(persistent_workers=False)
    for loader in (ours, theirs):
        for number, _ in enumerate(loader):
            if number == len(loader) - 1:
                break
    assert_same(list(ours), list(theirs))


def test_two_iterators_at_once_have_an_epoch_each(make_loader):
    ours, theirs = make_loader(), [make_loader(persistent_workers=False) for _ in range(2)]
    theirs[1].set_epoch(1)
    first, second = iter(ours), iter(ours)
    pairs = list(zip(first, second, strict=True))
    for number in (0, 1):
        assert_same([pair[number] for pair in pairs], list(theirs[number]))
    theirs[0].set_epoch(2)
    assert_same(list(ours), list(theirs[0]))


def test_epochs_without_a_batch_end(make_loader):
    loader = make_loader(drop_last=True, distributed=(0, 64))
    assert [list(loader) for _ in range(3)] == [[], [], []]


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["own order", "torch's"])
def test_a_copy_begins_where_the_loader_is_with_threads_of_its_own(make_loader, generator):
    ours = make_loader(generator=generator)
    list(ours)
    copy = pickle.loads(pickle.dumps(ours))
    assert_same(list(copy), list(ours))


def test_the_threads_end_with_the_loader(make_loader):
    loader = make_loader()
    list(loader)
    assert our_threads()
    del loader
    assert_threads_end()


def test_a_record_that_goes_bad_is_an_error_of_the_epoch_that_comes_to_it(images, tmp_path):
    dataset = RecordDataset(shutil.copytree(images, tmp_path / "copy.st"), staged=None)
    orders = [epoch_order(len(dataset), seed=0, epoch=epoch).tolist() for epoch in (0, 1)]
    record = next(each for each in orders[1][:BATCH_SIZE] if each in orders[0][: 3 * BATCH_SIZE])
    index = dataset.records.index
    shard = dataset.records.path / dataset.records.manifest.shards[index.shard[record]].file
    loader = DataLoader(
        dataset,
        BATCH_SIZE,
        shuffle=True,
        num_workers=1,
        persistent_workers=True,
        transform=image_train(16),
        device="cpu",
    )
    for number, _ in enumerate(loader):
        if number == 3:
            shard.chmod(0o644)
            with shard.open("r+b") as file:
                file.seek(int(index.offset[record]) + 50)
                file.write(bytes(100))
    assert number == len(loader) - 1
    with pytest.raises(ChecksumError, match=rf"epoch 1, batch 0: record {record} "):
        next(iter(loader))


@pytest.mark.parametrize("graph", [image_train(16), image_eval(16, resize=20)], ids=["train", "eval"])
@pytest.mark.parametrize("world", [(0, 1), (1, 3)], ids=str)
def test_batches_planned_together_are_those_planned_alone(images, graph, world, monkeypatch):
    planned: list[int] = []
    plan = type(graph).plan

    def noting(self: Any, batch: Any) -> Any:
        planned.append(len(batch.ids))
        return plan(self, batch)

    monkeypatch.setattr(type(graph), "plan", noting)
    runs = []
    for together in (8, 1):
        monkeypatch.setattr(record_stream, "_PLANNED_TOGETHER", together)
        dataset = RecordDataset(images, staged=None)
        loader = DataLoader(dataset, 3, shuffle=True, transform=graph, distributed=world, tail="pad", device="cpu")
        planned.clear()
        runs.append([batch for _ in range(2) for batch in loader])
        assert len(planned) == 2 * -(-len(loader) // together)
    assert_same(*runs)


def test_a_loader_of_a_cycle_may_be_collected_by_a_thread_of_its_own(images, monkeypatch):
    is_unreachable, collected = threading.Event(), threading.Event()
    read = batches.BatchReader.read

    def collecting(self: Any, task: batches.BatchTask) -> Any:
        if task.epoch == 1 and not collected.is_set():
            assert is_unreachable.wait(20)
            gc.collect()
            collected.set()
        return read(self, task)

    monkeypatch.setattr(batches.BatchReader, "read", collecting)
    dataset = RecordDataset(images, staged=None)
    loader = DataLoader(dataset, 8, num_workers=1, persistent_workers=True, transform=image_train(16), device="cpu")
    loader.itself = loader
    list(loader)
    del loader
    is_unreachable.set()
    assert collected.wait(20)
    assert_threads_end()


PROGRAM = """
import os, sys, time
from torch.utils.data import RandomSampler
from stagein.loaders import DataLoader, RecordDataset, image_train
from stagein.loaders.row_maker import RowMakers
sys.path.append(sys.argv[2])
from test_record_stream import dali_graph
take, lent = RowMakers.take, []
RowMakers.take = lambda self, count: lent.append(take(self, count)) or lent[-1]
dataset = range(85) if sys.argv[3] == "samples" else RecordDataset(sys.argv[1], staged=None)
transforms = {"images": image_train(16), "samples": None}
loader = DataLoader(
    dataset,
    8,
    sampler=RandomSampler(dataset) if "sampler" in sys.argv[3] else None,
    num_workers=2,
    persistent_workers=True,
    transform=transforms.get(sys.argv[3], dali_graph),
    device="cpu",
)
print(len(list(loader)), flush=True)
"""
FORKED_BETWEEN = FORKED.replace(
    "del batches, loader",
    "in_work = [*lent]; print(len(list(loader)), flush=True); assert not in_work or lent[-1] not in in_work",
).replace("list(batches)", "list(loader)")


@pytest.mark.parametrize("engine", ["images", "samples", "DALI", "DALI, sampler"])
@pytest.mark.parametrize("then", ["", FORKED_BETWEEN], ids=["exits", "forks"])
def test_a_process_between_two_epochs_exits_and_forks(images, then, engine):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + then, images, Path(__file__).parent, engine],
        capture_output=True,
        text=True,
        timeout=60,
    )
    steps = f"{len(DataLoader(RecordDataset(images, staged=None), 8, transform=image_train(16), device='cpu'))}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, steps * (3 if then else 1), "")
