"""A process that is forked while threads of its parent are at work, and hold locks: it has what it needs anew."""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_record_dataset import flip_a_bit, shard_of

from stagein.formats.errors import SourceError
from stagein.loaders import RecordDataset
from stagein.loaders.bad_records import Replacement
from stagein.loaders.batches import BatchTask, RowFailure
from stagein.loaders.order import RankBatch

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def in_fork(work: Callable[[], bool]) -> bool:
    """Whether `work()` is true in a process forked now, within 20 s."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1] == 0


@contextlib.contextmanager
def held_by_another_thread(*locks: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    try:
        yield
    finally:
        leave.set()
        holder.join()


@pytest.mark.filterwarnings("ignore:.*read from the source from now on")
def test_it_leaves_a_bad_shard_of_a_copy(jpeg_dataset_path: Path, tmp_path: Path) -> None:
    shutil.copytree(jpeg_dataset_path, tmp_path / "copy.st", symlinks=True)
    dataset = RecordDataset(jpeg_dataset_path, staged=tmp_path / "copy.st")
    flip_a_bit(tmp_path / "copy.st" / shard_of(dataset, 41), int(dataset.records.index.offset[41]) + 100)
    expected = RecordDataset(jpeg_dataset_path, staged=None)[41]["image"]
    with held_by_another_thread(dataset.records.readers["image"]._changing):
        assert in_fork(lambda: torch.equal(torch.as_tensor(dataset[41]["image"]), torch.as_tensor(expected)))


@pytest.mark.filterwarnings("ignore:.*takes its place")
def test_it_replaces_bad_records(jpeg_dataset_path: Path) -> None:
    replacement = Replacement(RecordDataset(jpeg_dataset_path, staged=None), error_budget=5, quarantine=None)
    ids = np.array([9, 10])

    def replaces() -> bool:
        task, failure = BatchTask(0, 0, RankBatch(ids, 2)), RowFailure(0, SourceError("it is no JPEG"))
        return replacement(task, ids, [failure]).tolist() == replacement.good(ids).tolist() == [10, 10]

    with held_by_another_thread(replacement._lock):
        assert in_fork(replaces)
    assert replaces()
