"""`torch.utils.data.get_worker_info()` in threads: there it tells of the thread, elsewhere it is torch's."""

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data._utils import worker as torch_worker

MAX_SEED = 2**63 - 1
"""Seeds of workers are signed 64-bit numbers in torch."""


@dataclass(frozen=True)
class ThreadInfo:
    """What `get_worker_info()` returns in a worker thread: torch's names. `dataset` is the one object all threads share."""

    id: int
    num_workers: int
    seed: int
    dataset: Any


def introduce_thread(info: ThreadInfo) -> None:
    """Make `info` what `get_worker_info()` returns in this thread.

    Scripts hold the function itself (`from torch.utils.data import get_worker_info`), and it reads a global of its
    module that all threads share. So its code is exchanged, once, for one that asks the thread first.
    """
    if not hasattr(torch_worker, "_thread_info"):
        torch_worker._thread_info = threading.local()  # type: ignore[attr-defined]
        torch_worker.get_worker_info.__code__ = _get_worker_info.__code__
    torch_worker._thread_info.value = info  # type: ignore[attr-defined]


class Introduced:
    """`work`, for threads that are introduced and initialised when they do it for the first time."""

    def __init__(
        self,
        work: Callable[[Any], Any],
        dataset: Any,
        num_workers: int,
        base_seed: int,
        worker_init_fn: Callable[[int], None],
    ) -> None:
        self._work, self._dataset, self._num_workers, self._base_seed = work, dataset, num_workers, base_seed
        self._worker_init_fn = worker_init_fn
        self._numbers = itertools.count()
        self._thread = threading.local()

    def __call__(self, task: Any) -> Any:
        if not hasattr(self._thread, "number"):
            self._thread.number = number = next(self._numbers)
            introduce_thread(ThreadInfo(number, self._num_workers, self._base_seed + number, self._dataset))
            self._worker_init_fn(number)
        return self._work(task)


def _get_worker_info() -> Any:
    # Runs with the globals of torch's module.
    return getattr(_thread_info, "value", _worker_info)  # type: ignore[name-defined]  # noqa: F821
