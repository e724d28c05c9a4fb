"""The order of an IterableDataset: its own. Where it can say how far it is, so can the loader."""

from collections.abc import Iterator, Mapping
from typing import Any

from stagein.formats.errors import UsageError

from .sampler import Step
from .sampler_order import Stateful


class IterableOrder:
    """Counts batches; goes on in the middle of an epoch where the data set has `state_dict` and is read by the caller."""

    def __init__(self, dataset: Any, num_workers: int) -> None:
        self._dataset, self.num_workers = dataset, num_workers
        self._says_nothing = False
        """Whether its `state_dict` is that of a base class."""
        self._epoch = IterableEpoch(self, 0)
        self._at_start = True

    @property
    def stateful(self) -> Stateful | None:
        says = self.num_workers == 0 and isinstance(self._dataset, Stateful) and not self._says_nothing
        return self._dataset if says else None

    def dataset_state(self) -> Any:
        if self.stateful is None:
            return None
        try:
            return self.stateful.state_dict()
        except NotImplementedError:
            self._says_nothing = True
            return None

    @property
    def description(self) -> str:
        return f"order: as {type(self._dataset).__name__} yields it"

    def begin(self) -> "IterableEpoch":
        if not self._at_start:
            self._epoch = IterableEpoch(self, self._epoch.number + 1)
        self._at_start = False
        return self._epoch

    def end(self, epoch: "IterableEpoch") -> None:
        if epoch is self._epoch:
            self._epoch, self._at_start = IterableEpoch(self, epoch.number + 1), True

    def set_epoch(self, epoch: int) -> None:
        if not (self._at_start and self._epoch.number == epoch):
            self._epoch, self._at_start = IterableEpoch(self, epoch), True
        if callable(tell := getattr(self._dataset, "set_epoch", None)):
            tell(epoch)

    def state_dict(self) -> dict[str, Any]:
        """It never fails, see `SamplerOrder.state_dict`."""
        delivered = self._epoch.delivered_batches
        refused = None
        if delivered and self.stateful is None:
            refused = (
                f"a {type(self._dataset).__name__} does not say where it is; give it state_dict and load_state_dict and load "
                "with num_workers=0, or save the state between two epochs"
            )
        state = self._epoch.state if delivered else self.dataset_state()
        return {"epoch": self._epoch.number, "batches_delivered": delivered, "iterable": state, "refused": refused}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UsageError where going on there cannot be right."""
        if state.get("refused"):
            raise UsageError(f"the loader cannot go on from this state: {state['refused']}")
        if "iterable" not in state:
            raise UsageError(
                "the loader cannot go on from this state: it was written over a map-style data set, this is an IterableDataset"
            )
        self._epoch = IterableEpoch(self, int(state["epoch"]), int(state["batches_delivered"]))
        if self.stateful is not None and state["iterable"] is not None:
            self.stateful.load_state_dict(state["iterable"])
        self._at_start = True


class IterableEpoch:
    """See `sampler.Epoch`: of its steps only the numbers are known."""

    num_steps = None

    def __init__(self, order: IterableOrder, number: int, delivered_batches: int = 0) -> None:
        self.number, self.delivered_batches = number, delivered_batches
        self.state: Any = None
        """Of a stateful data set, after the last batch delivered."""
        self._order = order

    def steps(self) -> Iterator[Step]:
        number = self.delivered_batches
        while True:
            yield Step(self.number, number, None, 0)
            number += 1

    def following(self) -> None:
        """What it will be is the data set's to say when it begins."""

    def delivered(self, step: Step) -> None:
        self.delivered_batches = step.number + 1
        self.state = self._order.dataset_state()

    def finished(self) -> None:
        self._order.end(self)
