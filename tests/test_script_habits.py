"""What scripts do with torch's loader beyond its documentation: each is done with torch's, and with ours, and gives the same."""

import dataclasses
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    BatchSampler,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_convert,
    get_worker_info,
)
from torch.utils.data import DataLoader as TorchLoader

from stagein.formats import Writer
from stagein.formats.errors import StageinError, UsageError
from stagein.loaders import DataLoader, RecordDataset
from stagein.loaders.collate import map_tensors

LOADERS = pytest.mark.parametrize("kind", [TorchLoader, DataLoader], ids=["torch", "ours"])
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])
RECORDS = 20


class Numbers(Dataset[int]):
    def __init__(self, samples: int = RECORDS) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        return int(index)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("habits") / "numbers.st"
    with Writer(path) as writer:
        for number in range(RECORDS):
            writer.write({"number": np.int64(number), "volume": np.full((40, 50), number, np.float32)})
    return path


@pytest.fixture
def records(path: Path) -> RecordDataset:
    return RecordDataset(path, staged=None)


def numbers_of(batches: Any) -> list[Any]:
    return [np.asarray(batch["number"] if isinstance(batch, dict) else batch).tolist() for batch in batches]


# --- what a collate_fn makes ---


class Pair(list):
    """Two lists: no list can be made one from any values."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__([first, second])


class Batch(dict):
    def __init__(self, x: Any) -> None:
        super().__init__(x=x, size=len(x))


class Point(NamedTuple):
    x: Any
    y: Any


def cyclic(samples: Any) -> list[Any]:
    batch = [torch.tensor(samples)]
    batch.append(batch)
    return batch


COLLATES = {
    "packed": lambda samples: pack_sequence([torch.ones(each + 1) for each in samples], enforce_sorted=False),
    "sparse": lambda samples: torch.eye(3).to_sparse(),
    "list": lambda samples: Pair(torch.tensor(samples), 2),
    "dict": lambda samples: Batch(torch.tensor(samples)),
    "cyclic": cyclic,
}


@WORKERS
@pytest.mark.parametrize("collate", COLLATES.values(), ids=COLLATES)
def test_batches_of_any_type_come_as_collate_fn_made_them(collate, num_workers, records):
    ours = list(DataLoader(Numbers(4), 2, num_workers=num_workers, collate_fn=collate))
    assert [type(batch) for batch in ours] == [type(collate([0, 1]))] * 2
    of_records = DataLoader(records, 2, num_workers=num_workers, collate_fn=lambda samples: collate([0, 1]))
    assert type(next(iter(of_records))) is type(ours[0])


def test_tensors_are_exchanged_in_containers_of_any_type():
    def twice(batch: Any) -> Any:
        return map_tensors(lambda tensor: 2 * tensor, batch)

    packed = twice(COLLATES["packed"]([0, 2]))
    assert isinstance(packed, PackedSequence) and packed.batch_sizes.tolist() == [2, 1, 1]
    assert packed.data.tolist() == [2, 2, 2, 2]
    pair, batch = twice(Pair(torch.ones(1), "x")), twice(Batch(torch.ones(2)))
    assert (type(pair), pair[0].item(), pair[1]) == (Pair, 2, "x")
    assert (type(batch), batch["x"].tolist(), batch["size"]) == (Batch, [2, 2], 2)
    assert twice(Point(torch.ones(1), [torch.ones(1)])) == Point(torch.tensor([2.0]), [torch.tensor([2.0])])


@LOADERS
def test_default_convert_in_place_of_default_collate_leaves_samples_apart(kind, records):
    dataset = records if kind is DataLoader else [records[number] for number in range(RECORDS)]
    batch = next(iter(kind(dataset, 2, collate_fn=default_convert)))
    assert isinstance(batch, list) and [int(sample["number"]) for sample in batch] == [0, 1]


# --- samplers that are put in place of others ---


class Repeated:
    """A sampler that never ends, as timm's and Ultralytics' loaders have it."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from iter(self.sampler)


def endless(kind: type[Any]) -> type[Any]:
    """A loader whose workers go on from epoch to epoch."""

    class Endless(kind):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._DataLoader__initialized = False
            self.batch_sampler = Repeated(self.batch_sampler)
            self._DataLoader__initialized = True
            self.iterator = super().__iter__()

        def __len__(self) -> int:
            return len(self.batch_sampler.sampler)

        def __iter__(self) -> Iterator[Any]:
            for _ in range(len(self)):
                yield next(self.iterator)

    return Endless


