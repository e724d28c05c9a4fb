"""Run on every rank by test_train.py: short trainings on made-up batches. Rank 0 prints one JSON object.

Run as a program: `train_rank.py SCENARIO [ARGUMENT …]`, each scenario a function below.
"""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagein.collectives import make_collective
from stagein.formats.errors import StageinError
from stagein.train import Schedule, Trainer
from stagein.train.replicas import fingerprint
from stagein.train.trainer import Batch
from stagein.world import Communicator, World, connect

FEATURES, CLASSES, GLOBAL_BATCH, STEPS = 6, 3, 12, 5
cross_entropy = functools.partial(nn.functional.cross_entropy, reduction="none", label_smoothing=0.1)


class Samples:
    """Learnable samples in global batches of 12, the last of 5; every rank takes a share, of unequal size, some masked.

    Its state counts batches, so that it resumes with any number of ranks.
    """

    def __init__(self, world: World, *, mask: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self._inputs = torch.randn((STEPS - 1) * GLOBAL_BATCH + 5, FEATURES, generator=generator)
        self._labels = (self._inputs @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(dim=1)
        self._valid = (
            torch.arange(len(self._inputs)) % 7 != 6 if mask else torch.ones(len(self._inputs), dtype=torch.bool)
        )
        self._world = world
        self._epoch = self._batches = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self._inputs), generator=torch.Generator().manual_seed(self._epoch))
        for number, ids in enumerate(order.split(GLOBAL_BATCH)[self._batches :], start=self._batches):
            self._batches = number + 1
            yield self.batch(self.share(ids))
        self._epoch, self._batches = self._epoch + 1, 0

    def share(self, ids: torch.Tensor) -> torch.Tensor:
        """The last rank gets what the others leave; of a batch of 5, nothing with 4 ranks."""
        size = -(-len(ids) // self._world.size)
        return ids[self._world.rank * size : (self._world.rank + 1) * size]

    def batch(self, ids: torch.Tensor) -> Batch:
        return {"image": self._inputs[ids], "label": self._labels[ids], "valid": self._valid[ids]}

    def set_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._batches = state["epoch"], state["batches"]


def make_trainer(communicator: Communicator, backend: str, *, dropout: float = 0.0, **options: Any) -> Trainer:
    """A small network, differently initialised on each rank: the trainer has to make them equal."""
    torch.manual_seed(0 if communicator.world.rank == 0 else 99)
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3, nesterov=True)
    torch.manual_seed(communicator.world.rank)
    schedule = Schedule(total_steps=4 * STEPS, warmup_steps=2)
    options = {"schedule": schedule, "clip_norm": 1.0, "say": lambda _line: None, **options}
    collective = make_collective(backend, communicator)
    return Trainer(model, optimizer, cross_entropy, collective=collective, **options)


def train(communicator: Communicator, backend: str, epochs: int, **options: Any) -> dict[str, Any]:
    """Train with `fit` and describe the outcome, the losses of all steps among it."""
    trainer = make_trainer(communicator, backend, **options)
    losses: list[float] = []
    step = trainer.step

    def noting_step(*batches: Batch) -> Any:
        report = step(*batches)
        losses.append(report.loss)
        return report

    trainer.step = noting_step  # type: ignore[method-assign]
    samples = Samples(communicator.world)
    try:
        summary = trainer.fit(samples, epochs, validation=list(Samples(communicator.world)))
    finally:
        trainer.collective.close()
    return {
        "losses": losses,
        "validation_loss": trainer.validation.loss if trainer.validation else None,
        "accuracy": summary.accuracy,
        "samples": trainer.validation.samples if trainer.validation else None,
        "steps": summary.steps,
        "images": summary.images,
        "fingerprints": communicator.gather_all(fingerprint(trainer.model)),
    }


def curves(communicator: Communicator, *backends: str) -> dict[str, Any]:
    return {backend: train(communicator, backend, epochs=4) for backend in backends}


