"""All gradients of a model in one flat buffer: one allreduce a step, one pass to divide, one norm to clip."""

from collections.abc import Iterable
from itertools import pairwise

import torch

from stagein.formats.errors import UsageError

_ALIGNMENT = 16
"""Floats: each view starts on a cache line."""


class FlatGradients:
    """One float32 buffer: the gradients of all parameters, then a few words that travel with them in the same allreduce.

    Each parameter's `.grad` is a view of the buffer, in the parameter's own memory layout, so that backward adds into
    the buffer and the optimizer reads from it. A parameter that took no part in a step has a gradient of zero.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], num_words: int) -> None:
        """Raises UsageError when nothing can be trained, or not everything is float32 on one device."""
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        _refuse_mixture(self._parameters)
        starts = [0]
        for parameter in self._parameters:
            starts.append(starts[-1] + -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT)
        self.buffer = torch.zeros(starts[-1] + num_words, device=self._parameters[0].device)
        """float32 `[gradients + num_words]`, contiguous."""
        self.gradients = self.buffer[: starts[-1]]
        self.words = self.buffer[starts[-1] :]
        self._views = [
            _view_in_layout_of(parameter, self.buffer[start:end])
            for parameter, (start, end) in zip(self._parameters, pairwise(starts), strict=True)
        ]

    def clear(self) -> None:
        """Zero the buffer and make it every parameter's gradient again, whatever was done to them since."""
        self.buffer.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def clip(self, max_norm: float) -> None:
        """Scale the gradients so that the norm of all of them together is at most `max_norm`."""
        scale = max_norm / (torch.linalg.vector_norm(self.gradients) + 1e-6)
        self.gradients.mul_(scale.clamp(max=1.0))


def _view_in_layout_of(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`part` with the shape of `parameter`, and its strides where it is dense (channels_last is), else in row order."""
    dense = torch.empty_like(parameter, memory_format=torch.preserve_format)
    return part.as_strided(parameter.shape, dense.stride(), part.storage_offset())


def _refuse_mixture(parameters: list[torch.nn.Parameter]) -> None:
    if not parameters:
        raise UsageError("the model has no parameter that requires a gradient: there is nothing to train")
    kinds = sorted({f"{parameter.dtype} on {parameter.device}" for parameter in parameters})
    if len(kinds) > 1 or parameters[0].dtype != torch.float32:
        raise UsageError(
            f"the trainer needs all parameters in torch.float32 on one device, not {', '.join(kinds)}: "
            "use precision='bf16' for computing in bfloat16"
        )
