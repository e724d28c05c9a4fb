"""The training loop: every rank computes gradients on its share of a batch, one allreduce sums them, all take one step.

The loss is the mean over the samples of the *global* batch, however they are spread over ranks: each rank sums the losses
of its samples, the sum of the gradients travels with the number of samples, and is divided afterwards. So ranks may hold
unequal shares, masked samples, or none. What the ranks have to agree on (a stop signal, an error on one of them) travels
in the same allreduce: all of them act on it in the same step.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from stagein.collectives import Collective
from stagein.formats.errors import InterruptedRunError, SourceError, StageinError, UsageError
from stagein.formats.publish import refuse_unwritable
from stagein.stop_signals import StopSignals

from .batch import Batch, share_right, unpack
from .checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from .endings import Failures, end_job_on_uncaught_error
from .flat import FlatGradients
from .ledger import Ledger, LedgerTotals, attribute
from .replicas import average_buffers, copy_from_rank_0, refuse_diverged
from .reports import MeanLoss, StepReport, Summary, Validation
from .runlog import RunLog, say_at_once

Precision = Literal["fp32", "bf16"]

_LOSS, _SAMPLES, _FAILED, _STOP = range(4)
"""The words that travel behind the gradients: summed losses and samples, and how many ranks failed or were told to stop."""
_SHOWN_CHARACTERS = 200
"""Of what torch says about a checkpoint that does not fit; all of it names every parameter."""


class Batches(Protocol):
    """A list, a torch DataLoader, ours. Where it has `set_epoch`, `state_dict` and `load_state_dict`, they are used."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int:
        """Batches in an epoch; a rank with fewer than the others goes on without samples."""