@WORKERS
def test_epochs_of_a_sampler_that_never_ends(num_workers):
    runs = []
    for kind in (TorchLoader, DataLoader):
        torch.manual_seed(3)
        loader = endless(kind)(Numbers(), 6, shuffle=True, num_workers=num_workers)
        runs.append([numbers_of(loader) for _ in range(3)])
        del loader
    assert runs[0] == runs[1]


@WORKERS
def test_epochs_of_a_sampler_that_never_ends_over_records_are_those_of_the_loader(records, num_workers):
    loader = endless(DataLoader)(records, 6, shuffle=True, num_workers=num_workers, seed=5)
    plain = DataLoader(records, 6, shuffle=True, seed=5)
    epochs = [numbers_of(loader) for _ in range(3)]
    assert epochs == [numbers_of(plain) for _ in range(3)]
    assert all(sorted(chain(*epoch)) == list(range(RECORDS)) for epoch in epochs) and epochs[0] != epochs[1]
    with pytest.raises(UsageError, match="tail='pad'"):
        endless(DataLoader)(records, 6, tail="pad")


# --- the order in which generators are drawn from ---


class Eager:
    """Draws when it is asked for its iterator, not for the first index."""

    def __init__(self, batched: bool) -> None:
        self.batched = batched

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(RECORDS)
        return iter(order.split(3) if self.batched else order.tolist())


def shared(**arguments: Any) -> dict[str, Any]:
    return arguments


SAMPLERS = {
    "random": lambda: {"sampler": RandomSampler(range(RECORDS)), "batch_size": 3},
    "subset": lambda: {"sampler": SubsetRandomSampler(range(RECORDS)), "batch_size": 3},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0] * RECORDS, 30), "batch_size": 3},
    "generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(3), "batch_size": 3},
    "eager batches": lambda: {"batch_sampler": Eager(True)},
    "eager": lambda: {"sampler": Eager(False), "batch_size": None},
}


