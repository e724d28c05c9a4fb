"""Batches of a `RecordDataset`, worked on ahead of the caller, past the end of an epoch too."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator

from .bad_records import Replacement
from .batches import BatchTask, tasks_planned_together
from .engine import Batch
from .fastpath import FastPathRun
from .order import RankBatch, record_numbers
from .reading import refuse_in_forks
from .sampler import Epoch, Step

_PLANNED_TOGETHER = 8
"""Batches: a plan of 512 images is made in the time of two of 64 each, one after the other."""


class RecordStream:
    """An iterator over the steps of an epoch, with their batches, as the engine makes them. Threads and pipeline end with `close`.

    run          begins to make the batches of tasks, as `FastPath.run` does.
    steps        of the epoch.
    replacement  knows which records are bad; None: bad records are errors.
    batched      False: the index of a step is no list.
    goes_on      work on the first batches of the next epoch when those of this one are all begun, where it is known what they are.
                 `turn_to` it when this one is at its end; so nobody waits while threads start, records are read and made.
    """

    def __init__(
        self,
        run: Callable[[Iterator[BatchTask]], FastPathRun],
        epoch: Epoch,
        steps: Iterator[Step],
        replacement: Replacement | None,
        *,
        batched: bool,
        goes_on: bool,
    ) -> None:
        self._replacement, self._batched, self._goes_on = replacement, batched, goes_on
        self._process = os.getpid()
        self._taken: deque[Step] = deque()
        self._begin(epoch)
        self._batches = run(self._tasks(epoch, steps))

    @property
    def is_at_end(self) -> bool:
        """Whether the epoch is over and what comes next is the first batch of the one after it."""
        return self._num_left == 0

    @property
    def next_is_ready(self) -> bool:
        return not self.is_at_end and self._batches.next_is_ready

    def __iter__(self) -> Iterator[tuple[Step, Batch]]:
        return self

    def __next__(self) -> tuple[Step, Batch]:
        refuse_in_forks(self._process)
        if self.is_at_end:
            raise StopIteration
        _, batch = next(self._batches)
        if self._num_left is not None:
            self._num_left -= 1
        return self._taken.popleft(), batch

    def turn_to(self, epoch: Epoch) -> bool:
        """At its end, deliver this epoch. False where it is not what was worked on, or that in a process this one was forked of."""
        if epoch != self._following or os.getpid() != self._process:
            return False
        self._begin(epoch)
        return True

    def close(self) -> None:
        self._batches.close()

    def _begin(self, epoch: Epoch) -> None:
        self._following = epoch.following() if self._goes_on else None
        self._num_left = None if self._following is None else epoch.num_steps

    def _tasks(self, epoch: Epoch, steps: Iterator[Step]) -> Iterator[BatchTask]:
        following = epoch.following()
        while True:
            num_together = 1 if following is None else _PLANNED_TOGETHER  # a sampler is asked when the batch is due
            while some := list(itertools.islice(steps, num_together)):
                tasks = tasks_planned_together([(step.epoch, step.number, self._rows(step)) for step in some])
                for step, task in zip(some, tasks, strict=True):
                    self._taken.append(step)
                    yield task
            if following is None or not self._goes_on:
                return
            following, steps = following.following(), following.steps()

    def _rows(self, step: Step) -> RankBatch:
        ids = record_numbers(step.indices if self._batched else [step.indices])
        return RankBatch(ids if self._replacement is None else self._replacement.good(ids), step.num_valid)
