"""The trainer on real ranks: equal ranks, the same curve for any number of them, resuming, and ends before time."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import train_rank
from disks import small_disk
from mpi import run_ranks
from torch import nn
from train_rank import STEPS, Samples, cross_entropy, make_trainer

from stagein.collectives import make_collective
from stagein.formats.errors import ChecksumError, ExitCode, NoSpaceError, SourceError, StageinError, UsageError
from stagein.train import Trainer, build_model
from stagein.train.checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from stagein.train.flat import FlatGradients
from stagein.train.models import MODELS
from stagein.world import Communicator

PROGRAM = Path(__file__).with_name("train_rank.py")


def run_scenario(ranks: int, *arguments: str | Path) -> dict[str, Any]:
    finished = run_ranks(ranks, sys.executable, PROGRAM, *arguments)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def single_curve() -> Mapping[str, Any]:
    return train_rank.train(Communicator(), "single", epochs=4)


# --- the same training, whatever the number of ranks -----------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_stay_equal_and_the_curve_is_that_of_one_process(ranks: int, single_curve: Mapping[str, Any]) -> None:
    for backend, run in run_scenario(ranks, "curves", "mpi", "gloo").items():
        assert len(set(run["fingerprints"])) == 1, f"{backend}: parameters differ between ranks"
        assert run["losses"] == pytest.approx(single_curve["losses"], rel=2e-5), backend
        assert run["validation_loss"] == pytest.approx(single_curve["validation_loss"], rel=2e-5)
        for exact in ("accuracy", "samples", "steps", "images"):
            assert run[exact] == single_curve[exact], (backend, exact)


def test_one_process_learns_and_counts_only_valid_samples(single_curve: Mapping[str, Any]) -> None:
    assert single_curve["losses"][-2] < 0.7 * single_curve["losses"][0]
    assert single_curve["accuracy"] > 0.8
    samples = (STEPS - 1) * train_rank.GLOBAL_BATCH + 5
    valid = samples - samples // 7
    assert single_curve["samples"] == valid
    assert single_curve["images"] == 4 * valid


def test_the_step_is_that_of_plain_torch() -> None:
    """Two batches as one step, against torch's own mean loss, clipping and optimizer."""
    trainer = make_trainer(Communicator(), "single", clip_norm=0.05)
    reference = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 3))
    reference.load_state_dict(trainer.model.state_dict())
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5 / 3, momentum=0.9, weight_decay=1e-3, nesterov=True)
    batches = list(Samples(Communicator().world, mask=False))[:2]
    report = trainer.step(*((batch["image"], batch["label"]) for batch in batches))  # type: ignore[call-overload]
    inputs, labels = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label"))  # type: ignore[call-overload]
    loss = cross_entropy(reference(inputs), labels).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    optimizer.step()
    assert report.loss == pytest.approx(loss.item())
    assert report.lr == pytest.approx(0.5 / 3)
    assert report.samples == 24
    for ours, theirs in zip(trainer.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_that_do_not_count_change_nothing() -> None:
    samples = Samples(Communicator().world, mask=False)
    counting = samples.batch(torch.arange(8))
    padded = {name: torch.cat([part, part]) for name, part in counting.items()}  # type: ignore[union-attr]
    padded["image"][8:] = 100.0
    padded["valid"][8:] = False
    trainers = [make_trainer(Communicator(), "single") for _ in range(2)]
    reports = [trainer.step(batch) for trainer, batch in zip(trainers, (counting, padded), strict=True)]
    assert reports[1].samples == 8
    assert reports[1].loss == pytest.approx(reports[0].loss)
    for ours, theirs in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(ours, theirs)
    validations = [trainers[0].validate([batch]) for batch in (counting, padded)]
    assert trainers[0].model.training, "the model is left in the mode it was in"
    assert (validations[1].accuracy, validations[1].samples) == (validations[0].accuracy, 8)
    assert validations[1].loss == pytest.approx(validations[0].loss)


def trainer_of(model: nn.Module, loss: Any, **options: Any) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    collective = make_collective("single", Communicator())
    return Trainer(model, optimizer, loss, collective=collective, say=lambda _line: None, **options)


def test_the_accuracy_of_masks_is_the_share_of_their_pixels_that_count() -> None:
    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs, labels, reduction="none").flatten(1).mean(dim=1)

    trainer = trainer_of(nn.Conv2d(3, 5, 1), loss)
    images, labels, valid = torch.randn(6, 3, 4, 7), torch.randint(0, 5, (6, 4, 7)), torch.arange(6) < 4
    validation = trainer.validate([(images[:2], labels[:2]), (images[2:], labels[2:], valid[2:])])
    right = trainer.model(images[:4]).argmax(dim=1) == labels[:4]
    assert validation.accuracy == pytest.approx(right.double().mean().item())
    assert validation.samples == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulate": 0}, "accumulate=0 is not a number of anything: it is at least 1"),
        ({"log_every_steps": 0}, "log_every_steps=0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps=0"),
        ({"checkpoint_every_steps": 5}, "needs a checkpoint_folder"),
        ({"precision": "fp16"}, "precision='fp16' is not known: take one of fp32, bf16"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer_of(nn.Linear(8, 3), cross_entropy, **arguments)


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    model, scale = nn.Linear(8, 3), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    with pytest.raises(UsageError, match="1 of the optimizer's parameters are none of the model's"):
        Trainer(model, optimizer, cross_entropy, collective=make_collective("single", Communicator()))


def test_folders_may_be_strings(tmp_path: Path) -> None:
    folders = {"checkpoint_folder": str(tmp_path / "kept"), "run_folder": str(tmp_path / "run")}
    trainer_of(nn.Linear(8, 3), cross_entropy, **folders).fit(
        [(torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64))], 1
    )
    assert find_checkpoints(tmp_path / "kept")
    assert (tmp_path / "run" / "log.jsonl").is_file()


