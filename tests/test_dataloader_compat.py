"""Each case runs through torch's DataLoader and through ours, over ordinary data sets, and must give the same."""

import collections
import itertools
import json
import random
import threading
import time
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.utils.data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
    random_split,
)

from stagein.formats.errors import ChecksumError, StageinError, UsageError
from stagein.loaders import DataLoader

TorchLoader = torch.utils.data.DataLoader
SAMPLES = 23


class Numbers(Dataset):
    """Sample i is i."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Many(Numbers):
    """A data set that loads a batch with one call, and remembers how it was asked."""

    asked: list[list[int]]

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.asked.append(list(indices))
        return [100 + index for index in indices]


class Of(Dataset):
    """The samples of a list, or the values of a dict by key."""

    def __init__(self, samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key):
        return self.samples[key]


class Stream(IterableDataset):
    def __init__(self, length: int = 7) -> None:
        self.length = length

    def __iter__(self):
        return iter(range(self.length))


class Point(NamedTuple):
    x: torch.Tensor
    label: int


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("stagein")] == []


def plain(batch):
    """A batch as plain Python values, with the types of what held them."""
    if isinstance(batch, torch.Tensor):
        return ("tensor", str(batch.dtype), batch.tolist())
    if isinstance(batch, collections.abc.Mapping):
        return (type(batch).__name__, {key: plain(value) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        return (type(batch).__name__, [plain(value) for value in batch])
    return (type(batch).__name__, batch)


def epochs(loader, number: int = 2) -> list:
    return [[plain(batch) for batch in loader] for _ in range(number)]


def both(make_dataset, num_workers: int = 0, **arguments) -> None:
    """Two epochs through both loaders from the same seed; arguments that are functions are called for each loader."""
    results = []
    for kind, workers in ((TorchLoader, 0), (DataLoader, num_workers)):
        torch.manual_seed(11)
        made = {
            name: value() if callable(value) and name != "collate_fn" else value for name, value in arguments.items()
        }
        loader = kind(make_dataset(), num_workers=workers, **made)
        try:
            length = len(loader)
        except TypeError:
            length = None
        results.append((length, epochs(loader), torch.rand(3).tolist()))
    assert results[1] == results[0]


# --- which samples, in which order, and what is drawn for it ---


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [None, False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_batches_of_a_map_style_data_set(batch_size, shuffle, drop_last, num_workers):
    both(Numbers, num_workers, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        {"shuffle": True, "generator": lambda: torch.Generator().manual_seed(3)},
        {"sampler": [5, 5, 1, 0, 22]},
        {"sampler": lambda: SequentialSampler(range(9))},
        {"sampler": lambda: RandomSampler(range(SAMPLES), replacement=True, num_samples=50)},
        {"sampler": lambda: RandomSampler(range(SAMPLES), generator=torch.Generator().manual_seed(2))},
        {"sampler": lambda: SubsetRandomSampler([3, 9, 4, 20])},
        {"sampler": lambda: WeightedRandomSampler([1.0] * SAMPLES, 40)},
        {"sampler": lambda: DistributedSampler(range(SAMPLES), num_replicas=2, rank=1, seed=4)},
        {"batch_sampler": [[0], [1, 2, 3], [4, 4]]},
        {"batch_sampler": lambda: BatchSampler(RandomSampler(range(SAMPLES)), 5, drop_last=True)},
        {"batch_size": None},
        {"batch_size": None, "shuffle": True},
        {"batch_size": None, "sampler": [[1, 2], [3]], "collate_fn": lambda sample: torch.tensor(sample) + 1},
    ],
)
def test_samplers_generators_and_no_batching(arguments, num_workers):
    both(Numbers, num_workers, **arguments)


def test_the_index_sequence_is_torchs_with_its_worker_processes_too():
    for kind in (TorchLoader, DataLoader):
        torch.manual_seed(5)
        loader = kind(Numbers(), 4, shuffle=True, num_workers=2)
        first = iter(loader)  # the sampler begins here, not when the first batch is asked for
        drawn = torch.rand(2).tolist()
        result = [plain(batch) for batch in first], drawn, torch.rand(1).tolist()
        if kind is TorchLoader:
            expected = result
    assert result == expected


def test_persistent_workers_draw_their_seed_once_as_in_torch():
    results = []
    for kind in (TorchLoader, DataLoader):
        torch.manual_seed(5)
        loader = kind(Numbers(), 4, shuffle=True, num_workers=1, persistent_workers=True)
        results.append((epochs(loader, 3), torch.rand(2).tolist()))
        del loader
    assert results[1] == results[0]


def test_keys_may_be_anything():
    samples = {"a": 1.5, "b": 2.5, "c": 3.5}
    both(lambda: Of(samples), 2, sampler=["c", "a", "b"], batch_size=2)


def test_a_sampler_that_reuses_its_list_between_batches():
    class Reusing:
        def __iter__(self):
            indices = []
            for number in range(6):
                indices[:] = [number, number + 1]
                yield indices

    both(Numbers, 3, batch_sampler=Reusing)


def test_getitems_is_asked_once_a_batch():
    dataset = Many(10)
    dataset.asked = []
    batches = list(DataLoader(dataset, 4, num_workers=1))
    assert dataset.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[2].tolist() == [108, 109]


class Batches(Numbers):
    """A data set that loads a whole batch with one call."""

    def __getitems__(self, indices: list[int]):
        return {"x": torch.tensor(indices) * 10}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_getitems_may_make_a_batch(num_workers):
    both(Batches, num_workers, batch_size=4, collate_fn=lambda batch: batch)


def test_an_empty_data_set():
    both(lambda: Numbers(0), batch_size=4)
    for kind in (TorchLoader, DataLoader):
        with pytest.raises(ValueError, match="num_samples should be a positive integer"):
            kind(Numbers(0), shuffle=True)


# --- what samples and batches look like ---

STRUCTURES = {
    "dict": [{"x": torch.tensor([i, i + 1]), "name": f"n{i}", "deep": {"y": i * 0.5}} for i in range(5)],
    "ordered dict": [collections.OrderedDict(b=i, a=i) for i in range(5)],
    "tuple": [(torch.full((2, 2), i), i) for i in range(5)],
    "named tuple": [Point(torch.tensor(i), i) for i in range(5)],
    "list": [[i, float(i)] for i in range(5)],
    "nested": [({"a": [torch.tensor(i), (i, "s")]}, Point(torch.tensor([i]), i)) for i in range(5)],
    "str": ["a", "bc", "", "d", "é"],
    "bytes": [b"a", b"bc", b"", b"d", b"\0"],
    "float": [0.5, 1.5, 2.5, 3.5, 4.5],
    "bool": [True, False, True, True, False],
    "complex": [np.complex64(1 + 2j)] * 5,
    "numpy array": [np.full((2, 3), i, np.float32) for i in range(5)],
    "numpy 0-d": [np.array(i, np.int16) for i in range(5)],
    "numpy scalars": [np.float64(i) for i in range(5)],
    "uint16": [np.full(3, 60000 + i, np.uint16) for i in range(5)],
    "bfloat16": [torch.full((2,), i, dtype=torch.bfloat16) for i in range(5)],
    "no elements": [torch.empty((0, 3)) for _ in range(5)],
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_of_samples(name, num_workers):
    both(lambda: Of(STRUCTURES[name]), num_workers, batch_size=2)
    both(lambda: Of(STRUCTURES[name]), num_workers, batch_size=None)


def test_samples_that_do_not_stack_are_the_same_error():
    for kind in (TorchLoader, DataLoader):
        with pytest.raises(RuntimeError, match="equal size"):
            list(kind(Of([torch.zeros(1), torch.zeros(2)]), 2))


def test_a_collate_function_gets_the_samples():
    both(Numbers, 2, batch_size=5, collate_fn=lambda samples: {"sum": sum(samples), "n": len(samples)})


PAIRS = TensorDataset(torch.arange(10), torch.arange(10) * 2)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ConcatDataset([PAIRS, TensorDataset(torch.arange(5), torch.arange(5))]),
        lambda: Subset(PAIRS, [3, 1, 2]),
        lambda: StackDataset(PAIRS, PAIRS),
        lambda: StackDataset(x=PAIRS, y=PAIRS),
        lambda: random_split(PAIRS, [7, 3], torch.Generator().manual_seed(1))[0],
    ],
)
def test_data_sets_made_of_others(make, num_workers):
    both(make, num_workers, batch_size=4, shuffle=True)


def test_a_data_set_that_grows_after_its_loader_was_made():
    for shuffle in (False, True):
        samples = [1, 2, 3]
        loader = DataLoader(samples, shuffle=shuffle)
        samples.extend([4, 5, 6, 7])
        assert len(loader) == 7
        assert sorted(batch.item() for batch in loader) == [1, 2, 3, 4, 5, 6, 7]


def test_a_sampler_without_length_has_none_here_either():
    for kind in (TorchLoader, DataLoader):
        for arguments in ({"sampler": iter(range(5))}, {"batch_sampler": iter([[1], [2]])}):
            with pytest.raises(TypeError, match=r"has no len\(\)"):
                len(kind(range(5), **arguments))


def test_annotations_name_the_batch_as_torchs_do():
    assert DataLoader[torch.Tensor].__origin__ is DataLoader
    assert list(DataLoader[int]([1, 2])) == [1, 2]


def test_iterable_data_sets():
    both(Stream, batch_size=3)
    both(Stream, batch_size=3, drop_last=True)
    both(Stream, batch_size=None)
    both(Stream, batch_size=2, collate_fn=list)


def test_an_iterable_data_set_in_torchs_worker_processes():
    results = [epochs(kind(Stream(), 3, num_workers=2, timeout=30), 1) for kind in (TorchLoader, DataLoader)]
    assert results[1] == results[0]


def test_an_iterable_data_set_that_lied_about_its_length_is_warned_of():
    class Lying(Stream):
        def __len__(self):
            return 3

    for kind in (TorchLoader, DataLoader):
        loader = kind(Lying(), None)
        assert len(loader) == 3
        with pytest.warns(UserWarning, match="was reported to be 3"):
            list(loader)


# --- arguments that are wrong ---


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"batch_size": None, "drop_last": True},
        {"sampler": [0], "shuffle": True},
        {"batch_sampler": [[0]], "batch_size": 2},
        {"batch_sampler": [[0]], "shuffle": True},
        {"batch_sampler": [[0]], "sampler": [0]},
        {"batch_sampler": [[0]], "drop_last": True},
        {"num_workers": -1},
        {"timeout": -1},
        {"prefetch_factor": 2},
        {"num_workers": 1, "prefetch_factor": -1},
        {"persistent_workers": True},
        {"multiprocessing_context": "spawn"},
        {"num_workers": 1, "multiprocessing_context": "teleport"},
        {"num_workers": 1, "multiprocessing_context": 3},
    ],
)
def test_wrong_arguments_are_the_same_errors(arguments):
    raised = []
    for kind in (TorchLoader, DataLoader):
        with pytest.raises((ValueError, TypeError)) as error:
            kind(Numbers(), **arguments)
        raised.append((error.type, str(error.value)))
    assert raised[1] == raised[0]


@pytest.mark.parametrize("arguments", [{"shuffle": True}, {"sampler": [0]}, {"batch_sampler": [[0]]}])
def test_an_iterable_data_set_takes_no_order(arguments):
    for kind in (TorchLoader, DataLoader):
        with pytest.raises(ValueError, match="IterableDataset"):
            kind(Stream(), **arguments)


def test_attributes_cannot_be_exchanged_later():
    for kind in (TorchLoader, DataLoader):
        loader = kind(Numbers())
        for name in ("batch_size", "sampler", "batch_sampler", "drop_last", "dataset", "persistent_workers"):
            with pytest.raises(ValueError, match="should not be set after"):
                setattr(loader, name, None)


def double(samples):
    return torch.tensor(samples) * 2


EXCHANGED = [
    {"collate_fn": double},
    {"num_workers": 2, "prefetch_factor": 1},
    {"num_workers": 0, "collate_fn": double},
    {"in_order": False, "num_workers": 1},
    {"generator": torch.Generator().manual_seed(4)},
    {"timeout": 30},
]


@pytest.mark.parametrize("dataset", [Numbers, Stream])
@pytest.mark.parametrize("attributes", EXCHANGED, ids=lambda attributes: ", ".join(attributes))
def test_attributes_that_are_exchanged_count_from_the_next_iterator_on(attributes, dataset):
    results = []
    for kind in (TorchLoader, DataLoader):
        torch.manual_seed(5)
        loader = kind(dataset(), 2, num_workers=1, **({"shuffle": True} if dataset is Numbers else {}))
        result = [plain(next(iter(loader)))]
        for name, value in attributes.items():
            setattr(loader, name, value)
        # where several processes load an iterable data set, each has all of it
        results.append([*result, *sorted(map(str, epochs(loader, 2)))])
    assert results[1] == results[0]
    if dataset is Numbers:
        assert "by the caller" in loader.explain() if loader.num_workers == 0 else "threads" in loader.explain()
        assert loader.stats().batches == 1 + 2 * len(loader)


def test_worker_init_fn_is_called_if_it_comes_later():
    initialised = []
    loader = DataLoader(Numbers(), 2, num_workers=2)
    loader.worker_init_fn = initialised.append
    list(loader)
    assert sorted(initialised) == [0, 1]


def test_a_state_knows_how_the_loader_loads_now():
    loader = DataLoader(Numbers(), 4)
    loader.num_workers, loader.in_order = 2, False
    batches = iter(loader)
    next(batches)
    assert "in_order=False" in loader.state_dict()["refused"]
    batches.close()


@pytest.mark.parametrize(
    "name", ["transform", "device", "seed", "distributed", "tail", "decode_threads", "on_error", "quarantine"]
)
def test_arguments_of_ours_cannot_be_exchanged_but_a_subclass_may_have_its_own(name):
    class Named(DataLoader):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            setattr(self, name, "mine")

    with pytest.raises(ValueError, match=f"{name} attribute should not be set after"):
        setattr(DataLoader(Numbers()), name, None)
    assert getattr(Named(Numbers(), 4), name) == "mine"


def test_public_attributes_are_torchs():
    arguments = {"batch_size": 3, "num_workers": 2, "drop_last": True, "timeout": 4, "prefetch_factor": 5}
    ours, theirs = DataLoader(Numbers(), **arguments), TorchLoader(Numbers(), **arguments)
    for name, value in vars(theirs).items():
        if not name.startswith("_"):
            assert type(getattr(ours, name)) is type(value), name
    assert (ours.batch_size, ours.prefetch_factor, ours.timeout) == (3, 5, 4)
    assert ours.collate_fn is theirs.collate_fn
    assert ours.multiprocessing_context is None


def test_pinned_memory_without_an_accelerator_warns_as_torch_does():
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    for kind in (TorchLoader, DataLoader):
        with pytest.warns(UserWarning, match="no accelerator"):
            list(kind(Numbers(), pin_memory=True))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            list(kind(Numbers(), pin_memory=True, pin_memory_device="cuda"))
        assert any("pin_memory_device is deprecated" in str(warning.message) for warning in caught)


# --- errors while loading ---


class Failing(Numbers):
    def __getitem__(self, index: int) -> int:
        if index == 9:
            raise LookupError("no sample 9")
        return index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_data_set_comes_after_the_batches_before_it_and_ends_nothing(num_workers):
    for kind in (TorchLoader, DataLoader):
        batches = iter(kind(Failing(), 4, num_workers=num_workers))
        assert [next(batches).tolist()[0] for _ in range(2)] == [0, 4]
        with pytest.raises(LookupError, match="no sample 9"):
            next(batches)
        assert [batch.tolist()[0] for batch in batches] == [12, 16, 20]


def test_an_error_in_a_thread_says_where():
    with pytest.raises(LookupError) as error:
        list(DataLoader(Failing(), 4, num_workers=1))
    assert error.value.__notes__ == ["in stagein-worker-0, epoch 0, batch 2"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_records_on_one_rank_of_several_notes_rank_and_node(num_workers, monkeypatch):
    monkeypatch.setenv("STAGEIN_NODE", "node7")

    class Bad(Numbers):
        def __getitem__(self, index: int) -> int:
            raise ChecksumError(f"record {index} is damaged")

    with pytest.raises(ChecksumError) as error:
        list(DataLoader(Bad(), 4, num_workers=num_workers, distributed=(1, 2)))
    assert error.value.__notes__ == ["on rank 1 of 2, node node7"]


def test_an_error_of_the_sampler_comes_after_the_batches_before_it():
    def sampler():
        yield from range(8)
        raise LookupError("no index 8")

    for kind in (TorchLoader, DataLoader):
        batches = iter(kind(Numbers(), 4, sampler=sampler()))
        assert len([next(batches), next(batches)]) == 2
        with pytest.raises(LookupError, match="no index 8"):
            next(batches)


def test_an_error_of_worker_init_fn_reaches_the_caller():
    def fails(_):
        raise PermissionError("not today")

    with pytest.raises(PermissionError, match="not today"):
        list(DataLoader(Numbers(), num_workers=2, worker_init_fn=fails))


def test_a_sample_that_takes_too_long_is_a_timeout_that_names_the_batch():
    gate = threading.Event()

    class Slow(Numbers):
        def __getitem__(self, index):
            if index == 8:
                gate.wait(20)
            return index

    batches = iter(DataLoader(Slow(), 4, num_workers=1, timeout=1.5))
    started = time.monotonic()
    with pytest.raises(StageinError, match=r"epoch 0, batch 2: not loaded within 1\.5 s \(it starts with sample 8\)"):
        list(batches)
    assert time.monotonic() - started < 15
    gate.set()
    batches.close()
    _wait_for_threads()


def test_a_timeout_needs_workers():
    with pytest.raises(UsageError, match="give num_workers"):
        DataLoader(Numbers(), timeout=3)


def _wait_for_threads() -> None:
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("stagein") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)


# --- workers ---


class Asking(Numbers):
    """Samples say which worker made them."""

    def __getitem__(self, index):
        time.sleep(0.002)
        info = get_worker_info()
        return (-1, 0) if info is None else (info.id, info.num_workers)


def test_get_worker_info_tells_of_the_thread():
    samples = [
        tuple(pair) for batch in DataLoader(Asking(), 1, num_workers=3) for pair in torch.stack(batch, 1).tolist()
    ]
    assert {workers for _, workers in samples} == {3}
    assert {worker for worker, _ in samples} == {0, 1, 2}
    assert get_worker_info() is None
    assert [batch[0].item() for batch in DataLoader(Asking(2))] == [-1, -1]


def test_worker_seeds_differ_and_follow_from_the_generator():
    def seeds() -> list[int]:
        seen = {}

        def note(worker: int) -> None:
            seen[worker] = get_worker_info().seed

        list(DataLoader(Numbers(), 4, num_workers=2, worker_init_fn=note, generator=torch.Generator().manual_seed(6)))
        return [seen[0], seen[1]]

    first, second = seeds()
    base_seed = torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(6)).item()
    assert [first, second] == [base_seed, base_seed + 1]
    assert seeds() == [first, second]


def test_the_recipe_for_seeds_of_workers_gives_each_its_own_and_leaves_the_callers_generators_alone():
    """As in torch's notes on reproducibility."""
    seen: list[int] = []

    def seed_worker(_: int) -> None:
        seen.append(torch.initial_seed() % 2**32)
        np.random.seed(seen[-1])
        random.seed(seen[-1])
        torch.manual_seed(seen[-1])

    drawn = []
    for worker_init_fn in (None, seed_worker):
        torch.manual_seed(8)
        np.random.seed(8)
        random.seed(8)
        epochs(DataLoader(Numbers(), 4, num_workers=2, worker_init_fn=worker_init_fn))
        drawn.append((torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()))
    assert drawn[1] == drawn[0]
    assert len(set(seen)) == len(seen) == 4
    assert torch.initial_seed() == 8


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_initialised_once_an_epoch_or_once(persistent):
    initialised = []
    loader = DataLoader(Numbers(), 4, num_workers=2, worker_init_fn=initialised.append, persistent_workers=persistent)
    epochs(loader, 3)
    assert sorted(initialised) == ([0, 1] if persistent else [0, 0, 0, 1, 1, 1])


