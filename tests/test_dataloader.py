"""The loader as a whole, over real data sets: order, worlds, resume, errors, threads, and torch's arguments."""

import contextlib
import inspect
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data
from mpi import run_ranks

from stagein.formats import Dataset, convert, scan_imagefolder
from stagein.formats.errors import ChecksumError, SourceError, StageinError, UsageError
from stagein.loaders import DataLoader, PerSample, RecordDataset, image_train

pytest.importorskip("nvidia.dali")
SAMPLES = 85


@pytest.fixture(scope="module")
def numbered(jpeg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RecordDataset:
    """One class folder a picture, so that the label of a sample is its number."""
    root = tmp_path_factory.mktemp("numbered")
    for number, image in enumerate(sorted(jpeg_folder.rglob("*.jpg"))):
        (root / "images" / f"{number:03d}").mkdir(parents=True)
        shutil.copy(image, root / "images" / f"{number:03d}")
    convert(scan_imagefolder(root / "images"), root / "numbered.st", shard_bytes=64 << 10, chunk_bytes=16 << 10)
    return RecordDataset(root / "numbered.st", staged=None)


def make_loader(dataset: torch.utils.data.Dataset, batch_size: int | None = 8, **arguments) -> DataLoader:
    return DataLoader(
        dataset, batch_size, **{"transform": image_train(16), "device": "cpu", "shuffle": True, **arguments}
    )


def labels(batches) -> list[list[int]]:
    return [batch["label"].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [label for batch in batches for label in batch]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Reader threads and DALI's: nothing runs on after a test."""
    yield
    deadline = time.monotonic() + 5
    while _loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)  # the kernel takes a moment to bury a thread
    assert _loader_threads() == []


def _loader_threads() -> list[str]:
    """Names of our threads, and of DALI's as the kernel knows them."""
    names = [thread.name for thread in threading.enumerate()]
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.append((task / "comm").read_text())
    return [name for name in names if "DALI" in name or name.startswith("stagein")]


# --- what a batch is, and the order ---


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_an_epoch_has_every_sample_once_in_batches_of_tensors(numbered, num_workers):
    loader = make_loader(numbered, num_workers=num_workers)
    batches = list(loader)
    assert len(batches) == len(loader) == 11
    assert sorted(batches[0]) == ["image", "label"]
    assert (batches[0]["image"].shape, batches[0]["image"].dtype) == ((8, 3, 16, 16), torch.float32)
    assert (batches[0]["label"].shape, batches[0]["label"].dtype) == ((8,), torch.int64)
    assert batches[-1]["image"].shape == (5, 3, 16, 16)
    assert sorted(flat(labels(batches))) == list(range(SAMPLES))


def test_batches_do_not_depend_on_reader_threads(numbered):
    runs = [list(make_loader(numbered, num_workers=num_workers)) for num_workers in (0, 3)]
    for here, ahead in zip(*runs, strict=True):
        assert torch.equal(here["image"], ahead["image"])
        assert torch.equal(here["label"], ahead["label"])


def test_batches_keep_their_pixels_while_later_ones_are_made(numbered):
    loader = make_loader(numbered)
    kept = [(batch, batch["image"].clone()) for batch in loader]
    for batch, copy in kept:
        assert torch.equal(batch["image"], copy)


def test_each_epoch_has_another_order_and_other_windows(numbered):
    loader = make_loader(numbered, batch_size=SAMPLES)
    (first,), (second,) = list(loader), list(loader)
    assert first["label"].tolist() != second["label"].tolist()
    assert not torch.equal(first["image"][first["label"].argsort()], second["image"][second["label"].argsort()])
    loader.set_epoch(0)
    (again,) = list(loader)
    assert torch.equal(again["image"], first["image"])


@pytest.mark.parametrize("tail", ["share", "pad"])
def test_worlds_of_one_two_and_four_give_the_same_global_batches_and_pixels(numbered, tail):
    def global_batches(world_size: int) -> list[dict[int, bytes]]:
        ranks = [
            list(make_loader(numbered, 8 // world_size, distributed=(rank, world_size), tail=tail, seed=3))
            for rank in range(world_size)
        ]
        return [rows_by_label(step) for step in zip(*ranks, strict=True)]

    alone = global_batches(1)
    assert [len(batch) for batch in alone] == [8] * 10 + [5]
    assert global_batches(2) == alone
    assert global_batches(4) == alone


def rows_by_label(batches) -> dict[int, bytes]:
    """The pixels of each valid row of several ranks' batches, by label."""
    rows = {}
    for batch in batches:
        valid = batch.get("valid", torch.ones(len(batch["label"]), dtype=torch.bool))
        for label, image in zip(batch["label"][valid].tolist(), batch["image"][valid], strict=True):
            assert label not in rows
            rows[label] = image.numpy().tobytes()
    return rows


def test_a_rank_without_samples_gets_an_empty_batch_of_the_right_shape(numbered):
    last = [list(make_loader(numbered, 2, distributed=(rank, 6)))[-1] for rank in range(6)]  # 85 = 7 x 12 + 1
    assert [len(batch["label"]) for batch in last] == [1, 0, 0, 0, 0, 0]
    assert last[5]["image"].shape == (0, 3, 16, 16)


def test_pad_masks_the_rows_that_do_not_count(numbered):
    loader = make_loader(numbered, tail="pad", shuffle=False)
    batches = list(loader)
    assert all(len(batch["image"]) == 8 and batch["valid"].dtype == torch.bool for batch in batches)
    assert batches[-1]["valid"].tolist() == [True] * 5 + [False] * 3
    assert batches[-1]["label"].tolist() == [80, 81, 82, 83, 84, 0, 1, 2]


def test_drop_last_drops_the_tail_on_every_rank(numbered):
    ranks = [list(make_loader(numbered, 4, distributed=(rank, 3), drop_last=True)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [7, 7, 7]
    assert len({label for batches in ranks for label in flat(labels(batches))}) == 84


# --- state ---


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (4, 1), (1, 4), (1, 3)])
def test_a_resume_at_another_world_neither_repeats_nor_loses_nor_changes_a_sample(numbered, before, after):
    whole = rows_by_label(make_loader(numbered, 5, seed=9))
    first, states = [], []
    for rank in range(before):
        loader = make_loader(numbered, 5, distributed=(rank, before), seed=9, num_workers=2)
        batches = iter(loader)
        first += [next(batches) for _ in range(3)]
        states.append(loader.state_dict())
        batches.close()
    assert all(state == states[0] for state in states)
    rest = []
    for rank in range(after):
        loader = make_loader(numbered, 5, distributed=(rank, after), seed=9)
        loader.load_state_dict(states[0])
        rest += list(loader)
    assert rows_by_label(first + rest) == whole


def test_state_at_each_moment_of_an_epoch(numbered):
    loader = make_loader(numbered, 40)

    def state() -> tuple[int, int]:
        return loader.state_dict()["epoch"], loader.state_dict()["samples_delivered"]

    assert state() == (0, 0)
    during = [state() for _ in loader]
    assert during == [(0, 40), (0, 80), (0, 85)]
    assert state() == (1, 0)
    for _ in loader:
        break
    assert state() == (1, 40)  # given up: what was delivered counts until something new begins
    assert next(iter(loader)) is not None
    assert state() == (2, 40)


def test_a_state_after_the_last_batch_finishes_its_epoch_and_goes_on_with_the_next(numbered):
    loader = make_loader(numbered, 85)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    resumed = make_loader(numbered, 85)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    assert resumed.state_dict()["epoch"] == 1
    batches.close()


def test_set_epoch_keeps_a_loaded_position_of_the_same_epoch_only(numbered):
    loader = make_loader(numbered, 40)
    state = {**loader.state_dict(), "epoch": 4, "samples_delivered": 80}
    loader.load_state_dict(state)
    loader.set_epoch(4)
    assert [len(batch) for batch in labels(loader)] == [5]
    loader.load_state_dict(state)
    loader.set_epoch(5)
    assert [len(batch) for batch in labels(loader)] == [40, 40, 5]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"shuffle": False}])