@pytest.mark.parametrize("rows", [4, 5])  # as many rows as outputs is no reason to compare them
def test_a_regression_has_a_loss_and_no_accuracy(rows: int) -> None:
    trainer = trainer_of(nn.Linear(8, 4), lambda outputs, labels: (outputs - labels).square().mean(dim=1))
    batches = [(torch.randn(rows, 8), torch.randn(rows, 4))]
    summary = trainer.fit(batches, 1, validation=batches)
    assert summary.accuracy is None
    assert trainer.validation is not None
    outputs = trainer.model(batches[0][0])
    assert trainer.validation.loss == pytest.approx((outputs - batches[0][1]).square().mean().item())
    assert str(trainer.validation) == f"validation loss {trainer.validation.loss:.4f} of {rows}"
    with pytest.raises(UsageError, match="target_accuracy needs outputs that are scores of classes"):
        trainer.fit(batches, 2, validation=batches, target_accuracy=0.5)
    with pytest.raises(UsageError, match="target_accuracy is reached in validation: give its batches"):
        trainer.fit(batches, 2, target_accuracy=0.5)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"x": torch.zeros(2), "y": torch.zeros(2)},
            r"a batch has x, y, and the trainer takes image and label: .*as_tuples=True",
        ),
        ((torch.zeros(2),), r"a batch is 1 values, and the trainer takes \(image, label\)"),
        (
            (torch.zeros(2, 8), torch.zeros(2, 4), torch.arange(2)),
            r"valid, .* is torch.int64 \[2\]: it says by True and False",
        ),
    ],
    ids=["other names", "no label", "no mask"],
)
def test_a_batch_that_is_none_is_a_sentence(batch: Any, message: str) -> None:
    trainer = trainer_of(nn.Linear(8, 4), lambda outputs, labels: (outputs - labels).square().mean(dim=1))
    with pytest.raises(UsageError, match=message):
        trainer.fit([batch], 1)


