"""Private memory in huge pages, where the system has them."""

import contextlib
import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

HUGE_PAGE_BYTES = 2 << 20
"""Of x86-64, and of arm64 with ordinary pages of 4 KiB: of private memory, and of files. Elsewhere they are larger, and memory is in
ordinary pages."""
_LINES_BYTES = 128
"""A pair of cache lines: processors fetch the other one as well."""


def huge_pages(nbytes: int) -> mmap.mmap:
    """Fresh memory: there are few page faults when it is filled, which takes a fifth less time."""
    # Private, as the kernel gives huge pages to shared memory on few systems.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class WorkMemory:
    """Memory that one thread works in all the time, as arrays that lie one behind the other in huge pages.

    Ordinary pages lie where chance puts them in physical memory, and so do arrays in the places of the second-level cache: some of what is
    used together drives each other out. Where images are decoded and resized that was 1 to 3 % of the time.
    """

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)

    def zeros(self, dtype: DTypeLike, *shape: int) -> NDArray[Any]:
        """Zeros, in cache lines that they share with nothing. What a thread writes for every block, beside what another reads for every
        coefficient, is fetched from its core again and again: by chance of where memory was, that made decoding 10 % slower."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        taken = _rounded_up(nbytes, _LINES_BYTES)
        if len(self._left) >= taken:
            memory, self._left = self._left, self._left[taken:]
        else:
            memory = _aligned(taken)
            self._left = max(memory[taken:], self._left, key=len)
        return memory[:nbytes].view(dtype).reshape(shape)


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    """Zeros that fill huge pages; what is mapped around them is never touched."""
    rounded = _rounded_up(nbytes, HUGE_PAGE_BYTES)
    memory = np.frombuffer(huge_pages(rounded + HUGE_PAGE_BYTES), np.uint8)
    start = -memory.__array_interface__["data"][0] % HUGE_PAGE_BYTES
    return memory[start : start + rounded]


def _rounded_up(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