@WORKERS
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("of_records", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_samplers_draw_what_they_draw_in_torch(sampler, of_records, persistent, num_workers, records):
    runs = []
    for kind in (TorchLoader, DataLoader):
        dataset = records if of_records and kind is DataLoader else Numbers()
        torch.manual_seed(9)
        loader = kind(dataset, num_workers=num_workers, persistent_workers=persistent and num_workers > 0, **sampler())
        runs.append([numbers_of(loader) for _ in range(3)] + [torch.rand(1).item()])
        del loader
    assert runs[0] == runs[1]


@WORKERS
@pytest.mark.parametrize("delivered", [1, 4])
@pytest.mark.parametrize("of_records", [False, True])
@pytest.mark.parametrize("sampler", ["random", "weighted", "generator"])
def test_what_is_left_of_an_epoch_is_the_same_whoever_draws_the_seed_of_workers(
    sampler, of_records, delivered, num_workers, records
):
    dataset = records if of_records else Numbers()

    def make() -> DataLoader:
        return DataLoader(dataset, num_workers=num_workers, **SAMPLERS[sampler]())

    torch.manual_seed(4)
    loader, batches = make(), []
    for batch in loader:
        batches.append(batch)
        if len(batches) == delivered:
            state = loader.state_dict()
    torch.manual_seed(77)
    again = make()
    again.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert numbers_of(again) == numbers_of(batches)[delivered:]


def test_worker_init_fn_leaves_what_the_caller_draws_meanwhile_as_it_is(records):
    def slow(number: int) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(123)
        time.sleep(0.2)

    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(1).item()

    def run(worker_init_fn: Any, dataset: Any) -> list[tuple[float, float, float]]:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(5)
        batches = iter(DataLoader(dataset, 2, num_workers=2, worker_init_fn=worker_init_fn))
        drawn = []
        for _ in range(12):
            drawn.append(draw())
            time.sleep(0.02)
        batches.close()
        return drawn

    for dataset in (Numbers(), records):
        assert run(slow, dataset) == run(None, dataset)


# --- what data sets are asked for ---


@dataclasses.dataclass
class Key:
    first: int

    def __iter__(self) -> Iterator[int]:
        return iter((self.first, self.first + 1))


KEYS = {
    "tensor": lambda: [torch.tensor([1, 2]), torch.tensor([3])],
    "array": lambda: [np.array([1, 2]), np.array([3])],
    "range": lambda: [range(1, 3), range(3, 4)],
    "tuple": lambda: [(1, 2), (3,)],
    "dict": lambda: [{1: "a", 2: "b"}, {3: "c"}],
    "slice": lambda: [slice(1, 3), slice(3, 4)],
    "dataclass": lambda: [Key(1), Key(3)],
}


class Asked(Numbers):
    def __getitems__(self, indices: Any) -> list[Any]:
        return [repr(indices), type(indices).__name__]


@LOADERS
@WORKERS
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_a_data_set_is_asked_for_what_the_batch_sampler_yields(kind, num_workers, keys):
    if kind is TorchLoader and num_workers:
        pytest.skip("torch's worker processes get copies")
    got = list(kind(Asked(), batch_sampler=keys(), collate_fn=list, num_workers=num_workers))
    assert got == [[repr(key), type(key).__name__] for key in keys()]


@LOADERS
def test_a_batch_without_an_index_is_what_collate_makes_of_it(kind):
    with pytest.raises(IndexError):
        list(kind(Numbers(), batch_sampler=[[0, 1], []]))
    assert list(kind(Numbers(), batch_sampler=[[0, 1], []], collate_fn=list)) == [[0, 1], []]


class Unsized(Numbers):
    def __len__(self) -> int:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


class UnsizedSampler(Unsized):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class UnsizedStream(IterableDataset[int]):
    state_dict, load_state_dict = Unsized.state_dict, Unsized.load_state_dict

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


@LOADERS
@WORKERS
def test_methods_of_a_base_class_are_not_missed(kind, num_workers):
    loader = kind(Unsized(), 2, sampler=UnsizedSampler(), num_workers=num_workers)
    assert numbers_of(loader) == [[0, 1], [2, 3], [4]]
    assert numbers_of(kind(UnsizedStream(), 2)) == [[0, 1], [2, 3], [4]]
    if kind is DataLoader:
        assert _state_half_way(loader)["refused"]
        assert "does not say where it is" in _state_half_way(kind(UnsizedStream(), 2))["refused"]


def _state_half_way(loader: DataLoader) -> dict[str, Any]:
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    batches.close()
    return state


def test_without_batches_ranks_without_a_sample_in_the_last_step_are_refused():
    with pytest.raises(UsageError, match="cannot share 5 samples out among 2 ranks"):
        DataLoader(Numbers(5), None, distributed=(1, 2))
    steps = [numbers_of(DataLoader(Numbers(6), None, distributed=(rank, 2))) for rank in (0, 1)]
    assert sorted(chain(*steps)) == list(range(6)) and len(steps[0]) == len(steps[1])
    half_way = DataLoader(Numbers(8), None, distributed=(0, 2))
    for number, _ in enumerate(half_way):
        if number == 2:
            break
    on_four = DataLoader(Numbers(8), None, distributed=(3, 4))
    on_four.load_state_dict(half_way.state_dict())
    with pytest.raises(UsageError, match="cannot share 2 samples out among 4 ranks"):
        iter(on_four)


# --- errors ---


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


@LOADERS
@WORKERS
def test_an_error_that_takes_no_note_is_raised(kind, num_workers):
    class Failing(Numbers):
        def __getitem__(self, index: int) -> int:
            if index == 3:
                raise FrozenError(3)
            return index

    if kind is TorchLoader and num_workers:
        pytest.skip("it is another error, by torch's worker processes")
    batches = iter(kind(Failing(), 2, num_workers=num_workers))
    assert next(batches).tolist() == [0, 1]
    with pytest.raises(FrozenError, match="3"):
        next(batches)
    assert next(batches).tolist() == [4, 5]


def test_a_batch_that_takes_too_long_is_a_runtime_error_as_in_torch():
    gate = threading.Event()

    class Slow(Numbers):
        def __getitem__(self, index: int) -> int:
            gate.wait(20)
            return index

    batches = iter(DataLoader(Slow(), 2, num_workers=1, timeout=0.3))
    with pytest.raises(RuntimeError, match="not loaded within") as raised:
        next(batches)
    assert isinstance(raised.value, StageinError)
    gate.set()
    batches.close()


class FailingAtFive(Numbers):
    def __getitem__(self, index: int) -> int:
        if index == 5:
            raise ValueError("five")
        return index


@pytest.mark.parametrize("arguments", [{}, {"num_workers": 2}, {"num_workers": 2, "multiprocessing_context": "fork"}])
def test_the_state_after_an_error_is_that_before_it_and_goes_on_right_after_the_next_batch(arguments):
    loader = DataLoader(FailingAtFive(), 2, **arguments)
    batches, delivered = iter(loader), []
    for _ in range(2):
        delivered.append(next(batches).tolist())
    with pytest.raises(ValueError, match="five"):
        next(batches)
    assert loader.state_dict()["batches_delivered"] == 2
    delivered.append(next(batches).tolist())
    assert delivered == [[0, 1], [2, 3], [6, 7]]
    assert loader.state_dict()["batches_delivered"] == 4
    batches.close()


# --- threads that stand for worker processes ---


class Informed(Numbers):
    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        assert info is not None
        return info.id < 2, info.num_workers, info.rng is None, info.worker_method is not None, torch.is_grad_enabled()


@LOADERS
def test_workers_are_told_what_torchs_are(kind):
    with torch.no_grad():
        batches = list(kind(Informed(4), 1, num_workers=2))
    assert [tuple(int(value) for value in batch) for batch in batches] == [(1, 2, 1, 1, 0)] * 4


class Nested(Numbers):
    """Has worker processes of its own: each sample tells what those are told."""

    def __getitem__(self, index: int) -> Any:
        inner = TorchLoader(Inner(2), 1, num_workers=1, multiprocessing_context="fork", collate_fn=list)
        return [each for (each,) in inner]


class Inner(Numbers):
    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        return None if info is None else (info.id, type(info.dataset).__name__)


def test_processes_forked_by_a_thread_are_told_of_themselves():
    loader = DataLoader(Nested(2), 1, num_workers=1, collate_fn=list)
    assert list(loader) == [[[(0, "Inner")] * 2]] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 1, "multiprocessing_context": "fork"},
        {"num_workers": 2, "persistent_workers": True, "collate_fn": default_convert},
    ],
    ids=str,
)
@pytest.mark.parametrize("of_records", [False, True])
def test_a_loader_that_was_in_use_can_be_pickled(arguments, of_records, records):
    loader = DataLoader(records if of_records else Numbers(), 5, **arguments)
    first = [str(batch) for batch in loader]
    copy = pickle.loads(pickle.dumps(loader))
    assert [str(batch) for batch in copy] == [str(batch) for batch in loader] == first


