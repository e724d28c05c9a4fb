"""What training frameworks need to be told, where they are in use. None of them is imported for it."""

import sys
from typing import Any, NoReturn

from stagein.formats.errors import UsageError


class AccelerateView:
    """What Accelerate wants to know of the loader that is being iterated over: whether this batch is the last.

    It accumulates gradients over several batches, and takes a step after the last one all the same.
    """

    def __init__(self, num_steps: int) -> None:
        self.end_of_dataloader = False
        self.remainder = -1
        """Accelerate cuts off rows that it added itself; here nothing was added that `valid` does not tell."""
        self._num_steps = num_steps
        self._state = sys.modules["accelerate.state"].GradientState()
        self._state._add_dataloader(self)

    def delivering(self, step_number: int) -> None:
        self.end_of_dataloader = step_number + 1 >= self._num_steps

    def end(self) -> None:
        self._state._remove_dataloader(self)


def view_for_accelerate(num_steps: int | None) -> AccelerateView | None:
    """A view where Accelerate is in use, and the number of steps is known."""
    return None if num_steps is None or "accelerate.state" not in sys.modules else AccelerateView(num_steps)


class GraphCollate:
    """`DataLoader.collate_fn` where a graph makes the batches: calling it means that the graph was left out.

    Accelerate's skip_first_batches makes a plain DataLoader of torch's from the parts of any loader.
    """

    def __call__(self, samples: Any) -> NoReturn:
        raise UsageError(
            "something made a DataLoader of torch's from the parts of this one, which leaves its transform out (HF Trainer does "
            "when it resumes): go on by load_state_dict instead, and give TrainingArguments ignore_data_skip=True"
        )
