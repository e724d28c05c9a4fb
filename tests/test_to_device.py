"""Batches copied ahead to the GPU: in order, not before their memory may be filled anew, and with the same numbers."""

import gc
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset

from stagein.formats import Field, Schema, Writer
from stagein.formats.errors import UsageError
from stagein.loaders import DataLoader, RecordDataset
from stagein.loaders.deliveries import Failure
from stagein.loaders.reading import ReadAhead
from stagein.loaders.sampler import Step
from stagein.loaders.stats import LoaderStats
from stagein.loaders.to_device import ToDevice

RECORDS = 40
SHAPE = (4, 64, 65)


class Numbers(Dataset):
    """Dicts of a tensor, a number and a string, as scripts have them."""

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"values": torch.arange(index, index + 5000), "label": index, "name": str(index)}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> RecordDataset:
    path = tmp_path_factory.mktemp("tensors") / "tensors.st"
    schema = Schema(
        fields={
            "volume": Field(kind="tensor", dtype="float32", shape=SHAPE),
            "label": Field(kind="tensor", dtype="int64"),
        }
    )
    with Writer(path, schema, shard_bytes=1 << 20) as writer:
        for record in range(RECORDS):
            writer.write({"volume": np.full(SHAPE, record, np.float32), "label": record})
    return RecordDataset(path, staged=None)


# --- without a GPU: what is sent when, and when it is let go of ---


class Road:
    """Deliveries of the batches 0, 1, 2, …, and a sender that notes what becomes of them. `arrived` is set by the test."""

    def __init__(self, batches: list[object], ready: int = 100) -> None:
        self._batches, self.ready = iter(batches), ready
        self.log: list[str] = []
        self.arrived: set[object] = set()
        self.held: set[object] = set()

    @property
    def next_is_ready(self) -> bool:
        return self.ready > 0

    def __iter__(self):
        return self

    def __next__(self):
        self.ready -= 1
        batch = next(self._batches)
        if isinstance(batch, Exception):
            raise batch
        return Step(0, 0, [0], 1), batch

    def close(self) -> None:
        self.log.append("closed")

    def send(self, batch: object) -> "Parcel":
        return Parcel(self, batch)


class Parcel:
    num_bytes = 10

    def __init__(self, road: Road, batch: object) -> None:
        self._road, self._batch = road, batch
        road.log.append(f"sent {batch}")
        road.held.add(batch)

    @property
    def has_arrived(self) -> bool:
        return self._batch in self._road.arrived

    def receive(self) -> object:
        self._road.log.append(f"received {self._batch}")
        return self._batch

    def wait(self) -> float:
        self._road.held.discard(self._batch)
        return 0.5


def sent_over(road: Road, num_ahead: int) -> tuple[ToDevice, LoaderStats]:
    stats = LoaderStats()
    return ToDevice(road, road.send, num_ahead, stats), stats


def test_batches_that_are_ready_are_sent_ahead_and_no_more_than_that_many():
    road = Road([0, 1, 2, 3, 4])
    ahead, _ = sent_over(road, 2)
    assert next(ahead)[1] == 0
    assert road.log == ["sent 0", "sent 1", "sent 2", "received 0"]
    assert [batch for _, batch in ahead] == [1, 2, 3, 4]


def test_nobody_waits_for_a_batch_that_is_not_asked_for():
    road = Road([0, 1, 2], ready=0)
    ahead, _ = sent_over(road, 2)
    assert next(ahead)[1] == 0
    assert road.log == ["sent 0", "received 0"]


def test_host_memory_is_held_until_its_copy_has_arrived():
    road = Road([0, 1, 2])
    ahead, stats = sent_over(road, 0)
    next(ahead)
    next(ahead)
    assert road.held == {0, 1}
    road.arrived = {0}
    next(ahead)
    assert road.held == {1, 2}
    assert (stats.copy_s, stats.bytes_copied) == (0.5, 10)


def test_the_end_waits_for_every_copy_under_way():
    road = Road([0, 1, 2, 3])
    ahead, stats = sent_over(road, 2)
    next(ahead)
    ahead.close()
    assert road.log[-1] == "closed"
    assert not road.held
    assert stats.bytes_copied == 30