EXITING = """
import sys, torch
from torch.utils.data import Dataset
from stagein.loaders import DataLoader, PerSample, RecordDataset
class Work(Dataset):
    def __len__(self): return 2000
    def __getitem__(self, index):
        x = torch.randn(3, 256, 256)
        for _ in range(4): x = (x - x.mean()) / x.std()
        return x
loader = DataLoader(Work(), 8, num_workers=4, persistent_workers=sys.argv[1] == "persistent")
if sys.argv[2] == "records":
    work = PerSample(lambda sample: {"x": Work()[0]})
    loader = DataLoader(
        RecordDataset(sys.argv[4], staged=None), 2, num_workers=4, persistent_workers=True, transform=work, device="cpu"
    )
def for_ever():
    while True: yield from loader
how = sys.argv[3]
batches = for_ever() if how == "generator" else iter(loader)
next(batches)
if how == "exits": sys.exit(3)
if how == "raises": raise SystemExit(3)
if how == "breaks":
    for _ in loader: break
"""


@pytest.mark.parametrize("how", ["ends", "exits", "breaks", "generator"])
@pytest.mark.parametrize("workers", ["persistent", "of an epoch"])
@pytest.mark.parametrize("dataset", ["any", "records"])
def test_an_interpreter_exits_with_its_code_while_threads_work(how, workers, dataset, path):
    if dataset == "records" and workers == "of an epoch":
        pytest.skip("the same")
    command = [sys.executable, "-c", EXITING, workers, dataset, how, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3 if how == "exits" else 0, "")


FORKED_HALF_WAY = """
import os, sys
from stagein.formats.errors import UsageError
from stagein.loaders import DataLoader, RecordDataset
for dataset in (list(range(20)), RecordDataset(sys.argv[1], staged=None)):
    loader = DataLoader(dataset, 2, num_workers=2, device="cpu")
    batches = iter(loader)
    next(batches)
    child = os.fork()
    if not child:
        try:
            next(batches)
        except UsageError as error:
            os._exit(0 if "begin one here" in str(error) and len(list(loader)) == 10 else 1)
        os._exit(2)
    print(os.waitpid(child, 0)[1], len(list(batches)), flush=True)
"""


def test_an_iterator_that_a_fork_inherits_is_refused_there(path):
    command = [sys.executable, "-c", FORKED_HALF_WAY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("0 9\n0 9\n", "", 0)


def test_batch_samplers_of_torchs_around_ours_keep_their_order(records):
    sampler = DataLoader(records, 1, shuffle=True, seed=3).sampler
    by_sampler = DataLoader(records, batch_sampler=BatchSampler(sampler, 4, drop_last=False))
    assert numbers_of(by_sampler) == numbers_of(DataLoader(records, 4, shuffle=True, seed=3))