def test_a_user_may_drop_gradients_between_steps() -> None:
    trainers = [make_trainer(Communicator(), "single") for _ in range(2)]
    for batch in list(Samples(Communicator().world))[:2]:
        for trainer in trainers:
            trainer.step(batch)
        trainers[0].optimizer.zero_grad(set_to_none=True)
    for ours, theirs in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(ours, theirs)


def test_accumulation_makes_fewer_steps_over_the_same_images() -> None:
    trainer = make_trainer(Communicator(), "single", accumulate=2)
    summary = trainer.fit(Samples(Communicator().world, mask=False), 1)
    assert (summary.steps, summary.images) == (3, 53)


def test_training_ends_with_the_epoch_that_reaches_the_target() -> None:
    trainer = make_trainer(Communicator(), "single")
    samples = Samples(Communicator().world)
    summary = trainer.fit(samples, 50, validation=samples, target_accuracy=0.7)
    assert summary.reached_target
    assert summary.accuracy is not None
    assert summary.accuracy >= 0.7
    assert summary.epochs < 50


def test_bf16_computes_in_bf16_and_keeps_float32_parameters() -> None:
    trainer = make_trainer(Communicator(), "single", precision="bf16")
    seen = []
    trainer.model[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    trainer.step(next(iter(Samples(Communicator().world))))
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_a_resumed_run_has_the_bits_of_a_straight_one(tmp_path: Path) -> None:
    runs = run_scenario(2, "resume", tmp_path)
    assert runs["resumed"]["losses"] == runs["straight"]["losses"][STEPS:]
    for what in ("fingerprints", "steps", "validation_loss"):
        assert runs["resumed"][what] == runs["straight"][what], what


@pytest.mark.mpi
def test_a_signal_saves_in_mid_epoch_and_another_number_of_ranks_goes_on(
    tmp_path: Path, single_curve: Mapping[str, Any]
) -> None:
    finished = run_ranks(2, sys.executable, PROGRAM, "stop", tmp_path)
    assert finished.returncode == ExitCode.INTERRUPTED
    assert f"stopped by SIGTERM after step {STEPS + 3}, epoch 2: saved" in finished.stderr
    resumed = train_rank.train(Communicator(), "single", 4, checkpoint_folder=tmp_path)
    assert resumed["losses"] == pytest.approx(single_curve["losses"][STEPS + 3 :], rel=2e-5)
    assert resumed["validation_loss"] == pytest.approx(single_curve["validation_loss"], rel=2e-5)


@pytest.mark.mpi
def test_a_long_validation_ends_on_all_ranks_at_the_next_batch_when_one_is_signalled_or_fails(
    tmp_path: Path, single_curve: Mapping[str, Any]
) -> None:
    told = run_scenario(2, "validations", tmp_path)
    for sentence, exit_code, _, _ in told["get_signal"]:
        assert f"stopped by SIGUSR1 after step {STEPS}, epoch 1: saved" in sentence
        assert exit_code == ExitCode.INTERRUPTED
    assert all("the disk is gone" in sentence for sentence, *_ in told["lose_the_disk"])
    for on_ranks in told.values():
        assert [fetched for *_, fetched in on_ranks] == [4, 10]
    resumed = train_rank.train(Communicator(), "single", 4, checkpoint_folder=tmp_path / "get_signal")
    assert resumed["losses"] == pytest.approx(single_curve["losses"][STEPS:], rel=2e-5)
    assert resumed["validation_loss"] == pytest.approx(single_curve["validation_loss"], rel=2e-5)


class UnreadableBatches(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise OSError("the disk is gone")


class SelfCounting:
    """Samples that count their epochs themselves, as many loaders do: nobody tells them which comes next."""

    def __init__(self) -> None:
        samples = Samples(Communicator().world)
        self._samples = samples
        self.state_dict, self.load_state_dict = samples.state_dict, samples.load_state_dict

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._samples)


@pytest.mark.parametrize(
    "make_batches",
    [lambda: Samples(Communicator().world), SelfCounting, lambda: list(Samples(Communicator().world))],
    ids=["told the epoch", "counting epochs itself", "a list"],
)
def test_an_epoch_that_was_saved_after_its_last_step_is_not_trained_again(
    tmp_path: Path, make_batches: Callable[[], Any]
) -> None:
    straight, batches = make_trainer(Communicator(), "single"), make_batches()
    for batch in (batch for _ in range(2) for batch in batches):
        straight.step(batch)
    stopped = make_trainer(Communicator(), "single", checkpoint_folder=tmp_path, checkpoint_every_steps=STEPS)
    with pytest.raises(StageinError, match="the disk is gone"):
        stopped.fit(make_batches(), 2, validation=UnreadableBatches())
    resumed = make_trainer(Communicator(), "single", checkpoint_folder=tmp_path)
    assert resumed.fit(make_batches(), 2).steps == 2 * STEPS
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_list_of_batches_resumes_where_it_stopped(tmp_path: Path) -> None:
    batches = list(Samples(Communicator().world))
    straight = make_trainer(Communicator(), "single")
    straight.fit(batches, 2)

    stopped = make_trainer(Communicator(), "single", checkpoint_folder=tmp_path, checkpoint_every_steps=STEPS + 2)
    stopped.fit(batches, 2)
    for end_of_epoch in find_checkpoints(tmp_path)[1:]:
        end_of_epoch.unlink()
    assert [path.name for path in find_checkpoints(tmp_path)] == [f"step-{STEPS + 2:08d}.pt"]
    resumed = make_trainer(Communicator(), "single", checkpoint_folder=tmp_path)
    summary = resumed.fit(batches, 2)
    assert summary.steps == 2 * STEPS
    for ours, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_finished_run_does_not_train_again(tmp_path: Path) -> None:
    samples = Samples(Communicator().world)
    first = make_trainer(Communicator(), "single", checkpoint_folder=tmp_path).fit(samples, 1, validation=samples)
    again = make_trainer(Communicator(), "single", checkpoint_folder=tmp_path).fit(samples, 1, validation=samples)
    assert (again.steps, again.epochs, again.accuracy) == (first.steps, first.epochs, first.accuracy)


def test_a_checkpoint_of_another_model_or_batch_size_is_refused(tmp_path: Path) -> None:
    make_trainer(Communicator(), "single", checkpoint_folder=tmp_path).fit(Samples(Communicator().world), 1)
    with pytest.raises(UsageError, match="5 batches an epoch, this one has 4"):
        make_trainer(Communicator(), "single", checkpoint_folder=tmp_path).fit(
            list(Samples(Communicator().world))[:4], 1
        )
    other = nn.Linear(6, 3)
    trainer = Trainer(
        other,
        torch.optim.SGD(other.parameters(), lr=0.1),
        cross_entropy,
        collective=make_collective("single", Communicator()),
        checkpoint_folder=tmp_path,
    )
    with pytest.raises(SourceError, match=r"of another model or optimizer \(Error.* Missing key.*\): use its settings"):
        trainer.fit(Samples(Communicator().world), 1)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    make_trainer(Communicator(), "single", checkpoint_folder=tmp_path).fit(Samples(Communicator().world), 1)
    trainer = make_trainer(Communicator(), "single", checkpoint_folder=tmp_path)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="with the optimizer SGD, this one has AdamW"):
        trainer.fit(Samples(Communicator().world), 2)