def test_prefetch_factor_bounds_what_is_loaded_ahead():
    loaded = []

    class Noting(Numbers):
        def __getitem__(self, index):
            loaded.append(index)
            return index

    def assert_no_more_than(count):
        until = time.monotonic() + 20
        while len(loaded) < count:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(loaded) == list(range(count))

    batches = iter(DataLoader(Noting(100), 1, num_workers=2, prefetch_factor=3))
    assert_no_more_than(6)
    next(batches)
    assert_no_more_than(7)
    batches.close()


def test_in_order_keeps_the_order_and_without_it_the_ready_come_first():
    gate = threading.Event()

    class FirstIsSlow(Numbers):
        def __getitem__(self, index):
            if index == 0:
                gate.wait(5)
            return index

    unordered = iter(DataLoader(FirstIsSlow(6), 1, num_workers=2, in_order=False))
    assert next(unordered).item() == 1
    gate.set()
    assert sorted(batch.item() for batch in unordered) == [0, 2, 3, 4, 5]
    assert [batch.item() for batch in DataLoader(Asking(6), 1, num_workers=3, collate_fn=lambda _: torch.zeros(1))] == [
        0
    ] * 6


def test_threads_share_one_data_set_and_end_with_break_exception_or_dropping():
    loader = DataLoader(Numbers(1000), 1, num_workers=3)
    for _ in loader:
        break
    with pytest.raises(ZeroDivisionError):
        for _ in loader:
            raise ZeroDivisionError
    iter(loader)
    batches = iter(loader)
    next(batches)
    del batches


