"""What worker processes have of their own, in threads: there `get_worker_info()` and `torch.initial_seed()` tell of the thread."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    rng: None = None
    worker_method: str = "thread"
    process: int = field(default_factory=os.getpid, repr=False)
    """That the thread is in: one forked of it, such as a worker of torch's, is another worker, or none."""


class WorkerStart:
    """How threads begin that stand for worker processes: each is introduced, and then initialised by the user's function.

    Made in the thread that starts them.
    """

    def __init__(
        self, dataset: Any, num_workers: int, base_seed: int, worker_init_fn: Callable[[int], None] | None
    ) -> None:
        self._dataset, self._num_workers, self._base_seed = dataset, num_workers, base_seed
        self._worker_init_fn = worker_init_fn
        self._begun = threading.Semaphore(0)
        _let_torch_ask_threads()

    def begin(self, number: int) -> BaseException | None:
        """To be called first in thread `number`. Returns what the user's function raised."""
        introduce_thread(ThreadInfo(number, self._num_workers, self._base_seed + number, self._dataset))
        try:
            if self._worker_init_fn is not None:
                # What it seeds, as recipes for worker processes do, is the caller's here, and put back.
                with _generators, _generators_put_back():
                    self._worker_init_fn(number)
        except BaseException as error:
            return error
        finally:
            self._begun.release()
        return None

    def wait(self, timeout_s: float | None) -> None:
        """Wait until all have begun, so long at most, where they run the user's function: what the caller draws from the global generators
        meanwhile would be drawn from what that seeded."""
        if self._worker_init_fn is None:
            return
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for _ in range(self._num_workers):
            if not self._begun.acquire(timeout=None if until is None else max(0.0, until - time.monotonic())):
                return


def introduce_thread(info: ThreadInfo) -> None:
    """Make `info` what `get_worker_info()` returns in this thread, and its seed what `torch.initial_seed()` returns."""
    torch_worker._thread_info.info = info  # type: ignore[attr-defined]


def _let_torch_ask_threads() -> None:
    """Scripts hold the functions themselves (`from torch.utils.data import get_worker_info`), and those read globals of their
    modules that all threads share. So their code is exchanged, once, for one that asks the thread first."""
    if not hasattr(torch_worker, "_thread_info"):
        torch_worker._thread_info = torch.random._thread_info = _Introduced()  # type: ignore[attr-defined]
    torch_worker.get_worker_info.__code__ = _get_worker_info.__code__
    torch.initial_seed.__code__ = _initial_seed.__code__


class _Introduced(threading.local):
    """What each thread was introduced as."""

    info: ThreadInfo | None = None

    @property
    def value(self) -> ThreadInfo | None:
        return None if self.info is None or self.info.process != os.getpid() else self.info


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


# Both run with the globals of torch's modules.


def _get_worker_info() -> Any:
    return _thread_info.value or _worker_info  # type: ignore[name-defined]  # noqa: F821


def _initial_seed() -> Any:
    info = _thread_info.value  # type: ignore[name-defined]  # noqa: F821
    return default_generator.initial_seed() if info is None else info.seed  # type: ignore[name-defined]  # noqa: F821
