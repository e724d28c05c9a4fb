"""The loader's own order, rank by rank and epoch by epoch: what comes next, and how far delivery has come.

`GlobalOrder` is a value; `OwnOrder` keeps the place in it. `sampler_order` does the same for torch's samplers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch.utils.data import DistributedSampler, RandomSampler, Sampler, SequentialSampler

from stagein.formats.errors import UsageError
from stagein.world import node_name

from .order import RankBatch, Tail, epoch_order, is_count, num_rank_samples, num_steps, rank_batches


@dataclass(frozen=True)
class Step:
    """Batch number `number` of an epoch, as this rank has to load it.

    indices    what the data set is asked for: a list of keys, or one key where there is no batching.
    num_valid  how many of them count; the rest is padding.
    resume     the state of a stateful sampler after it yielded them.
    """

    epoch: int
    number: int
    indices: Any
    num_valid: int
    resume: Any = None


class Epoch(Protocol):
    """One pass over the samples; `number` is its number."""

    number: int

    @property
    def num_steps(self) -> int | None:
        """How many there are (still) to load; None where only a sampler knows."""

    def steps(self) -> Iterator[Step]:
        """What there is (still) to load."""

    def following(self) -> "OwnEpoch | None":
        """The epoch after this one, should that be known already: None where a sampler has its say first."""

    def delivered(self, step: Step) -> None:
        """Count a step as delivered to the user."""

    def finished(self) -> None:
        """Every step was delivered."""


class Order(Protocol):
    """Which samples come when, and how far that has come."""

    def begin(self) -> Epoch:
        """The next epoch, or the rest of one that `load_state_dict` named."""

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    @property
    def description(self) -> str:
        """For `DataLoader.explain`."""


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


class OwnOrder:
    """A `GlobalOrder`, epoch after epoch, resumable with any number of ranks and any batch size.

    dataset_id  of the data set, where it has one: a state of another is refused.
    batched     False: every step is one sample, and its index is no list.
    said_by     who says which rank of how many this is, for the description.
    """

    def __init__(self, order: GlobalOrder, dataset_id: str | None, batched: bool, said_by: str) -> None:
        self.order, self.batched, self.said_by = order, batched, said_by
        self._dataset_id = dataset_id
        self._progress = Progress()
        self._at_start = True
        """Whether the next epoch takes up `_progress`; otherwise it is the one after it."""
        self.goes_by_sampler = False
        """Whether somebody asks its sampler for one epoch after the other, and not the loader."""
        self._refuse_steps_without_sample(self._progress)

    @property
    def description(self) -> str:
        order = self.order
        return (
            f"order: the loader's own, seed {order.seed}, {'shuffled' if order.shuffle else 'not shuffled'}, "
            f"rank {order.rank} of {order.world_size} by {self.said_by}, global batch {order.global_batch}, tail: {order.tail}"
        )

    @property
    def place(self) -> str:
        """This rank and its node, for errors."""
        return f"rank {self.order.rank} of {self.order.world_size}, node {node_name()}"

    def begin(self) -> "OwnEpoch":
        if not self._at_start:
            self._progress = Progress(self._progress.epoch + 1)
        self._refuse_steps_without_sample(self._progress)
        self._at_start = False
        return OwnEpoch(self, self._progress)

    def upcoming(self) -> Progress:
        """Where the epoch that `begin` begins next starts."""
        return self._progress if self._at_start else Progress(self._progress.epoch + 1)

    def end(self, progress: Progress) -> None:
        """After the last batch; an iterator that was given up in favour of a newer one has no say any more."""
        if progress is self._progress:
            self._progress, self._at_start = Progress(progress.epoch + 1), True

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next one, from its start; without effect where a loaded state is about to go on with it."""
        if not is_count(epoch):
            raise UsageError(f"epoch {epoch!r} is none: they are numbered from 0")
        if not (self._at_start and self._progress.epoch == epoch):
            self._progress, self._at_start = Progress(epoch), True

    def state_dict(self) -> dict[str, Any]:
        """How many samples all ranks together were given in which epoch: the same on every rank after the same step."""
        return {**self._identity(), "epoch": self._progress.epoch, "samples_delivered": self._progress.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next epoch go on there. Raises UsageError for the state of another data set, seed or order."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UsageError(
                    f"the loader cannot go on from this state: its {name} is {state.get(name)!r}, the loader's is {value!r}; "
                    "use the data set and the settings of the run that wrote it"
                )
        epoch, samples = state["epoch"], state["samples_delivered"]
        if not (is_count(epoch) and is_count(samples) and samples <= self.order.samples):
            raise UsageError(
                f"the loader cannot go on from this state: it says {samples!r} samples were delivered of epoch {epoch!r}"
            )
        self._progress = Progress(int(epoch), int(samples))
        self._at_start = True

    def _refuse_steps_without_sample(self, start: Progress) -> None:
        """Raise UsageError where the last step has no sample for some rank, and there is no batch to be empty."""
        order, left = self.order, self.order.samples - start.samples
        if not self.batched and order.tail == "share" and left % order.world_size:
            raise UsageError(
                f"batch_size=None cannot share {left} samples out among {order.world_size} ranks: the last step has none for some of "
                "them; give batch_size=1, whose batch is empty there, or tail='pad'"
            )

    def _identity(self) -> dict[str, Any]:
        """What two runs must share for the state of one to make sense to the other."""
        order = self.order
        return {"dataset": self._dataset_id, "samples": order.samples, "seed": order.seed, "shuffle": order.shuffle}


