"""Native kernels: functions that numba compiles once, keeps on disk, and runs off the GIL.

Kernels do not check bounds of arrays by themselves: whoever writes one does, and tries it with NUMBA_BOUNDSCHECK=1. Import a
module with kernels where it is used: numba takes half a second to load. What is kept on disk is made anew when the
module of a kernel changes, not when one that it calls lies in another module that does: touch both.
"""

from collections.abc import Callable
from typing import ParamSpec, SupportsInt, TypeVar

import numba
import numpy as np

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def kernel(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`function` compiled; integers stay 64 bits wide and wrap, other threads run meanwhile."""
    compiled: Callable[_Arguments, _Result] = numba.njit(nogil=True, cache=True)(function)
    return compiled


@kernel
def signed(value: SupportsInt) -> int:
    """An element of an array as a signed integer of 64 bits: numba makes a float of uint64 with int64."""
    return np.int64(value)  # type: ignore[return-value, call-overload, unused-ignore]