def resume(communicator: Communicator, folder: str) -> dict[str, Any]:
    """Two epochs in one go; one epoch, then a new trainer that goes on: the same bits, dropout included."""
    straight = train(communicator, "mpi", 2, dropout=0.3, checkpoint_folder=Path(folder) / "straight")
    train(communicator, "mpi", 1, dropout=0.3, checkpoint_folder=Path(folder) / "halves")
    resumed = train(communicator, "mpi", 2, dropout=0.3, checkpoint_folder=Path(folder) / "halves")
    return {"straight": straight, "resumed": resumed}


class SignalledSamples(Samples):
    """The last rank is sent a signal while it fetches batch number 3 of the second epoch."""

    def batch(self, ids: torch.Tensor) -> Batch:
        if self._epoch == 1 and self._batches == 3 and self._world.rank == self._world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(ids)


def stop(communicator: Communicator, folder: str) -> dict[str, Any]:
    """Ends with InterruptedRunError on every rank."""
    make_trainer(communicator, "mpi", checkpoint_folder=Path(folder)).fit(SignalledSamples(communicator.world), 4)
    raise AssertionError("the signal was lost")


class ManyBatches(Samples):
    """The same batches over and over, more of them on the last rank, which meets a fault when it fetches its tenth."""

    def __init__(self, world: World, fault: Callable[[], None]) -> None:
        super().__init__(world)
        self._fault = fault
        self._is_last = world.rank == world.size - 1
        self.fetched = 0

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(1000 if self._is_last else 4):
            self.fetched += 1
            if self._is_last and self.fetched == 10:
                self._fault()
            yield self.batch(torch.arange(3))


def get_signal() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def lose_the_disk() -> None:
    raise OSError("the disk is gone")


def validations(communicator: Communicator, folder: str) -> dict[str, Any]:
    """What every rank is told about a fault in the middle of a long validation, and how many batches each has fetched."""
    told: dict[str, Any] = {}
    for fault in (get_signal, lose_the_disk):
        trainer = make_trainer(communicator, "mpi", checkpoint_folder=Path(folder) / fault.__name__)
        validation = ManyBatches(communicator.world, fault)
        try:
            trainer.fit(Samples(communicator.world), 4, validation=validation)
        except StageinError as error:
            words = [str(error), error.exit_code, error.reported_by_peer]
            told[fault.__name__] = communicator.gather_all([*words, validation.fetched])
    return told


class BrokenSamples(Samples):
    """On the last rank a batch that cannot be read, at which the user's code ends the process, or that holds no numbers."""

    def __init__(self, world: World, fault: str) -> None:
        super().__init__(world)
        self._fault = fault

    def batch(self, ids: torch.Tensor) -> Batch:
        good = super().batch(ids)
        if self._batches == 3 and self._world.rank == self._world.size - 1:
            if self._fault == "read":
                raise OSError("the disk is gone")
            if self._fault == "exit":
                sys.exit("no such sample")
            good["image"][:] = torch.nan  # type: ignore[call-overload]
        return good


def failures(communicator: Communicator) -> dict[str, Any]:
    """What every rank is told about a fault on the last one."""
    told: dict[str, Any] = {}
    for fault in ("read", "exit", "nan"):
        trainer = make_trainer(communicator, "mpi")
        try:
            trainer.fit(BrokenSamples(communicator.world, fault), 1)
            told[fault] = None
        except StageinError as error:
            told[fault] = communicator.gather_all([str(error), error.reported_by_peer])
        told[fault + " steps"] = trainer.steps
    trainer = make_trainer(communicator, "mpi")
    if communicator.world.rank == 1:
        with torch.no_grad():
            next(trainer.model.parameters()).add_(1e-3)
    try:
        trainer.fit(Samples(communicator.world), 1)
    except StageinError as error:
        told["diverged"] = str(error)
    return told


def uncaught(communicator: Communicator) -> None:
    """A user's own loop with a bug on the last rank, between two steps."""
    trainer = make_trainer(communicator, "mpi")
    for number, batch in enumerate(Samples(communicator.world)):
        trainer.step(batch)
        if number == 2 and communicator.world.rank == communicator.world.size - 1:
            raise ZeroDivisionError("a bug between two steps")


def main() -> None:
    torch.set_num_threads(1)
    communicator = connect()
    try:
        result = globals()[sys.argv[1]](communicator, *sys.argv[2:])
    except StageinError as error:
        print(f"{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if communicator.world.rank == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