def test_a_state_of_other_settings_is_refused_by_name(numbered, changed):
    state = make_loader(numbered).state_dict()
    with pytest.raises(UsageError, match=f"its {next(iter(changed))} is "):
        make_loader(numbered, **changed).load_state_dict(state)


def test_an_older_iterator_does_not_disturb_the_state_of_a_newer_one(numbered):
    loader = make_loader(numbered, 40)
    older, newer = iter(loader), iter(loader)
    next(newer)
    assert len(list(older)) == 3
    assert (loader.state_dict()["epoch"], loader.state_dict()["samples_delivered"]) == (1, 40)
    assert len(list(newer)) == 2


# --- samplers of the user ---


def test_a_sampler_of_the_user_is_honoured(numbered):
    chosen = [7, 3, 3, 80, 1]
    assert labels(make_loader(numbered, 2, shuffle=None, sampler=chosen)) == [[7, 3], [3, 80], [1]]
    assert labels(make_loader(numbered, 2, shuffle=None, sampler=chosen, drop_last=True)) == [[7, 3], [3, 80]]


def test_a_batch_sampler_with_growing_batches_is_honoured(numbered):
    batches = [[1], [2, 3, 4], [5], [6, 7, 8, 9, 10], [11, 12]]
    loader = make_loader(numbered, 1, shuffle=None, batch_sampler=batches, num_workers=2)
    assert labels(loader) == batches
    assert len(loader) == 5
    batches_of_rest = iter(loader)
    next(batches_of_rest), next(batches_of_rest)
    resumed = make_loader(numbered, 1, shuffle=None, batch_sampler=batches)
    resumed.load_state_dict(loader.state_dict())
    assert labels(resumed) == batches[2:]