class OwnEpoch:
    """See `Epoch`. Those that start alike are equal."""

    def __init__(self, own: OwnOrder, progress: Progress) -> None:
        self.number = progress.epoch
        self._own, self._progress = own, progress
        self._start = replace(progress)
        self._first_step = progress.samples // own.order.global_batch

    def steps(self) -> Iterator[Step]:
        for number, batch in enumerate(self._own.order.batches(self._start), start=self._first_step):
            ids = batch.ids.tolist()
            yield Step(self.number, number, ids if self._own.batched else ids[0], batch.num_valid)

    @property
    def num_steps(self) -> int:
        order = self._own.order
        return num_steps(order.samples - self._start.samples, order.global_batch, order.tail)

    def following(self) -> "OwnEpoch":
        return OwnEpoch(self._own, Progress(self.number + 1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnEpoch) and (self._own, self._start) == (other._own, other._start)

    def delivered(self, step: Step) -> None:
        order = self._own.order
        global_batches = step.number - self._first_step + 1
        self._progress.samples = min(self._start.samples + global_batches * order.global_batch, order.samples)

    def finished(self) -> None:
        self._own.end(self._progress)


class OwnSampler(Sampler[int]):
    """The own order as what `DataLoader.sampler` is in torch: this rank's sample ids of the next epoch."""

    own: OwnOrder

    def __iter__(self) -> Iterator[int]:
        start = self.own.upcoming()
        for batch in self.own.order.batches(start):
            yield from batch.ids.tolist()
        if self.own.goes_by_sampler:
            self.own.set_epoch(start.epoch + 1)

    def __len__(self) -> int:
        order = self.own.order
        return num_rank_samples(order.samples, order.batch_size, order.rank, order.world_size, order.tail)

    def set_epoch(self, epoch: int) -> None:
        """Lightning and others tell the sampler of the epoch, not the loader."""
        self.own.set_epoch(epoch)


class ShuffledSampler(OwnSampler, RandomSampler):
    """A `RandomSampler`, by which frameworks see that the order is shuffled."""

    def __init__(self, own: OwnOrder, dataset: Any) -> None:
        self.own, self.data_source, self.replacement = own, dataset, False
        self._num_samples, self.generator = None, None


class UnshuffledSampler(OwnSampler, SequentialSampler):
    """A `SequentialSampler`, by which frameworks see that the order is not shuffled."""

    def __init__(self, own: OwnOrder, dataset: Any) -> None:
        self.own, self.data_source = own, dataset


class SharedSampler(OwnSampler, DistributedSampler[int]):
    """A `DistributedSampler`, by which frameworks see that the samples are divided among the ranks already."""

    def __init__(self, own: OwnOrder, dataset: Any) -> None:
        order = own.order
        DistributedSampler.__init__(self, dataset, order.world_size, order.rank, order.shuffle)
        self.own = own


def framework_sampler(own: OwnOrder, dataset: Any) -> Sampler[int]:
    """The sampler that tells frameworks what the own order is: divided, shuffled, or neither."""
    if own.order.world_size > 1:
        return SharedSampler(own, dataset)
    return (ShuffledSampler if own.order.shuffle else UnshuffledSampler)(own, dataset)
