"""An error on one rank, raised by all ranks at the same step.

Batches are taken one step before they are handed over. A rank that fails to make the next batch so has a step's time to
tell the others, who are still to meet it in that step's allreduce: then all raise, in place of the same batch.
"""

import itertools

from stagein.failure_board import FailureBoard, Notice

from .deliveries import Deliveries, Delivery, Failure, Passed

_loader_numbers = itertools.count()


def next_loader_number() -> int:
    """A number for a loader whose samples are divided; the ranks of a job make their loaders in the same order."""
    return next(_loader_numbers)


class InStep(Passed):
    """The same deliveries, in step with the other ranks."""

    def __init__(self, deliveries: Deliveries, board: FailureBoard, loader_number: int, epoch: int) -> None:
        super().__init__(deliveries)
        self._board = board
        self._pass = [loader_number, epoch]
        self._next: Delivery | Exception | None = None
        """None: not taken yet. An exception, StopIteration too, is due after what was taken before it."""
        self._num_taken = 0
        self._notice: Notice | None = None

    @property
    def next_is_ready(self) -> bool:
        return self._next is not None or super().next_is_ready

    def __next__(self) -> Delivery:
        if self._next is None:
            self._next = self._take()
        current = self._next
        if not isinstance(current, Exception):
            self._next = self._take()
        self._notice = self._notice or self._board.look()
        if self._notice is not None and not self._is_later(self._notice, current):
            notice, self._notice = self._notice, None
            raise notice.as_error()
        if isinstance(current, Exception):
            raise current
        return current

    def _take(self) -> Delivery | Exception:
        self._num_taken += 1
        try:
            step, batch = next(self._deliveries)
        except StopIteration as end:
            return end
        except Exception as error:
            self._board.post(Notice.of(error, [*self._pass, self._num_taken]))
            return error
        if isinstance(batch, Failure) and isinstance(batch.error, Exception):
            self._board.post(Notice.of(batch.error, [*self._pass, self._num_taken]))
        return step, batch

    def _is_later(self, notice: Notice, current: Delivery | Exception) -> bool:
        """Whether the other rank still hands over what this rank is about to hand over."""
        about_to_hand_over = self._num_taken if isinstance(current, Exception) else self._num_taken - 1
        return notice.place[:2] == self._pass and notice.place[2] > about_to_hand_over
