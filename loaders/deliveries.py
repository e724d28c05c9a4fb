"""What paths hand over: steps with their batches, or with the error of the user's code that stands for one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from .sampler import Step


@dataclass(frozen=True)
class Failure:
    """In place of a batch: the error of the user's code that is to be raised to the caller."""

    error: BaseException


Delivery = tuple[Step, Any]
"""A step and its batch, or a `Failure`."""


class Deliveries(Protocol):
    """An iterator over steps and their batches. Whatever runs for it ends with `close`."""

    @property
    def next_is_ready(self) -> bool:
        """Whether the next delivery would come at once, as far as that is known: made by others, not by the caller."""

    def __iter__(self) -> Iterator[Delivery]: ...

    def __next__(self) -> Delivery: ...

    def close(self) -> None: ...


class Passed:
    """Deliveries that are made of others, one of one: what a subclass does not change is theirs."""

    def __init__(self, deliveries: Deliveries) -> None:
        self._deliveries = deliveries

    @property
    def next_is_ready(self) -> bool:
        return self._deliveries.next_is_ready

    def __iter__(self) -> Iterator[Delivery]:
        return self

    def __next__(self) -> Delivery:
        return next(self._deliveries)

    def close(self) -> None:
        self._deliveries.close()