def test_old_checkpoints_are_removed_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, {"steps": step}, keep=2)
    assert [load_checkpoint(path)["steps"] for path in find_checkpoints(tmp_path)] == [10, 100]


def test_a_disk_that_gets_full_while_a_checkpoint_is_written_is_told_as_that(tmp_path: Path) -> None:
    with small_disk(tmp_path, 3 << 16):
        save_checkpoint(tmp_path, 1, {"model": torch.zeros(1 << 14)}, 2)
        for numbers in (1 << 15, 1 << 20):
            with pytest.raises(NoSpaceError, match=r"no space left while writing the checkpoint .*step-00000002\.pt"):
                save_checkpoint(tmp_path, 2, {"model": torch.zeros(numbers)}, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_a_flipped_bit_a_cut_and_a_foreign_file_are_told_in_a_sentence(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": torch.zeros(10_000)}, keep=1)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(flipped)
    with pytest.raises(ChecksumError, match="is damaged"):
        load_checkpoint(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(SourceError, match="cut off or not a checkpoint"):
        load_checkpoint(path)
    torch.save({"model": torch.zeros(3)}, path)
    with pytest.raises(SourceError, match="was not written by stagein"):
        load_checkpoint(path)
    torch.save(CodeOnLoad(tmp_path / "ran"), path)
    with pytest.raises(SourceError, match="not a checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


class CodeOnLoad:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_a_fault_on_one_rank_is_told_on_all_in_the_same_step() -> None:
    told = run_scenario(2, "failures")
    first, last = told["read"]
    assert first[0].startswith("rank 1 on ")
    assert first[0].endswith("OSError: the disk is gone")
    assert [first[1], last[1]] == [True, False], "the rank that failed prints, the others do not"
    assert told["read steps"] == told["exit steps"] == told["nan steps"] == 2
    assert all(sentence.endswith("the script called sys.exit('no such sample')") for sentence, _ in told["exit"])
    assert [flag for _, flag in told["nan"]] == [False, True], "in the same words on all ranks: one is enough"
    assert told["nan"][0][0].startswith("the loss is not a number in step 3 (epoch 1) on rank 1:")
    assert "the parameters of rank 1 differ from those of rank 0" in told["diverged"]


@pytest.mark.mpi
def test_an_error_that_nobody_catches_on_one_rank_ends_all() -> None:
    started = time.monotonic()
    finished = run_ranks(2, sys.executable, PROGRAM, "uncaught", timeout_seconds=45)
    assert finished.returncode == ExitCode.FAILED
    assert "ZeroDivisionError: a bug between two steps" in finished.stderr
    assert time.monotonic() - started < 40


def test_a_loss_without_one_value_a_sample_is_refused() -> None:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), collective=make_collective("single", Communicator()))
    with pytest.raises(UsageError, match="one value a sample"):
        trainer.step(next(iter(Samples(Communicator().world))))


def test_parameters_that_do_not_fit_one_buffer_are_refused() -> None:
    with pytest.raises(UsageError, match="nothing to train"):
        FlatGradients(nn.Linear(2, 2).requires_grad_(False).parameters(), num_words=1)
    with pytest.raises(UsageError, match=r"torch\.float32"):
        FlatGradients(nn.Linear(2, 2).double().parameters(), num_words=1)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_gradient_views_keep_the_layout_of_their_parameters() -> None:
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    flat = FlatGradients(model.parameters(), num_words=2)
    flat.clear()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.stride() == model.weight.stride()
    assert flat.gradients.abs().sum() == pytest.approx(sum(each.grad.abs().sum().item() for each in model.parameters()))
    assert flat.words.tolist() == [0.0, 0.0]
    assert len(flat.buffer) == len(flat.gradients) + 2


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_classify_images(name: str) -> None:
    model = build_model(name, 7).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_the_models_of_the_literature_have_their_published_sizes() -> None:
    """Parameters of ResNet-18 and -50 for 1,000 classes, as torchvision documents them."""
    for name, parameters in {"resnet18": 11_689_512, "resnet50": 25_557_032}.items():
        assert sum(parameter.numel() for parameter in build_model(name, 1000).parameters()) == parameters
