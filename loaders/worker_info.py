"""`torch.utils.data.get_worker_info()` in threads: there it tells of the thread, elsewhere it is torch's."""

import threading
from dataclasses import dataclass
from typing import Any

from torch.utils.data._utils import worker as torch_worker


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


def _get_worker_info() -> Any:
    # Runs with the globals of torch's module.
    return getattr(_thread_info, "value", _worker_info)  # type: ignore[name-defined]  # noqa: F821