def test_two_iterators_of_one_loader_do_not_disturb_each_other():
    loader = DataLoader(Numbers(), 5, num_workers=2)
    pairs = [(a.tolist(), b.tolist()) for a, b in zip(loader, loader, strict=True)]
    assert all(a == b for a, b in pairs)
    assert len(pairs) == len(loader) == len(iter(loader)) == 5


class InProcess(Numbers):
    """Its samples say in which process they were made."""

    def __getitem__(self, index):
        import os

        return os.getpid()


def test_multiprocessing_context_gives_worker_processes():
    import os

    loader = DataLoader(InProcess(4), 2, num_workers=2, multiprocessing_context="fork")
    pids = {pid for batch in loader for pid in batch.tolist()}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert "2 worker processes (fork)" in loader.explain()
    shared = [
        [batch.tolist() for batch in DataLoader(Numbers(7), 2, shuffle=True, num_workers=1, distributed=(rank, 2), multiprocessing_context="fork")]
        for rank in range(2)
    ]  # fmt: skip
    assert sorted(itertools.chain(*itertools.chain(*shared))) == list(range(7))


# --- subclasses ---


def test_a_subclass_with_its_own_arguments_works():
    class Halved(DataLoader):
        def __init__(self, dataset, *args, factor: int = 2, **kwargs) -> None:
            self.factor = factor
            super().__init__(dataset, *args, **kwargs)

        def __iter__(self):
            return (batch // self.factor for batch in super().__iter__())

    assert [batch.tolist() for batch in Halved(Numbers(4), 2)] == [[0, 0], [1, 1]]
    assert len(Halved(Numbers(4), 2, num_workers=1)) == 2


# --- shares of an ordinary data set ---


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_rank_without_a_sample_gets_a_batch_without_rows_of_the_same_structure(num_workers):
    samples = [{"x": torch.full((2, 3), i), "name": str(i), "deep": (i, [float(i)])} for i in range(5)]
    ranks = [list(DataLoader(Of(samples), 2, num_workers=num_workers, distributed=(rank, 2))) for rank in range(2)]
    empty = ranks[1][1]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert (empty["x"].shape, empty["name"], empty["deep"][0].shape) == ((0, 2, 3), [], (0,))


def test_an_order_of_our_own_draws_nothing_from_torchs_generator():
    before = torch.get_rng_state()
    for workers in (0, 2):
        list(DataLoader(Numbers(), 4, shuffle=True, num_workers=workers, distributed=(0, 2)))
    assert torch.equal(before, torch.get_rng_state())


def test_distributed_beside_a_distributed_sampler_is_taken_for_the_same():
    sampler = DistributedSampler(Numbers(), num_replicas=2, rank=0)
    assert len(DataLoader(Numbers(), 4, sampler=sampler, distributed=True)) == 3
    with pytest.raises(UsageError, match="leave it out beside sampler"):
        DataLoader(Numbers(), 4, sampler=[1], distributed=(0, 2))


def test_frameworks_see_by_the_sampler_what_the_order_is():
    shared = DataLoader(Numbers(), 4, shuffle=True, distributed=(1, 2), seed=3)
    assert isinstance(shared.sampler, DistributedSampler)
    assert type(shared.batch_sampler) is BatchSampler
    assert len(shared.sampler) == len(list(shared.sampler)) == 11
    ids = list(shared.sampler)
    assert [index for batch in shared for index in batch.tolist()] == ids
    shared.sampler.set_epoch(5)
    assert shared.state_dict()["epoch"] == 5
    again = DataLoader(Numbers(), 6, sampler=shared.sampler)
    again.set_epoch(0)
    assert sorted(index for batch in again for index in batch.tolist()) != sorted(ids)
    assert "rank 1 of 2 by the caller, global batch 12" in again.explain()


# --- state: everything delivered once, wherever the run stopped ---


def resumed_rest(make_loader, stop: int) -> list:
    """Deliver `stop` batches of the second epoch, go on in a new loader: (delivered before, after, and the epoch after)."""
    torch.manual_seed(7)
    loader = make_loader()
    list(loader)
    batches = iter(loader)
    before = [plain(next(batches)) for _ in range(stop)]
    state = loader.state_dict()
    if hasattr(batches, "close"):
        batches.close()
    torch.manual_seed(99)  # another process
    resumed = make_loader()
    resumed.load_state_dict(state)
    return [*before, *(plain(batch) for batch in resumed)]


def second_epoch(make_loader) -> list:
    torch.manual_seed(7)
    loader = make_loader()
    list(loader)
    return [plain(batch) for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 6])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"shuffle": True},
        {"shuffle": True, "generator": lambda: torch.Generator().manual_seed(3)},
        {"sampler": lambda: RandomSampler(range(SAMPLES), replacement=True, num_samples=40)},
        {"sampler": lambda: SubsetRandomSampler(range(3, 22))},
        {"sampler": lambda: WeightedRandomSampler([1.0] * SAMPLES, 40)},
        {"sampler": list(range(22, -1, -1))},
        {"sampler": lambda: DistributedSampler(range(SAMPLES), num_replicas=1, rank=0, seed=4)},
        {"batch_size": None, "shuffle": True},
    ],
)
def test_a_resumed_epoch_is_the_epoch(arguments, stop, num_workers):
    def make_loader():
        made = {name: value() if callable(value) else value for name, value in arguments.items()}
        return DataLoader(Numbers(), **{"batch_size": 3, "num_workers": num_workers, **made})

    draws = {"generator", "sampler", "shuffle"} & arguments.keys() in ({"shuffle"}, {"sampler"})
    if stop == num_workers == 0 and draws and (arguments.get("shuffle") or callable(arguments["sampler"])):
        pytest.skip("without workers the sampler has not drawn yet: the next epoch is the caller's seed's, as in torch")
    whole = second_epoch(make_loader)
    assert len(whole) > 6
    assert resumed_rest(make_loader, stop) == whole