def test_set_epoch_reaches_a_distributed_sampler(numbered):
    sampler = torch.utils.data.DistributedSampler(numbered, num_replicas=2, rank=1)
    loader = make_loader(numbered, 8, shuffle=None, sampler=sampler)
    loader.set_epoch(3)
    assert sampler.epoch == 3
    assert flat(labels(loader)) == list(sampler)


# --- errors ---


@pytest.fixture
def private_copy(jpeg_dataset_path: Path, tmp_path: Path) -> Path:
    """The data set in a folder of this test's own, to be damaged."""
    copy = tmp_path / "copy.st"
    shutil.copytree(jpeg_dataset_path, copy, symlinks=True)
    return copy


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_bit_is_reported_with_epoch_batch_shard_and_record_after_the_good_batches(private_copy, num_workers):
    dataset = Dataset(private_copy)
    shard = private_copy / dataset.manifest.shards[int(dataset.index.shard[41])].file
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.seek(int(dataset.index.offset[41]) + 100)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    loader = make_loader(RecordDataset(private_copy, staged=None), shuffle=False, num_workers=num_workers)
    loader.set_epoch(2)
    delivered = []
    with pytest.raises(ChecksumError, match=rf"epoch 2, batch 5: record 41 in .*{shard.name} is damaged"):
        for batch in loader:
            delivered.append(batch)
    assert len(delivered) == 5


def test_an_image_that_cannot_be_decoded_is_named(jpeg_folder, tmp_path):
    shutil.copytree(jpeg_folder, tmp_path / "images")
    victim = sorted((tmp_path / "images").rglob("*.jpg"))[20]
    content = bytearray(victim.read_bytes())
    frame = content.index(b"\xff\xc0")
    content[frame + 9] = 17  # components of the image: header and end still look whole
    victim.write_bytes(content)
    convert(scan_imagefolder(tmp_path / "images"), tmp_path / "images.st")
    loader = make_loader(RecordDataset(tmp_path / "images.st", staged=None), shuffle=False, num_workers=1)
    with pytest.raises(SourceError, match=r"^epoch 0, batch 2: record 20 in .*00000\.\w+ cannot be decoded: [^\n]+$"):
        list(loader)


