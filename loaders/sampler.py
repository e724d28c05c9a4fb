"""The loader's own sampler: the global order of `order.py` as batches of one rank, and how far delivery has come."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

from .order import RankBatch, Tail, epoch_order, num_steps, rank_batches


@dataclass
class Progress:
    """Samples of `epoch` that all ranks together have been given so far."""

    epoch: int = 0
    samples: int = 0


@dataclass(frozen=True)
class GlobalOrder:
    """One order of all samples an epoch, cut into global batches, of which this rank takes its share."""

    samples: int
    batch_size: int
    rank: int
    world_size: int
    seed: int
    shuffle: bool
    tail: Tail

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every rank."""
        return num_steps(self.samples, self.global_batch, self.tail)

    def batches(self, start: Progress) -> Iterator[RankBatch]:
        """This rank's batches of the epoch `start.epoch`, from the sample that comes next on."""
        order = epoch_order(self.samples, self.seed, start.epoch, self.shuffle)
        return rank_batches(order, start.samples, self.batch_size, self.rank, self.world_size, self.tail)

    def advance(self, progress: Progress) -> None:
        """Count one more global batch as delivered."""
        progress.samples = min(progress.samples + self.global_batch, self.samples)


class GlobalBatchSampler(Sampler[list[int]]):
    """`GlobalOrder` as torch's loader wants it: an iterable of lists of ids, for the epoch in `progress`."""

    def __init__(self, order: GlobalOrder) -> None:
        self.order = order
        self.progress = Progress()

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.ids.tolist() for batch in self.order.batches(self.progress))