class Counting:
    """A sampler that can say where it is."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.length, self.next = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        while self.next < self.length:
            self.next += 1
            yield self.length - self.next
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Mystery:
    def __iter__(self):
        return iter(np.random.permutation(SAMPLES).tolist())

    def __len__(self):
        return SAMPLES


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_sampler_with_state_is_asked_for_it(num_workers):
    def make_loader():
        return DataLoader(Numbers(), 4, sampler=Counting(), num_workers=num_workers)

    assert resumed_rest(make_loader, 3) == second_epoch(make_loader)


def test_a_sampler_that_cannot_say_where_it_is_is_refused_by_name_in_the_middle_of_an_epoch_only():
    loader = DataLoader(Numbers(), 4, sampler=Mystery())
    DataLoader(Numbers(), 4, sampler=Mystery()).load_state_dict(loader.state_dict())
    next(iter(loader))
    with pytest.raises(UsageError, match="a Mystery does not say where it is"):
        DataLoader(Numbers(), 4, sampler=Mystery()).load_state_dict(loader.state_dict())


def test_batches_out_of_order_are_no_place_to_go_on_from():
    loader = DataLoader(Numbers(), 4, num_workers=2, in_order=False)
    batches = iter(loader)
    next(batches)
    with pytest.raises(UsageError, match="in_order=False"):
        loader.load_state_dict(loader.state_dict())
    batches.close()


def test_a_state_of_another_data_set_is_refused():
    loader = DataLoader(Numbers(), 4)
    with pytest.raises(UsageError, match="it is of 23 samples, the data set has 5"):
        DataLoader(Numbers(5), 4).load_state_dict(loader.state_dict())
    with pytest.raises(UsageError, match="was written over a map-style data set"):
        DataLoader(Stream(), 4).load_state_dict(loader.state_dict())


class StatefulStream(Stream):
    next = 0

    def __iter__(self):
        while self.next < self.length:
            self.next += 1
            yield self.next - 1
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def test_an_iterable_data_set_goes_on_where_it_says_it_is():
    assert resumed_rest(lambda: DataLoader(StatefulStream(20), 3), 4) == second_epoch(
        lambda: DataLoader(StatefulStream(20), 3)
    )
    loader = DataLoader(Stream(), 2)
    next(iter(loader))
    with pytest.raises(UsageError, match="a Stream does not say where it is"):
        DataLoader(Stream(), 2).load_state_dict(loader.state_dict())


def test_a_state_can_be_saved_and_loaded_with_torch(tmp_path):
    loader = DataLoader(Numbers(), 4, shuffle=True)
    batches = iter(loader)
    next(batches)
    torch.save(loader.state_dict(), tmp_path / "state")
    rest = [plain(batch) for batch in batches]
    loader = DataLoader(Numbers(), 4, shuffle=True)
    loader.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert [plain(batch) for batch in loader] == rest


def test_a_state_goes_on_with_another_number_of_workers():
    for before, after in ((0, 3), (3, 0)):
        torch.manual_seed(3)
        loader = DataLoader(Numbers(), 3, shuffle=True, num_workers=before)
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
        rest = [plain(batch) for batch in batches]
        loader = DataLoader(Numbers(), 3, shuffle=True, num_workers=after)
        loader.load_state_dict(state)
        assert [plain(batch) for batch in loader] == rest


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sampler", [None, Counting, lambda: list(range(22, -1, -1)), "own order"])
def test_a_state_without_generators_is_json(sampler, num_workers):
    def make_loader() -> DataLoader:
        if sampler == "own order":
            return DataLoader(Numbers(), 4, shuffle=True, num_workers=num_workers, distributed=(0, 1))
        return DataLoader(Numbers(), 4, sampler=sampler and sampler(), num_workers=num_workers)

    for stop in (0, 2):
        loader = make_loader()
        batches = iter(loader)
        for _ in range(stop):
            next(batches)
        state = json.dumps(loader.state_dict())
        rest = [plain(batch) for batch in batches]
        loader = make_loader()
        loader.load_state_dict(json.loads(state))
        assert json.dumps(loader.state_dict()) == state
        assert [plain(batch) for batch in loader] == rest


@pytest.mark.parametrize(("num_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_states_are_loaded_back_and_forth_into_the_same_loader(num_workers, persistent):
    loader = DataLoader(Numbers(), 3, shuffle=True, num_workers=num_workers, persistent_workers=persistent)
    batches = iter(loader)
    whole = [plain(next(batches))]
    states = [loader.state_dict()]
    whole += [plain(next(batches)) for _ in range(3)]
    states.append(loader.state_dict())
    loader.load_state_dict(states[1])
    whole += [plain(batch) for batch in loader]
    assert len(set(map(str, whole))) == len(whole) == len(loader)
    loader.load_state_dict(states[0])
    assert [plain(batch) for batch in loader] == whole[1:]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_state_after_the_end_begins_the_next_epoch(shuffle, batch_size, num_workers):
    def make_loader() -> DataLoader:
        generator = torch.Generator().manual_seed(15)
        return DataLoader(Numbers(), batch_size, shuffle, num_workers=num_workers, generator=generator)

    loader = make_loader()
    first = [plain(batch) for batch in loader]
    state = loader.state_dict()
    second = [plain(batch) for batch in loader]
    assert (first == second) != shuffle
    loader = make_loader()
    next(iter(loader))  # what was begun is given up
    loader.load_state_dict(state)
    assert [plain(batch) for batch in loader] == second


class Drawing(Numbers):
    """Each sample is drawn from a generator of the data set's own, which says where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def __getitem__(self, index: int) -> int:
        return int(torch.randint(1000, (), generator=self.generator))

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def test_a_data_set_with_state_goes_on_where_it_was_or_is_refused_by_name():
    loader = DataLoader(Drawing(), 4)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    rest = [plain(batch) for batch in batches]
    loader = DataLoader(Drawing(), 4)
    loader.load_state_dict(state)
    assert [plain(batch) for batch in loader] == rest
    ahead = DataLoader(Drawing(), 4, num_workers=2)
    next(iter(ahead))
    with pytest.raises(UsageError, match="state of a Drawing is that of samples loaded ahead"):
        loader.load_state_dict(ahead.state_dict())