class SlowRecords(Dataset):
    """A file system that stopped answering."""

    gate: threading.Event

    def locate(self, records):
        self.gate.wait(20)
        return super().locate(records)

    def read_packed(self, *arguments, **named):
        self.gate.wait(20)
        return super().read_packed(*arguments, **named)


def test_timeout_names_the_batch_that_was_not_read(jpeg_dataset_path):
    dataset = RecordDataset(jpeg_dataset_path, staged=None)
    dataset.records = SlowRecords(jpeg_dataset_path)
    dataset.records.gate = threading.Event()
    started = time.monotonic()
    with pytest.raises(StageinError, match=r"epoch 0, batch 0: not read within 0\.2 s \(it starts with record \d+ in "):
        list(make_loader(dataset, num_workers=2, timeout=0.2))
    assert time.monotonic() - started < 15
    dataset.records.gate.set()


def test_an_error_of_the_users_sampler_reaches_the_caller(numbered):
    def failing():
        yield from range(16)
        raise LookupError("no more samples")

    loader = make_loader(numbered, 8, shuffle=None, sampler=failing(), num_workers=2)
    with pytest.raises(LookupError, match="no more samples"):
        list(loader)


# --- nothing is left running (see also the autouse fixture) ---


def test_break_exception_and_dropping_end_all_threads(numbered):
    for batch in make_loader(numbered, 4, num_workers=3, prefetch_factor=4):
        assert batch
        break
    with pytest.raises(ZeroDivisionError):
        for _ in make_loader(numbered, 4, num_workers=3):
            raise ZeroDivisionError
    batches = iter(make_loader(numbered, 4, num_workers=3))
    next(batches)
    del batches


def test_persistent_workers_keep_the_pipeline_and_change_nothing(numbered):
    kept, fresh = (
        [labels(loader) for _ in range(2)]
        for loader in (
            make_loader(numbered, num_workers=1, persistent_workers=persistent) for persistent in (True, False)
        )
    )
    assert kept == fresh


