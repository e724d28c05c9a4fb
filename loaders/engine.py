"""What an engine is: whoever turns tasks into batches of tensors. `fastpath` chooses one and runs it.

    dali_engine     a user's graph; the ready graphs where there is a GPU
    image_engine    the ready image graphs without a GPU: threads of our own
    tensor_engine   tensors without a graph: read and decoded straight into the batch, no DALI

An engine works in two places: `load` in the reader threads, several batches at once; `transform` in the caller's thread,
in order. A record that turns out to be bad in either is a `RowFailure`, and `OnFailure` decides what becomes of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from stagein.formats.errors import StageinError

from .batches import BatchTask, HostBatch, RowFailure

CPU = torch.device("cpu")
Batch = dict[str, torch.Tensor]
Delivered = tuple[HostBatch, Batch]

OnFailure = Callable[[BatchTask, NDArray[np.int64], Sequence[RowFailure]], NDArray[np.int64]]
"""(task, ids of its rows, the rows that failed) -> the ids to make the batch of instead, equally many. Or it raises.

Called from reader threads and from the caller's, until no row fails any more: it must bound how often.
"""


@dataclass(frozen=True)
class EngineOptions:
    """Where batches are delivered, and by how many threads they are made."""

    decode_threads: int
    device: torch.device
    """Where batches are wanted."""
    pin_memory: bool
    """Put into page-locked memory what is delivered on the CPU."""
    keep_between_epochs: bool
    """Keep what is costly to build, such as a DALI pipeline."""
    prefetch_to_device: int = 1
    """Batches made on the GPU, or sent there, ahead of the one that the caller works on."""


class Engine(Protocol):
    """Turns tasks into batches of tensors."""

    @property
    def description(self) -> str:
        """Who does the work, for `DataLoader.explain`."""

    @property
    def delivers_on(self) -> torch.device:
        """Where its batches are: `EngineOptions.device`, or the CPU: whoever uses it then copies them."""

    def load(self, task: BatchTask) -> HostBatch:
        """Read a batch. Called from several threads at once. Raises the StageinErrors of `OnFailure`."""

    def transform(self, batches: Iterator[HostBatch]) -> Iterator[Delivered]:
        """Each batch with its tensors, in order; `times` of it are complete then. What the engine runs ends with the iterator, however that ends.

        An exception of `batches` is raised after the batches before it.
        """


def raise_first(task: BatchTask, ids: NDArray[np.int64], failures: Sequence[RowFailure]) -> NoReturn:
    """The `OnFailure` that lets no bad record pass: raises the first error, with epoch and batch put in front."""
    raise failed_batch(task, failures[0].error) from failures[0].error


def failed_batch(task: BatchTask, error: StageinError) -> StageinError:
    """The same error, naming epoch and batch."""
    return type(error)(f"{task.place}: {error}")