def test_delivered_counts_what_the_caller_got_however_far_threads_are():
    loader = DataLoader(Numbers(100), 2, num_workers=3, prefetch_factor=4)
    for number, _ in enumerate(loader, start=1):
        assert loader.state_dict()["batches_delivered"] == number
        if number == 5:
            break
    assert loader.state_dict()["batches_delivered"] == 5


def test_stats_count_batches_on_every_path():
    for loader in (DataLoader(Numbers(), 4), DataLoader(Numbers(), 4, num_workers=2), DataLoader(Stream(), 4)):
        batches = list(loader)
        assert loader.stats().batches == len(batches)
    waits = DataLoader(Asking(20), 1, num_workers=1)
    list(waits)
    assert 20 * 0.002 <= waits.stats().read_s <= 5
    assert waits.stats().read_wait_s > 0
    slow = iter(loader := DataLoader(Numbers(20), 1, num_workers=2, prefetch_factor=3))
    for _ in slow:
        time.sleep(0.005)
    assert loader.stats().ready_batches / 20 > 2


def test_no_warning_for_more_threads_than_cores():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(DataLoader(TensorDataset(torch.arange(4)), num_workers=64))


@settings(max_examples=60)
@given(
    samples=st.integers(0, 1000),
    before=st.tuples(st.integers(1, 70), st.integers(1, 8)),
    after=st.tuples(st.integers(1, 70), st.integers(1, 8)),
    steps=st.integers(0, 8),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_a_divided_epoch_goes_on_at_any_world_and_has_every_sample_once(
    samples, before, after, steps, shuffle, drop_last
):
    def load(batch_size, world_size, state=None, steps=None):
        loaded, states, lengths = [], [], set()
        for rank in range(world_size):
            loader = DataLoader(
                Numbers(samples), batch_size, shuffle, drop_last=drop_last, distributed=(rank, world_size), seed=samples
            )
            if state is not None:
                loader.load_state_dict(state)
            batches = iter(loader)
            own = [next(batches) for _ in range(min(steps, len(loader)))] if steps is not None else list(batches)
            loaded += [number for batch in own for number in batch.tolist()]
            lengths.add(len(own))
            states.append(loader.state_dict())
        assert len(lengths) == 1
        assert all(each == states[0] for each in states)
        return loaded, states[0]

    first, state = load(*before, steps=steps)
    rest, _ = load(*after, state=state)
    dropped = (samples - len(first)) % (after[0] * after[1]) if drop_last else 0
    assert len(set(first + rest)) == len(first + rest) == samples - dropped
    assert set(first + rest) <= set(range(samples))