def test_an_error_comes_after_the_batches_before_it_and_ends_nothing():
    road = Road([0, 1, LookupError("gone"), 2, Failure(KeyError("of the user")), 3])
    ahead, _ = sent_over(road, 3)
    assert [next(ahead)[1] for _ in range(2)] == [0, 1]
    with pytest.raises(LookupError, match="gone"):
        next(ahead)
    assert next(ahead)[1] == 2
    assert isinstance(next(ahead)[1], Failure)
    assert next(ahead)[1] == 3
    with pytest.raises(StopIteration):
        next(ahead)


# --- whether the next batch would come at once: what is sent ahead follows from it ---


class FirstAtTheGate(Numbers):
    """Sample 0 comes when the gate opens, all others at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def __getitem__(self, index: int) -> int:
        return index if index or self.gate.wait(20) else -1


def soon(condition) -> bool:
    deadline = time.monotonic() + 10
    while not (is_so := condition()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return is_so


@pytest.mark.parametrize("in_order", [True, False])
def test_in_threads_the_next_batch_is_ready_when_it_is_done(in_order):
    dataset = FirstAtTheGate()
    batches = iter(DataLoader(dataset, 1, num_workers=2, in_order=in_order))
    deliveries = batches._deliveries
    assert soon(lambda: deliveries._deliveries.num_ready == 3)  # all that are ahead but the first
    assert deliveries.next_is_ready == (not in_order)
    dataset.gate.set()
    assert soon(lambda: deliveries.next_is_ready)
    assert len(list(batches)) == RECORDS
    assert not deliveries.next_is_ready


def test_records_read_ahead_are_ready_when_the_next_one_is_read():
    gate = threading.Event()
    reads = ReadAhead(iter(range(6)), lambda task: task or gate.wait(20), num_threads=2, num_ahead=3)
    assert not reads.next_is_ready  # nobody asked yet, and nothing is begun
    opens = threading.Timer(0.05, gate.set)
    opens.start()
    assert next(reads) == 1
    gate.clear()
    assert soon(lambda: reads.next_is_ready)
    reads.close()
    behind = ReadAhead(iter([1, 0, 2, 3]), lambda task: task or gate.wait(20), num_threads=2, num_ahead=3)
    assert next(behind) == 1
    assert soon(lambda: behind.num_ready == 2)
    assert not behind.next_is_ready
    gate.set()
    assert soon(lambda: behind.next_is_ready)
    behind.close()


@pytest.mark.parametrize(
    ("num_threads", "num_ahead", "handed_out"),
    [
        (1, 4, [4, 6, 6, 8, 8, 10, 10]),
        (2, 4, [4, 6, 6, 8, 8, 10, 10]),
        (3, 4, [5, 6, 7, 8, 9, 10, 10]),  # or a thread would be without a task
        (1, 2, [3, 4, 5, 6, 7, 8, 9]),
        (1, 1, [2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_tasks_are_handed_out_together_as_long_as_each_thread_has_one(num_threads, num_ahead, handed_out):
    taken: list[int] = []
    reads = ReadAhead((taken.append(task) or task for task in range(10)), abs, num_threads, num_ahead)
    for result, num_taken in enumerate(handed_out):
        assert next(reads) == result
        assert len(taken) == num_taken
    assert list(reads) == [7, 8, 9]
    reads.close()


@pytest.mark.parametrize("dataset", ["records", "others"])
def test_what_the_caller_makes_is_never_ready(dataset, records):
    batches = iter(DataLoader(records if dataset == "records" else Numbers(), 1))
    for _ in range(3):
        next(batches)
        assert not batches._deliveries.next_is_ready


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("dataset", ["records", "others"])
def test_without_a_gpu_it_has_no_effect_and_says_so(dataset, records):
    chosen = records if dataset == "records" else Numbers()
    for arguments in ({"prefetch_to_device": 2}, {"pin_memory": True}):
        with pytest.warns(UserWarning, match="no effect: there is no accelerator") as caught:
            batches = list(DataLoader(chosen, 4, **arguments))
        assert Path(caught[0].filename).name == Path(__file__).name
        for ours, plain in zip(batches, DataLoader(chosen, 4), strict=True):
            assert torch.equal(ours["label"], plain["label"])
            assert not ours["label"].is_pinned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(iter(DataLoader(chosen, 4, prefetch_to_device=0)))


@pytest.mark.parametrize("ahead", [-1, 1.5, True, "2"])
def test_what_is_no_number_of_batches_is_refused(ahead, records):
    with pytest.raises(UsageError, match="prefetch_to_device"):
        DataLoader(records, 4, prefetch_to_device=ahead)


# --- with one ---


def on_cpu(batch):
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def assert_same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in on_cpu(ours).items():
        expected = on_cpu(theirs)[name]
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch_to_device", [0, 1, 3])
@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("dataset", ["records", "others"])
def test_batches_on_the_gpu_are_those_of_the_cpu(dataset, num_workers, prefetch_to_device, records):
    chosen = records if dataset == "records" else Numbers()
    loaders = [
        DataLoader(chosen, 4, num_workers=num_workers, device="cpu"),
        DataLoader(chosen, 4, num_workers=num_workers, device="cuda", prefetch_to_device=prefetch_to_device),
    ]
    copied = f"copied to cuda:0 from page-locked memory on a stream of their own, {prefetch_to_device} ahead"
    assert copied in loaders[1].explain()
    for ours, theirs in zip(loaders[1], loaders[0], strict=True):
        assert ours["label"].is_cuda
        assert_same(ours, theirs)
    stats = loaders[1].stats()
    assert stats.copy_s > 0
    assert stats.bytes_copied > 0


@pytest.mark.gpu
def test_buffers_of_the_ring_are_not_filled_anew_before_they_are_copied(records):
    """The GPU is kept busy, so that copies are late and readers far ahead; every batch is kept and compared at the end."""
    busy = torch.ones(4096, 4096, device="cuda")
    kept = []
    for epoch in range(3):
        loader = DataLoader(records, 2, num_workers=4, prefetch_factor=4, device="cuda", prefetch_to_device=3)
        for step, batch in enumerate(loader):
            busy = busy @ busy * 1e-4
            kept.append((epoch, step, batch["volume"]))
            if epoch == 1 and step == 5:
                break
    for _, step, volume in kept:
        expected = torch.tensor([2.0 * step, 2.0 * step + 1]).view(2, 1, 1, 1).expand(2, *SHAPE)
        assert torch.equal(volume.cpu(), expected)


@pytest.mark.gpu
def test_memory_of_a_batch_is_not_reused_while_the_callers_stream_works_on_it(records):
    sums = []
    for batch in DataLoader(records, 2, num_workers=2, device="cuda", prefetch_to_device=2):
        torch.cuda._sleep(5_000_000)  # the sum comes late, long after the batch was dropped
        sums.append(batch["volume"].double().mean())
        del batch
    assert [float(each) for each in sums] == [2 * step + 0.5 for step in range(RECORDS // 2)]


@pytest.mark.gpu
def test_copies_overlap_with_what_the_caller_computes(records):
    """The next batch has arrived before a long kernel of the caller's stream ends."""
    loader = DataLoader(records, 4, num_workers=2, device="cuda", prefetch_to_device=1)
    batches = iter(loader)
    next(batches)
    torch.cuda._sleep(1_000_000_000)  # more than half a second
    next(batches)
    assert not torch.cuda.current_stream().query()
    threading.Event().wait(0.1)
    next(batches)
    assert loader.stats().bytes_copied > 0  # a copy that arrived, while the kernel still runs
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_no_memory_of_the_gpu_is_left(records):
    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = allocated()
    for stop in (1, 4, 100):
        for step, _ in enumerate(DataLoader(records, 2, num_workers=2, device="cuda", prefetch_to_device=3)):
            if step == stop:
                break
    assert allocated() <= before
    assert not any(thread.name.startswith("stagein") for thread in threading.enumerate())


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dataset", ["records", "others"])
def test_pinned_batches_are_pinned_as_torchs(dataset, num_workers, records):
    chosen = records if dataset == "records" else Numbers()
    for batch in DataLoader(chosen, 4, num_workers=num_workers, device="cpu", pin_memory=True):
        assert all(value.is_pinned() for value in batch.values() if isinstance(value, torch.Tensor))
    for batch in TorchLoader(Numbers(), 4, pin_memory=True):
        assert batch["values"].is_pinned()
