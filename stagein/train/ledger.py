"""Where the time of each step went, on each rank: waiting for data, computing, in the allreduce.

Ranks meet in every step's allreduce, so a step lasts as long as its slowest rank: the critical one, which is the last to
arrive and spends the least time in the allreduce. Shares averaged over the ranks hide stalls that move from rank to rank;
what the critical rank waited for is what the job waited for.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

_DATA, _COMPUTE, _ALLREDUCE = range(3)


@dataclass(frozen=True)
class LedgerTotals:
    """Sums over steps. Times in seconds of one rank, averaged over the ranks where nothing else is said."""

    steps: int = 0
    samples: float = 0.0
    """Of all ranks together."""
    data_seconds: float = 0.0
    compute_seconds: float = 0.0
    allreduce_seconds: float = 0.0
    """In the allreduce: waiting for the critical rank, and the transfer itself."""
    transfer_seconds: float = 0.0
    """In the allreduce on the critical rank, which waits for nobody."""
    critical_data_seconds: float = 0.0
    """Waiting for data on the critical rank of each step."""
    seconds_without_data_wait: float = 0.0
    """What the same steps would have taken with data always at hand: the slowest compute and the transfer of each step."""

    def __add__(self, other: "LedgerTotals") -> "LedgerTotals":
        return LedgerTotals(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def seconds(self) -> float:
        return self.data_seconds + self.compute_seconds + self.allreduce_seconds

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def data_wait_share(self) -> float:
        return self._share(self.data_seconds)

    @property
    def allreduce_share(self) -> float:
        return self._share(self.allreduce_seconds)

    @property
    def critical_data_share(self) -> float:
        return self._share(self.critical_data_seconds)

    @property
    def speedup_without_data_wait(self) -> float:
        """How many times faster the steps would be if no rank ever waited for data."""
        return self.seconds / self.seconds_without_data_wait if self.seconds_without_data_wait else 1.0

    def _share(self, seconds: float) -> float:
        return seconds / self.seconds if self.seconds else 0.0


class Ledger:
    """The times of this rank's steps since they were last taken."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, float, float]] = []
        self._samples = 0.0

    def add(self, *, data_seconds: float, compute_seconds: float, allreduce_seconds: float, samples: float) -> None:
        """Note one step; `samples` is the size of the global batch."""
        self._rows.append((data_seconds, compute_seconds, allreduce_seconds))
        self._samples += samples

    def take(self) -> tuple[NDArray[np.float64], float]:
        """The noted steps, seconds `[steps, 3]` (data, compute, allreduce), and their samples; then begin anew."""
        rows, samples = np.array(self._rows, np.float64).reshape(-1, 3), self._samples
        self._rows, self._samples = [], 0.0
        return rows, samples


def attribute(seconds: NDArray[np.float64], samples: float) -> LedgerTotals:
    """Sum up `seconds` `[ranks, steps, 3]`, the rows of all ranks for the same steps of `samples` samples in all."""
    data, compute, allreduce = seconds[..., _DATA], seconds[..., _COMPUTE], seconds[..., _ALLREDUCE]
    num_steps = seconds.shape[1]
    critical = allreduce.argmin(axis=0)
    transfer = allreduce.min(axis=0)
    return LedgerTotals(
        steps=num_steps,
        samples=samples,
        data_seconds=float(data.mean(axis=0).sum()),
        compute_seconds=float(compute.mean(axis=0).sum()),
        allreduce_seconds=float(allreduce.mean(axis=0).sum()),
        transfer_seconds=float(transfer.sum()),
        critical_data_seconds=float(data[critical, np.arange(num_steps)].sum()),
        seconds_without_data_wait=float((compute.max(axis=0) + transfer).sum()),
    )
