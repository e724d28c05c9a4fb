"""The order of torch's samplers, and of the user's: the same index sequence as in torch, and a place in it to go on from.

A sampler is an iterable without a position. Where it draws from generators, going on means: put them back to where
they were when it began, and let it yield again what was already delivered. That is right for samplers whose only
state is generators of torch's; others say where they are by `state_dict` and `load_state_dict`, or cannot go on.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from stagein.formats.errors import UsageError

from .sampler import Step

_REPEATABLE = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
"""Samplers whose sequence follows from generators of torch's and from `epoch`."""
_SEQUENCES = (list, tuple, range, np.ndarray, torch.Tensor)


@runtime_checkable
class Stateful(Protocol):
    """What can say where it is, and go on from there."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class SamplerOrder:
    """The indices of `index_sampler`, epoch after epoch.

    index_sampler  what torch's loader takes its indices from: its batch sampler, without batching its sampler.
    samples        of the data set, None where it does not say.
    in_order       batches are delivered in the order of the sampler.
    dataset        if it is `Stateful`, its state is kept too.
    num_workers    that load ahead of what is delivered.
    """

    def __init__(
        self,
        index_sampler: Iterable[Any],
        batched: bool,
        samples: int | None,
        in_order: bool,
        dataset: object,
        num_workers: int,
    ) -> None:
        self.index_sampler, self.batched, self._samples = index_sampler, batched, samples
        self.in_order, self.num_workers = in_order, num_workers
        self._dataset = dataset if isinstance(dataset, Stateful) else None
        self._inner = _innermost(index_sampler)
        self.stateful = next((each for each in (index_sampler, self._inner) if isinstance(each, Stateful)), None)
        self._epoch = SamplerEpoch(self, 0)
        self._at_start = True

    @property
    def description(self) -> str:
        return f"order: by {type(self._inner).__name__}, as in torch"

    def begin(self) -> "SamplerEpoch":
        if not self._at_start:
            self._epoch = SamplerEpoch(self, self._epoch.number + 1)
        self._at_start = False
        return self._epoch

    def end(self, epoch: "SamplerEpoch") -> None:
        if epoch is self._epoch:
            self._epoch, self._at_start = SamplerEpoch(self, epoch.number + 1), True

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next one, for samplers that want to know; a loaded place in it is kept."""
        if not (self._at_start and self._epoch.number == epoch):
            self._epoch, self._at_start = SamplerEpoch(self, epoch), True
        for sampler in {id(each): each for each in (self.index_sampler, self._inner)}.values():
            if callable(tell := getattr(sampler, "set_epoch", None)):
                tell(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Batches delivered in which epoch, and what the sampler needs to yield the same again.

        It never fails, because frameworks ask whenever they write a checkpoint: `refused` says why a place in the middle
        of an epoch is no place to go on from, and `load_state_dict` raises that.
        """
        epoch = self._epoch
        state: dict[str, Any] = {
            "samples": self._samples,
            "epoch": epoch.number,
            "batches_delivered": epoch.delivered_batches,
            "refused": self._reason_to_refuse() if epoch.delivered_batches else None,
        }
        if self._dataset is not None and not self.num_workers:
            with contextlib.suppress(NotImplementedError):
                state["dataset"] = self._dataset.state_dict()
        if epoch.begun:
            generators = epoch.origin if self._draws else {}
            return {**state, "begun": True, "sampler": epoch.sampler_state, "generators": generators}
        # Until the sampler begins, the global generator is the caller's.
        generators = {name: value for name, value in self.generators().items() if name != "global" and self._draws}
        return {**state, "begun": not self._at_start, "sampler": self.sampler_state(), "generators": generators}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next epoch go on there. Raises UsageError where that cannot be right."""
        if state.get("refused"):
            raise UsageError(f"the loader cannot go on from this state: {state['refused']}")
        if "batches_delivered" not in state or state.get("samples") != self._samples:
            raise UsageError(
                f"the loader cannot go on from this state: it is of {state.get('samples')} samples, the data set has "
                f"{self._samples}, or the order was the loader's own then; use the data set and the settings of the run "
                "that wrote it"
            )
        self._epoch = SamplerEpoch(self, int(state["epoch"]), int(state["batches_delivered"]))
        self._epoch.origin, self._epoch.sampler_state = dict(state["generators"]), state["sampler"]
        self._epoch.resumed = bool(state["begun"])
        self._at_start = True
        if self._dataset is not None and "dataset" in state:
            self._dataset.load_state_dict(state["dataset"])
        if not state["begun"]:
            if self.stateful is not None:
                self.stateful.load_state_dict(state["sampler"])
            with self.generators_put_back(state["generators"]):
                pass

    def generators(self) -> dict[str, Any]:
        """Where everything is that a sampler of torch's draws from."""
        states: dict[str, Any] = {"global": torch.get_rng_state()}
        if self._own_generator is not None:
            states["own"] = self._own_generator.get_state()
        if isinstance(self._inner, DistributedSampler):
            states["epoch"] = self._inner.epoch
        return states

    @contextlib.contextmanager
    def generators_put_back(self, states: Mapping[str, Any]) -> Iterator[None]:
        """Run a block with the generators as they were then; the global one is the caller's again afterwards."""
        if "own" in states and self._own_generator is not None:
            self._own_generator.set_state(states["own"])
        if "epoch" in states and isinstance(self._inner, DistributedSampler):
            self._inner.set_epoch(states["epoch"])
        with torch.random.fork_rng(devices=[]) if "global" in states else contextlib.nullcontext():
            if "global" in states:
                torch.set_rng_state(states["global"])
            yield

    def sampler_state(self) -> Any:
        if self.stateful is None:
            return None
        try:
            return self.stateful.state_dict()
        except NotImplementedError:  # of a base class
            self.stateful = None
            return None

    @property
    def _draws(self) -> bool:
        """Whether generators tell how to go on; else a state is plain numbers, which JSON takes."""
        return self.stateful is None and type(self._inner) not in (SequentialSampler, *_SEQUENCES)

    @property
    def _own_generator(self) -> torch.Generator | None:
        generator = getattr(self._inner, "generator", None)
        return generator if isinstance(generator, torch.Generator) else None

    def _reason_to_refuse(self) -> str | None:
        if not self.in_order:
            return "with in_order=False the batches delivered are not the first ones of the epoch"
        if self._dataset is not None and self.num_workers:
            return (
                f"the state of a {type(self._dataset).__name__} is that of samples loaded ahead; give num_workers=0, or save the "
                "state between two epochs"
            )
        if self.stateful is None and type(self._inner) not in (*_REPEATABLE, *_SEQUENCES):
            return (
                f"a {type(self._inner).__name__} does not say where it is in its epoch; give it state_dict and "
                "load_state_dict, or save the state between two epochs"
            )
        return None


class SamplerEpoch:
    """See `sampler.Epoch`."""

    num_steps = None

    def __init__(self, order: SamplerOrder, number: int, delivered_batches: int = 0) -> None:
        self.number, self.delivered_batches = number, delivered_batches
        self.origin: dict[str, Any] = {}
        """The generators before the sampler began."""
        self.sampler_state: Any = None
        """Of a stateful sampler, after the last batch delivered."""
        self.resumed = False
        """Whether to go on from there."""
        self._order = order

    @property
    def begun(self) -> bool:
        """Whether the sampler was asked for this epoch's indices."""
        return self.resumed or "global" in self.origin

    def steps(self) -> Iterator[Step]:
        """The sampler is asked for its iterator here, and the generators are looked at when it is for its first index: in between, torch draws
        the seed of its workers."""
        sampler_state = None if self.resumed else self._order.sampler_state()
        indices = self._rest() if self.resumed else iter(self._order.index_sampler)
        return self._steps(indices, sampler_state)

    def following(self) -> None:
        """What it will be is the sampler's to say when it begins."""

    def delivered(self, step: Step) -> None:
        self.delivered_batches = max(self.delivered_batches, step.number + 1)
        self.sampler_state = step.resume

    def finished(self) -> None:
        self._order.end(self)

    def _steps(self, indices: Iterator[Any], sampler_state: Any) -> Iterator[Step]:
        order = self._order
        if not self.resumed:
            self.origin, self.sampler_state = order.generators(), sampler_state
        for number, some in enumerate(indices, start=self.delivered_batches):
            indices_of_step = _kept(some) if order.batched else some
            size = len(some) if order.batched and isinstance(some, Sized) else 1
            yield Step(self.number, number, indices_of_step, size, order.sampler_state())

    def _rest(self) -> Iterator[Any]:
        order = self._order
        if order.stateful is not None:
            order.stateful.load_state_dict(self.sampler_state)
            return iter(order.index_sampler)
        with order.generators_put_back(self.origin):
            indices = iter(order.index_sampler)
            # The first one, too, is taken here: samplers draw when they are first asked.
            first = list(islice(indices, self.delivered_batches, self.delivered_batches + 1))
        return chain(first, indices)


def _kept(indices: Any) -> Any:
    """The same: a sampler may fill its list anew for the next batch, while a thread still works on this one."""
    if isinstance(indices, torch.Tensor):
        return indices.clone()
    return indices.copy() if type(indices) in (list, np.ndarray) else indices


def _innermost(index_sampler: Any) -> Any:
    """The sampler below batch samplers, torch's or such as look like it; itself where it is none of them."""
    below = getattr(index_sampler, "sampler", None)
    if type(index_sampler) is BatchSampler and below is not None:
        return _innermost(below)
    return index_sampler
