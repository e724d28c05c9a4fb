"""The learning rate as a pure function of the step: nothing to save, nothing to step, the same after every resume."""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """What the base learning rate is multiplied by at each optimizer step: linear warm-up, then constant or cosine.

    The warm-up is that of Goyal et al., "Accurate, Large Minibatch SGD" (2017); the cosine, half a period from 1 to 0,
    that of Loshchilov and Hutter, "SGDR" (2017), without restarts.
    """

    total_steps: int
    warmup_steps: int = 0
    shape: Shape = "cosine"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(f"a warm-up of {self.warmup_steps} steps does not fit into {self.total_steps} steps")

    def __call__(self, step: int) -> float:
        """The factor, 0 to 1, for the optimizer step number `step` (from 0); past the end, that of the end."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return 1.0
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - self.warmup_steps) / decay_steps)))