class Trainer:
    """Trains `model`, in place, on all ranks of a job.

    model         its parameters float32, on the device to train on; `trainer.model` is this very object.
    optimizer     of torch, over the model's parameters, with the full learning rate.
    loss          from outputs and labels to one loss a sample (`reduction="none"`).
    collective    see `stagein.collectives.make_collective`.
    schedule      factor of the learning rate for each step; None: constant.
    accumulate    batches of the loader that make one optimizer step in `fit`.
    clip_norm     largest norm of all gradients together; None: not clipped.
    precision     "bf16" computes under autocast; parameters, gradients and their sum stay float32.
    checkpoint_folder  on a file system that all ranks see; None: no checkpoints. `fit` resumes from the newest one in it.
    run_folder    where log.jsonl is kept; None: nowhere.

    Making one is collective: parameters and buffers become those of rank 0. An error on one rank is raised on all, so is a folder
    that cannot be written. Raises UsageError for arguments that fit neither themselves nor the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        collective: Collective,
        schedule: Callable[[int], float] | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        precision: Precision = "fp32",
        checkpoint_folder: Path | str | None = None,
        checkpoint_every_steps: int | None = None,
        keep_checkpoints: int = 2,
        run_folder: Path | str | None = None,
        log_every_steps: int = 50,
        say: Callable[[str], None] = say_at_once,
    ) -> None:
        counts = {
            "accumulate": accumulate,
            "checkpoint_every_steps": checkpoint_every_steps,
            "keep_checkpoints": keep_checkpoints,
            "log_every_steps": log_every_steps,
        }
        _refuse_no_counts(counts)
        if precision not in get_args(Precision):
            raise UsageError(f"precision={precision!r} is not known: take one of {', '.join(get_args(Precision))}")
        if checkpoint_every_steps is not None and checkpoint_folder is None:
            raise UsageError("checkpoint_every_steps needs a checkpoint_folder, without which nothing is saved")
        _refuse_other_parameters(model, optimizer)
        self.model = model
        self.optimizer = optimizer
        self.collective = collective
        self.world = collective.world
        self.steps = 0
        """Optimizer steps done."""
        self.epoch = 0
        """Epochs done."""
        self.totals = LedgerTotals()
        self.validation: Validation | None = None
        """The newest one."""
        self._loss = loss
        self._schedule = schedule or (lambda _step: 1.0)
        self._accumulate = accumulate
        self._clip_norm = clip_norm
        self._precision = precision
        self._checkpoint_folder = None if checkpoint_folder is None else Path(checkpoint_folder)
        self._checkpoint_every_steps = checkpoint_every_steps
        self._keep_checkpoints = keep_checkpoints
        self._log_every_steps = log_every_steps
        run_folder = None if run_folder is None else Path(run_folder)
        self._log = RunLog(run_folder, speaks=self.world.rank == 0, say=say)

        self._base_rates: list[float] = [group["lr"] for group in optimizer.param_groups]
        self._gradients = FlatGradients(model.parameters(), num_words=4)
        self._device = self._gradients.buffer.device
        self._ledger = Ledger()
        self._signals = StopSignals()
        self._failures = Failures(collective.communicator)
        self._stopping = False
        self._epochs = 0
        """Wanted of `fit`."""
        self._batches_in_epoch = 0
        self._batches_done = 0
        """Of this epoch; those that a new loader still has to be led past after a resume are `_batches_to_skip`."""
        self._batches_to_skip = 0
        self._data_seconds = 0.0
        self._update_seconds = 0.0
        """Of the step before: time after an allreduce counts towards the next one, where ranks wait for each other."""
        self._epoch_loss = MeanLoss()

        with collective.communicator.together():
            if self.world.rank == 0:
                refuse_unwritable(self._checkpoint_folder, "writing checkpoints to")
                refuse_unwritable(run_folder, "writing the run's log to")
        end_job_on_uncaught_error(collective.communicator)
        copy_from_rank_0(model, collective)

    # --- the story -------------------------------------------------------------------------------------------------

    def fit(
        self,
        train: Batches,
        epochs: int,
        *,
        validation: Batches | None = None,
        target_accuracy: float | None = None,
    ) -> Summary:
        """Train until `epochs` epochs are done, or validation reaches `target_accuracy` (0 to 1).

        Goes on from the newest checkpoint, in the middle of an epoch if need be, with as many ranks as there are now.
        After SIGTERM or SIGUSR1 on any rank, the next batch being trained on or validated: saves and raises
        InterruptedRunError on all. Raises StageinError, naming step and rank, where the loss is no number or a rank failed;
        UsageError for a target without validation, or without an accuracy.
        """
        started = time.perf_counter()
        if target_accuracy is not None and validation is None:
            raise UsageError("target_accuracy is reached in validation: give its batches, or leave the target out")
        self._epochs = epochs
        self._batches_in_epoch = max(self.collective.communicator.gather_all(len(train)))
        self._resume(train)
        with self._signals:
            while self.epoch < epochs and not self._has_reached(target_accuracy):
                self._train_epoch(train)
                if validation is not None:
                    try:
                        self.validation = self.validate(validation)
                    except InterruptedRunError:
                        self._save_and_stop(train)
                self._end_epoch()
        return self._summarise(time.perf_counter() - started, self._has_reached(target_accuracy))

    def step(self, *batches: Batch) -> StepReport:
        """One optimizer step on `batches`, this rank's part of the global batch; on every rank, also one with no samples."""
        started = self._clock()
        self._gradients.clear()
        with self._failures.kept():
            for batch in batches:
                self._add_gradients(batch)
        self._gradients.words[_FAILED] = bool(self._failures)
        self._gradients.words[_STOP] = self._signals.received is not None
        own_loss = self._gradients.words[_LOSS].clone()

        computed = self._clock()
        self.collective.allreduce_sum(self._gradients.buffer)
        reduced = self._clock()

        loss_sum, samples, num_failed, num_stopped = self._gradients.words.tolist()
        if num_failed:
            self._failures.raise_together()
        self._refuse_no_number(loss_sum, own_loss)
        rate = self._update(samples)
        self.steps += 1
        self._stopping = num_stopped > 0
        self._ledger.add(
            data_seconds=self._data_seconds,
            compute_seconds=self._update_seconds + computed - started,
            allreduce_seconds=reduced - computed,
            samples=samples,
        )
        self._data_seconds, self._update_seconds = 0.0, self._clock() - reduced
        return StepReport(self.steps, loss_sum / max(1.0, samples), int(samples), rate)

    @torch.no_grad()
    def validate(self, batches: Batches) -> Validation:
        """Loss and accuracy over the samples of all ranks, each counted once; ranks may have unequally many batches.

        There is an accuracy where outputs are scores of classes, `[batch, classes]`, or `[batch, classes, …]` for masks, of whose
        pixels it is the share; None else, as for a regression.

        Buffers such as BatchNorm's running statistics are averaged over the ranks first, and stay so. The model is left
        in the mode, training or evaluation, that it was in. Raises InterruptedRunError on all ranks when, within `fit`, a
        signal came to one of them.
        """
        average_buffers(self.model, self.collective)
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self._device)  # losses, samples, right, judged
        for batch in self._in_step(batches):
            with self._failures.kept():
                inputs, labels, valid = self._unpack(batch)
                if len(inputs):
                    outputs, losses = self._forward(inputs, labels)
                    sums[:2] += torch.stack([losses[valid].sum(), valid.sum()]).double()
                    right = share_right(outputs, labels)
                    if right is not None:
                        sums[2:] += torch.stack([right[valid].sum(), valid.sum()]).double()
        self.model.train(was_training)
        self._failures.raise_together()
        if self._stopping:
            raise self._agreed(InterruptedRunError("validation was stopped by a signal"))
        self.collective.allreduce_sum(sums)
        loss_sum, samples, num_right, num_judged = sums.tolist()
        if samples == 0:
            raise UsageError("there is nothing to validate: the loader has no samples")
        return Validation(loss_sum / samples, num_right / samples if num_judged == samples else None, int(samples))

    # --- an epoch --------------------------------------------------------------------------------------------------

    def _train_epoch(self, train: Batches) -> None:
        self.model.train()
        self._epoch_loss = MeanLoss()
        batches = self._iterate(train)
        while self._batches_done < self._batches_in_epoch:
            wanted = min(self._accumulate, self._batches_in_epoch - self._batches_done)
            report = self.step(*self._fetch(batches, wanted))
            self._batches_done += wanted
            self._epoch_loss.add(report)
            if self._batches_done == self._batches_in_epoch:
                with self._failures.kept():
                    next(batches, None)  # the loader, too, sees that its epoch is over, before its state is saved
            if self.steps % self._log_every_steps == 0:
                self._log_steps(report)
            if self._stopping:
                self._save_and_stop(train)
            if self._checkpoint_every_steps and self.steps % self._checkpoint_every_steps == 0:
                self.save(train)

    def _end_epoch(self) -> None:
        self.epoch += 1
        self._batches_done = 0
        average_buffers(self.model, self.collective)
        refuse_diverged(self.model, self.collective, self.steps)
        self._take_ledger()
        values: dict[str, Any] = {"epoch": self.epoch, "step": self.steps, "loss": self._epoch_loss.value}
        line = f"epoch {self.epoch}/{self._epochs}" + (
            "" if self._epoch_loss.value is None else f": loss {self._epoch_loss.value:.4f}"
        )
        if self.validation is not None:
            values |= {"validation_loss": self.validation.loss, "accuracy": self.validation.accuracy}
            line += f", {self.validation}"
        self._write("epoch", line, **values, ledger=asdict(self.totals))
        self._failures.raise_together()
        self.save()

    def _iterate(self, train: Batches) -> Iterator[Batch]:
        """The batches of this epoch that are not done yet. A generator: nothing happens, or fails, before the first."""
        if hasattr(train, "set_epoch"):
            train.set_epoch(self.epoch)
        to_skip, self._batches_to_skip = self._batches_to_skip, 0
        yield from islice(train, to_skip, None)

    def _fetch(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """The next `count` batches; fewer where this rank has no more, none where it failed."""
        started = time.perf_counter()
        fetched: list[Batch] = []
        with self._failures.kept():
            fetched = list(islice(batches, count))
        self._data_seconds += time.perf_counter() - started
        return fetched

    def _in_step(self, batches: Batches) -> Iterator[Batch]:
        """This rank's batches, one each time that all ranks have agreed to go on: after a failure or a signal on any of them
        nobody gets another. A rank that has no more waits here until nobody has."""
        left: Iterator[Batch] = iter(())
        with self._failures.kept():
            left = iter(batches)
        while True:
            fetched: list[Batch] = []
            with self._failures.kept():
                fetched = list(islice(left, 1))
            words = np.array([bool(fetched), bool(self._failures), self._signals.received is not None])
            any_left, any_failed, self._stopping = self.collective.communicator.any_rank(words).tolist()
            if any_failed or self._stopping or not any_left:
                return
            yield from fetched

    # --- a step ----------------------------------------------------------------------------------------------------

    def _add_gradients(self, batch: Batch) -> None:
        """Add the gradients of the summed loss of `batch` to the buffer, and its sum and its samples to the words."""
        inputs, labels, valid = self._unpack(batch)
        if len(inputs) == 0:  # many layers refuse an empty batch
            return
        _, losses = self._forward(inputs, labels)
        loss_sum = losses[valid].sum()
        loss_sum.backward()  # type: ignore[no-untyped-call]
        self._gradients.words[_LOSS] += loss_sum.detach()
        self._gradients.words[_SAMPLES] += valid.sum()

    def _forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's outputs, and the loss of each sample, float32 `[batch]`."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            outputs = self.model(inputs)
            losses = self._loss(outputs, labels)
        if losses.shape != (len(inputs),):
            raise UsageError(
                f"the loss gave a tensor of shape {tuple(losses.shape)} for {len(inputs)} samples: "
                "it must give one value a sample (reduction='none')"
            )
        return outputs, losses.float()

    def _unpack(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, labels and which rows count, on the device."""
        return tuple(each.to(self._device, non_blocking=True) for each in unpack(batch))  # type: ignore[return-value]

    def _update(self, samples: float) -> float:
        """Turn the summed gradients into those of the mean, clip them and step; the learning rate that was used."""
        self._gradients.gradients.div_(max(1.0, samples))
        if self._clip_norm is not None:
            self._gradients.clip(self._clip_norm)
        factor = self._schedule(self.steps)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        return self._base_rates[0] * factor

    # --- what ranks agree on -----------------------------------------------------------------------------------------

    def _agreed(self, error: StageinError) -> StageinError:
        """An error that all ranks raise in the same words: one of them is enough to print it."""
        error.reported_by_peer = self.world.rank != 0
        return error

    def _refuse_no_number(self, loss_sum: float, own_loss: torch.Tensor) -> None:
        if math.isfinite(loss_sum):
            return
        own_losses = self.collective.communicator.gather_all(own_loss.item())
        ranks = [str(rank) for rank, loss in enumerate(own_losses) if not math.isfinite(loss)]
        raise self._agreed(
            StageinError(
                f"the loss is not a number in step {self.steps + 1} (epoch {self.epoch + 1}) on rank {', '.join(ranks) or 'all'}: "
                "look at that rank's data, lower the learning rate, or clip the gradients"
            )
        )

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, train: Batches | None = None) -> Path | None:
        """Write a checkpoint; `train` is the loader in the middle of an epoch, None between epochs. Collective."""
        if self._checkpoint_folder is None:
            return None
        average_buffers(self.model, self.collective)
        communicator = self.collective.communicator
        random_states = communicator.gather_all(self._random_state())
        path = None
        with communicator.together():
            if self.world.rank == 0:
                state = {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "optimizer_kind": type(self.optimizer).__name__,
                    "steps": self.steps,
                    "epoch": self.epoch,
                    "batches_done": self._batches_done,
                    "batches_in_epoch": self._batches_in_epoch,
                    "loader": _loader_state(train),
                    "random_states": random_states,
                    "validation": None if self.validation is None else asdict(self.validation),
                }
                path = save_checkpoint(self._checkpoint_folder, self.steps, state, self._keep_checkpoints)
        return path

    def _resume(self, train: Batches) -> None:
        """Take up the newest checkpoint in the folder, if there is one."""
        if self._checkpoint_folder is None:
            return
        communicator = self.collective.communicator
        path = communicator.broadcast(next(reversed(find_checkpoints(self._checkpoint_folder)), None))
        if path is None:
            return
        with communicator.together():
            self._apply(load_checkpoint(path), path, train)
        self._log.line(f"resuming from {path}: {self.epoch} of {self._epochs} epochs done, {self.steps} steps")

    def _apply(self, state: dict[str, Any], path: Path, train: Batches) -> None:
        if state["batches_in_epoch"] != self._batches_in_epoch:
            raise UsageError(
                f"{path} is of a run with {state['batches_in_epoch']} batches an epoch, this one has {self._batches_in_epoch}: "
                "use the same data and global batch size, or another checkpoint folder"
            )
        kind, own_kind = state.get("optimizer_kind"), type(self.optimizer).__name__
        if kind not in (None, own_kind):  # torch would take up the state, and miss some of it in the next step
            raise UsageError(
                f"{path} is of a run with the optimizer {kind}, this one has {own_kind}: use its settings, or another checkpoint folder"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            first_trouble = shorten(" ".join(str(error).splitlines()[:2]), _SHOWN_CHARACTERS, placeholder=" ...")
            raise SourceError(
                f"{path} is of another model or optimizer ({first_trouble}): use its settings, or another checkpoint folder"
            ) from error
        self.steps, self.epoch, self._batches_done = state["steps"], state["epoch"], state["batches_done"]
        self.validation = None if state["validation"] is None else Validation(**state["validation"])
        if state["loader"] is None:
            self._batches_to_skip = self._batches_done if self._batches_done < self._batches_in_epoch else 0
        else:
            train.load_state_dict(state["loader"])  # type: ignore[attr-defined]
        if self.world.rank < len(state["random_states"]):  # ranks there were not then keep their seed
            self._set_random_state(state["random_states"][self.world.rank])

    def _save_and_stop(self, train: Batches) -> None:
        path = self.collective.communicator.broadcast(self.save(train))
        names = self.collective.communicator.gather_all(self._signals.received)
        name = next(filter(None, names))
        outcome = (
            "no checkpoint folder was given, so nothing was saved"
            if path is None
            else f"saved {path}, and the same command again goes on from there"
        )
        raise self._agreed(
            InterruptedRunError(f"stopped by {name} after step {self.steps}, epoch {self.epoch + 1}: {outcome}")
        )

    def _random_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def _set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._device)

    # --- times and words ---------------------------------------------------------------------------------------------

    def _clock(self) -> float:
        """Seconds, when the device has done all it was told."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _take_ledger(self) -> LedgerTotals:
        rows, samples = self._ledger.take()
        recent = attribute(np.stack(self.collective.communicator.gather_all(rows)), samples)
        self.totals += recent
        return recent

    def _log_steps(self, report: StepReport) -> None:
        recent = self._take_ledger()
        line = (
            f"epoch {self.epoch + 1}/{self._epochs} step {report.step}: loss {report.loss:.4f}, lr {report.lr:.4g}, "
            f"{recent.samples_per_second:.0f} images/s, data wait {recent.data_wait_share:.1%}, "
            f"allreduce {recent.allreduce_share:.1%}"
        )
        self._write("step", line, epoch=self.epoch + 1, **asdict(report), ledger=asdict(recent))

    def _write(self, event: str, line: str, **values: object) -> None:
        with self._failures.kept():  # rank 0 alone writes, and its disk may be full
            self._log.event(event, **values)
        self._log.line(line)

    def _has_reached(self, target_accuracy: float | None) -> bool:
        if target_accuracy is None or self.validation is None:
            return False
        if self.validation.accuracy is None:
            raise self._agreed(
                UsageError(
                    "target_accuracy needs outputs that are scores of classes: without them there is no accuracy"
                )
            )
        return self.validation.accuracy >= target_accuracy

    def _summarise(self, seconds: float, reached_target: bool) -> Summary:
        summary = Summary(
            epochs=self.epoch,
            steps=self.steps,
            images=int(self.totals.samples),
            seconds=seconds,
            images_per_second=self.totals.samples_per_second,
            data_wait_share=self.totals.data_wait_share,
            allreduce_share=self.totals.allreduce_share,
            critical_data_share=self.totals.critical_data_share,
            speedup_without_data_wait=self.totals.speedup_without_data_wait,
            loss=self._epoch_loss.value,
            accuracy=None if self.validation is None else self.validation.accuracy,
            reached_target=reached_target,
        )
        self._log.event("end", **asdict(summary))
        return summary


def _refuse_no_counts(counts: Mapping[str, int | None]) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name}={count} is not a number of anything: it is at least 1")


def _refuse_other_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise UsageError where some of the optimizer's parameters are none of the model's: no rank would tell the others of theirs."""
    known = set(map(id, model.parameters()))
    others = sum(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"])
    if others:
        raise UsageError(
            f"{others} of the optimizer's parameters are none of the model's, and would differ from rank to rank: make the optimizer over "
            "model.parameters(), of a module that holds all that is trained"
        )


def _loader_state(loader: Batches | None) -> dict[str, Any] | None:
    """None where there is none, as between epochs, or in a list, or where the loader says that it cannot go on from it."""
    state_dict = getattr(loader, "state_dict", None)
    if state_dict is None or not hasattr(loader, "load_state_dict"):
        return None
    state: dict[str, Any] = state_dict()
    return None if state.get("refused") else state
