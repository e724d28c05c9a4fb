"""What the trainer tells its user: plain values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: its number (from 1), the mean loss over the global batch, its samples, the learning rate."""

    step: int
    loss: float
    samples: int
    lr: float


@dataclass(frozen=True)
class Validation:
    """Exact over all samples of all ranks; accuracy from 0 to 1, None where outputs are no scores of classes."""

    loss: float
    accuracy: float | None
    samples: int

    def __str__(self) -> str:
        told = f"validation loss {self.loss:.4f}" if self.accuracy is None else f"accuracy {self.accuracy:.2%}"
        return f"{told} of {self.samples}"


@dataclass(frozen=True)
class Summary:
    """What `fit` did. Shares are of the time in steps, averaged over the ranks; see `ledger.py` for the critical rank.

    Epochs and steps count from the start of the training, everything else from the start or resume of this process.
    """

    epochs: int
    steps: int
    images: int
    seconds: float
    images_per_second: float
    data_wait_share: float
    allreduce_share: float
    critical_data_share: float
    speedup_without_data_wait: float
    loss: float | None
    accuracy: float | None
    reached_target: bool


class MeanLoss:
    """The mean over samples of what it was given; None before the first."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._samples = 0

    def add(self, report: StepReport) -> None:
        self._sum += report.loss * report.samples
        self._samples += report.samples

    @property
    def value(self) -> float | None:
        return self._sum / self._samples if self._samples else None
