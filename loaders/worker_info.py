"""What worker processes have of their own, in threads: there `get_worker_info()` and `torch.initial_seed()` tell of the thread."""

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data._utils import worker as torch_worker

MAX_SEED = 2**63 - 1
"""Seeds of workers are signed 64-bit numbers in torch."""
_generators = threading.Lock()


@dataclass(frozen=True)
class ThreadInfo:
    """What `get_worker_info()` returns in a worker thread: torch's names. `dataset` is the one object all threads share."""

    id: int
    num_workers: int
    seed: int
    dataset: Any


def introduce_thread(info: ThreadInfo) -> None:
    """Make `info` what `get_worker_info()` returns in this thread, and its seed what `torch.initial_seed()` returns.

    Scripts hold the functions themselves (`from torch.utils.data import get_worker_info`), and those read globals of their
    modules that all threads share. So their code is exchanged, once, for one that asks the thread first.
    """
    if not hasattr(torch_worker, "_thread_info"):
        torch_worker._thread_info = torch.random._thread_info = threading.local()  # type: ignore[attr-defined]
        torch_worker.get_worker_info.__code__ = _get_worker_info.__code__
        torch.initial_seed.__code__ = _initial_seed.__code__
    torch_worker._thread_info.value = info  # type: ignore[attr-defined]


def initialise_thread(worker_init_fn: Callable[[int], None], number: int) -> None:
    """Call the user's function. What it seeds, as recipes for worker processes do, is the caller's here, and put back."""
    with _generators, _generators_put_back():
        worker_init_fn(number)


@contextlib.contextmanager
def _generators_put_back() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


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
            initialise_thread(self._worker_init_fn, number)
        return self._work(task)


# Both run with the globals of torch's modules.


def _get_worker_info() -> Any:
    return getattr(_thread_info, "value", _worker_info)  # type: ignore[name-defined]  # noqa: F821


def _initial_seed() -> Any:
    info = getattr(_thread_info, "value", None)  # type: ignore[name-defined]  # noqa: F821
    return default_generator.initial_seed() if info is None else info.seed  # type: ignore[name-defined]  # noqa: F821