def test_the_interpreter_exits_at_once_in_the_middle_of_an_epoch(numbered):
    program = (
        "from stagein.loaders import DataLoader, RecordDataset, image_train\n"
        f"loader = DataLoader(RecordDataset({str(numbered.records.path)!r}), 4, num_workers=2, transform=image_train(16), device='cpu')\n"
        "batches = iter(loader); next(batches); print('left')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


BEGUN = """
import os, sys, time
from stagein.loaders import DataLoader, RecordDataset, image_train
if sys.argv[1] == "threads":
    loader = DataLoader(list(range(100)), 4, num_workers=2)
else:
    loader = DataLoader(RecordDataset(sys.argv[2], staged=None), 4, num_workers=2, transform=image_train(16), device="cpu")
batches = iter(loader)
next(batches)
"""
FORKED = """
child = os.fork()
if child == 0:
    del batches, loader
    sys.exit(0)
deadline = time.monotonic() + 20
while not os.waitpid(child, os.WNOHANG)[0]:
    assert time.monotonic() < deadline, os.kill(child, 9)
    time.sleep(0.01)
print(len(list(batches)))
"""


@pytest.mark.parametrize(
    "child_does", ["del batches, loader", "assert len(list(loader)) == len(loader)"], ids=["ends", "loads"]
)
@pytest.mark.parametrize("kind", ["threads", "graph"])
def test_a_forked_process_ends_and_its_parent_goes_on(numbered, kind, child_does):
    program = BEGUN + FORKED.replace("del batches, loader", child_does)
    command = [sys.executable, "-c", program, kind, numbered.records.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    rest = 24 if kind == "threads" else -(-SAMPLES // 4) - 1
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{rest}\n", "")


def test_the_interpreter_exits_with_threads_in_the_users_code():
    program = (
        "import time\nfrom stagein.loaders import DataLoader\n"
        "class Slow(list):\n"
        "    def __getitem__(self, index):\n"
        "        if index > 3: time.sleep(60)\n"
        "        return index\n"
        "batches = iter(DataLoader(Slow(range(100)), 4, num_workers=2)); next(batches); print('left')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


# --- arguments ---


def test_torchs_arguments_stand_in_torchs_order():
    ours = list(inspect.signature(DataLoader.__init__).parameters.values())
    for theirs in inspect.signature(torch.utils.data.DataLoader.__init__).parameters.values():
        mine = next(parameter for parameter in ours if parameter.name == theirs.name)
        assert (mine.kind, mine.default) == (theirs.kind, theirs.default)
        if theirs.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert ours.index(mine) == list(inspect.signature(torch.utils.data.DataLoader.__init__).parameters).index(
                theirs.name
            )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"multiprocessing_context": "spawn", "num_workers": 1},
            "multiprocessing_context= is not honoured beside a graph",
        ),
        ({"generator": torch.Generator(), "distributed": (0, 2)}, "generator= cannot order samples that ranks divide"),
        ({"timeout": 3}, "timeout= limits the wait for workers"),
        ({"tail": "wrap"}, "tail='wrap' is not known"),
        ({"tail": "pad", "drop_last": True}, "leave one of them out"),
        ({"tail": "pad", "sampler": [1], "shuffle": None}, "tail='pad' fills up batches of the loader's own order"),
        ({"distributed": (2, 2)}, "is not \\(rank, world size\\)"),
        ({"distributed": True, "sampler": [1], "shuffle": None}, "leave it out beside sampler"),
        ({"transform": None, "decode_threads": 2}, "decode_threads= needs a graph"),
        ({"device": "meta"}, "device='meta' is not supported"),
        ({"decode_threads": 0}, "decode_threads=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "7"}, "seed='7' is not a seed"),
        ({"device": "cuda:99"}, "device='cuda:99' is not there: torch sees . CUDA devices"),
        ({"decode_threads": "2"}, "decode_threads='2'"),
        ({"on_error": "replace", "error_budget": "3"}, "error_budget='3'"),
        ({"prefetch_to_device": -1}, "prefetch_to_device=-1"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(numbered, arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        make_loader(numbered, **arguments)


@pytest.mark.parametrize(
    "change", [{"samples_delivered": 999}, {"samples_delivered": -5}, {"epoch": -1}, {"epoch": "1"}]
)
def test_a_state_that_says_what_cannot_be_is_refused(numbered, change):
    loader = make_loader(numbered)
    with pytest.raises(UsageError, match="cannot go on from this state: it says"):
        loader.load_state_dict({**loader.state_dict(), **change})
    with pytest.raises(UsageError, match=r"cannot go on from None: give what state_dict\(\) returned"):
        loader.load_state_dict(None)
    with pytest.raises(UsageError, match="epoch -1 is none"):
        loader.set_epoch(-1)


@pytest.mark.parametrize(
    "transform", [image_train(16), PerSample(lambda sample: sample["label"])], ids=["graph", "samples"]
)
def test_records_are_asked_for_by_whole_numbers(numbered, transform):
    for sampler in ([1.7], ["one"], [[1, 2]]):
        with pytest.raises(UsageError, match="is asked for whole numbers"):
            list(make_loader(numbered, 1, transform=transform, sampler=sampler, shuffle=None))
    tensors = make_loader(numbered, 2, transform=transform, sampler=torch.tensor([3, 1, 2]), shuffle=None)
    assert len(list(tensors)) == 2


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, True])
def test_a_batch_size_that_is_none_is_a_value_error_as_in_torch(numbered, batch_size):
    with pytest.raises(ValueError, match="batch_size should be a positive integer"):
        make_loader(numbered, batch_size)


def test_torchs_attributes_are_those_that_were_given(numbered):
    loader = make_loader(numbered, 8, drop_last=True, num_workers=2)
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert (loader.batch_size, loader.drop_last, loader.num_workers, loader.dataset) == (8, True, 2, numbered)


def test_stats_count_what_was_delivered(numbered):
    loader = make_loader(numbered, 10, num_workers=1)
    list(loader)
    stats = loader.stats()
    assert (stats.batches, stats.samples) == (9, SAMPLES)
    assert stats.bytes_read == int(numbered.records.index.nbytes.sum())
    assert 0 < stats.read_s < 10
    assert 0 <= stats.read_wait_s < 10
    assert 0 < stats.graph_wait_s < 10


def test_explain_says_who_does_what(numbered):
    text = make_loader(numbered, 10, num_workers=3, distributed=(1, 2), decode_threads=2).explain()
    assert "rank 1 of 2 by the caller, global batch 20, tail: share" in text
    assert "3 reader threads, images decoded and resized by 2 threads, batches on cpu" in text
    assert "there is no staged copy; its file system is local" in text
    assert "device: batches are delivered on the CPU" in text
    assert "device: batches are left where the data set has them" in DataLoader([1, 2]).explain()
    assert "order: by SequentialSampler" in DataLoader([1, 2]).explain()
    assert "sample by sample, by the caller" in DataLoader([1, 2]).explain()


# --- worlds ---


def test_several_ranks_without_a_word_about_them_are_refused(numbered, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "job", "RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UsageError,
        match=r"^this is rank 1 of 4 by torchrun, and every rank would load all samples: [^\n]*distributed=True",
    ):
        iter(make_loader(numbered))
    assert len(make_loader(numbered, distributed=False)) == 11
    assert len(make_loader(numbered, distributed=True)) == 3
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="this is rank 2 of 3 by Slurm"):
        iter(make_loader(numbered))
    assert "rank 2 of 3 by Slurm" in make_loader(numbered, distributed=True).explain()
    assert len(make_loader(numbered, sampler=range(16), shuffle=None)) == 2


@pytest.mark.mpi
def test_ranks_of_mpi_divide_the_samples(numbered):
    program = (
        "from stagein.loaders import DataLoader, RecordDataset, image_eval\n"
        f"dataset = RecordDataset({str(numbered.records.path)!r}, staged=None)\n"
        "loader = DataLoader(dataset, 8, shuffle=True, transform=image_eval(16, resize=16), device='cpu', distributed=True)\n"
        "print('labels', *(label for batch in loader for label in batch['label'].tolist()))\n"
    )
    done = run_ranks(2, sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("labels")]
    assert sorted(len(line) for line in lines) == [42, 43]
    assert sorted(int(label) for line in lines for label in line) == list(range(SAMPLES))


# --- other data sets: see also test_dataloader_compat.py ---


class Squares(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index * index


def test_any_other_data_set_gives_torchs_batches():
    assert [batch.tolist() for batch in DataLoader(Squares(), 4)] == [[0, 1, 4, 9], [16, 25, 36, 49], [64, 81]]
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    ours, theirs = (
        [batch.tolist() for batch in kind(Squares(), 4, shuffle=True, generator=generator)]
        for kind, generator in zip((DataLoader, torch.utils.data.DataLoader), generators, strict=True)
    )
    assert ours == theirs
    with pytest.raises(UsageError, match="needs a RecordDataset, not a Squares"):
        DataLoader(Squares(), 4, transform=image_train(16))
    with pytest.raises(UsageError, match="tail='pad' needs a RecordDataset"):
        DataLoader(Squares(), 4, tail="pad", distributed=(0, 2))


def test_any_map_style_data_set_is_divided_among_ranks():
    ranks = [[batch.tolist() for batch in DataLoader(Squares(), 2, distributed=(rank, 2))] for rank in range(2)]
    assert ranks == [[[0, 1], [16, 25], [64]], [[4, 9], [36, 49], [81]]]


def test_iterable_data_sets_are_not_divided():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    assert [batch.tolist() for batch in DataLoader(Stream(), 2)] == [[0, 1], [2]]
    with pytest.raises(UsageError, match="cannot divide an IterableDataset"):
        DataLoader(Stream(), 2, distributed=(0, 2))


def test_without_a_transform_torch_collates_decoded_samples_in_our_order(numbered):
    batches = list(DataLoader(numbered, 8, shuffle=True, seed=4))
    assert batches[0]["image"].shape == (8, 48, 72, 3)
    assert labels(batches) == labels(make_loader(numbered, seed=4))
    loader = DataLoader(numbered, 8, shuffle=True, seed=4)
    next(iter(loader))
    assert loader.state_dict()["samples_delivered"] == 8


# --- the data set ---


def test_a_sample_is_decoded_and_named(jpeg_dataset_path):
    dataset = RecordDataset(jpeg_dataset_path, staged=None)
    assert len(dataset) == SAMPLES
    assert dataset.classes == ["checker", "circle", "columns", "diagonal", "rings"]
    sample = dataset[-1]
    assert list(sample) == ["image", "label", "hw"]
    assert (sample["image"].shape, sample["image"].dtype) == ((48, 72, 3), np.uint8)
    assert (int(sample["label"]), sample["hw"].tolist()) == (4, [48, 72])
    with pytest.raises(IndexError):
        dataset[SAMPLES]


def test_fields_are_chosen_by_name(jpeg_dataset_path):
    dataset = RecordDataset(jpeg_dataset_path, fields=["image"], staged=None)
    assert list(dataset[0]) == ["image"]
    assert sorted(next(iter(make_loader(dataset)))) == ["image"]
    with pytest.raises(UsageError, match="has no field 'depth': it has image, label, hw"):
        RecordDataset(jpeg_dataset_path, fields=["depth"], staged=None)


def test_what_is_no_sample_and_no_list_of_fields_is_told(jpeg_dataset_path):
    records = RecordDataset(jpeg_dataset_path)
    for index in (85, -86):
        with pytest.raises(IndexError, match=rf"there is no sample {index}: .* has 85"):
            records[index]
    with pytest.raises(TypeError, match=r"by __getitems__; its \.records take slices"):
        records[:2]
    with pytest.raises(UsageError, match=r"fields='image' is one name: write a list of them, \['image'\]"):
        RecordDataset(jpeg_dataset_path, "image")
    with pytest.raises(UsageError, match="names 'label' twice: name each field once"):
        RecordDataset(jpeg_dataset_path, ["label", "image", "label"], as_tuples=True)


def test_a_data_set_is_picklable_and_works_in_torchs_worker_processes(numbered):
    assert pickle.loads(pickle.dumps(numbered))[3]["label"] == 3
    batches = torch.utils.data.DataLoader(numbered, 30, num_workers=1, multiprocessing_context="spawn")
    assert flat(labels(batches)) == list(range(SAMPLES))


def test_the_staged_copy_is_read_where_there_is_one(jpeg_dataset_path, private_copy):
    moved = private_copy.parent / "away.st"
    dataset = RecordDataset(private_copy, staged=jpeg_dataset_path)
    private_copy.rename(moved)
    assert len(flat(labels(make_loader(dataset)))) == SAMPLES


def test_without_dali_the_extra_to_install_is_named(jpeg_dataset_path):
    program = (
        "import sys; sys.modules['nvidia.dali'] = None\n"
        "from stagein.loaders import DataLoader, RecordDataset, image_eval\n"
        f"dataset = RecordDataset({str(jpeg_dataset_path)!r}, staged=None)\n"
        "print(next(iter(DataLoader(dataset, 8, transform=image_eval(32, resize=32), device='cpu')))['image'].shape)\n"
        "DataLoader(dataset, 8, transform=lambda nodes: nodes, device='cpu')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "torch.Size([8, 3, 32, 32])\n"
    assert "install `stagein[cuda13]`, or `stagein[cuda12]`" in done.stderr.splitlines()[-1]
