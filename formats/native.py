"""Native kernels: functions that numba compiles once, keeps on disk, and runs off the GIL.

Kernels do not check bounds of arrays by themselves: whoever writes one does, and tries it with NUMBA_BOUNDSCHECK=1. Import a
module with kernels where it is used: numba takes half a second to load. What every training process calls does without it:
`native_code.NativeKernel`.
"""

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, SupportsInt, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from numpy.typing import NDArray

from .native_code import sources_digest
from .native_files import cache_folder

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_only_for_kernels: dict[str, bool] = {}
"""Options of numba for kernels that Python does not call."""


class _KernelCache(FunctionCache):  # type: ignore[misc, unused-ignore]
    """numba's cache on disk, which knows a kernel by its own module alone, though functions and constants of others are
    compiled into it. Here it is known by all of them: a kernel from before an upgrade is never used after it.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with contextlib.suppress(OSError):  # files that may not be read are as good as none
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call, unused-ignore]
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # on a full disk, nothing is kept
            super().save_overload(sig, data)  # type: ignore[no-untyped-call, unused-ignore]

    def _index_key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        key: tuple[Any, ...] = super()._index_key(signature, codegen)  # type: ignore[no-untyped-call, unused-ignore]
        return (*key, sources_digest(Path(inspect.getfile(self._py_func))))


def _cache_of(function: Callable[..., object]) -> _KernelCache | None:
    """A place on disk for what a function is compiled to: numba's, and where that finds none, ours; None: nowhere."""
    with contextlib.suppress(RuntimeError):  # neither beside the source nor below the home of the user
        return _KernelCache(function)  # type: ignore[no-untyped-call, unused-ignore]
    told = config.CACHE_DIR  # type: ignore[attr-defined, unused-ignore]
    config.CACHE_DIR = str(cache_folder() or "")  # type: ignore[attr-defined, unused-ignore]
    try:
        return _KernelCache(function)  # type: ignore[no-untyped-call, unused-ignore]
    except RuntimeError:
        return None
    finally:
        config.CACHE_DIR = told  # type: ignore[attr-defined, unused-ignore]


def kernel(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`function` compiled; integers stay 64 bits wide and wrap, other threads run meanwhile."""
    return _compiled(function)


def float_kernel(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The same for arithmetic with real numbers: multiply and add in one, and a division by zero is no error."""
    return _compiled(function, error_model="numpy", fastmath={"contract"})


def inlined_kernel(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A `kernel` that becomes part of those that call it: a call costs more than a few operations, with arrays many more."""
    return _compiled(function, forceinline=True)


def _compiled(function: Callable[_Arguments, _Result], **options: Any) -> Callable[_Arguments, _Result]:
    compiled: Any = numba.njit(nogil=True, **options, **_only_for_kernels)(function)  # type: ignore[call-overload, unused-ignore]
    is_kept = hasattr(compiled, "_cache")  # not where NUMBA_DISABLE_JIT leaves the function as it is
    if is_kept and not _only_for_kernels and (cache := _cache_of(function)) is not None:
        compiled._cache = cache
    result: Callable[_Arguments, _Result] = compiled
    return result


def compile_for_kernels_only() -> None:
    """From here on, kernels are called by kernels alone and make no arrays: they compile in two thirds of the time."""
    _only_for_kernels.update(no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False)


@kernel
def signed(value: SupportsInt) -> int:
    """An element of an array as a signed integer of 64 bits: numba makes a float of uint64 with int64."""
    return np.int64(value)  # type: ignore[return-value, call-overload, unused-ignore]


def _atomic(operation: str) -> Callable[[NDArray[np.int64], int], int]:
    def typed(_context: Any, word: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            address = builder.bitcast(array.data, ir.IntType(64).as_pointer())
            return builder.atomic_rmw(operation, address, arguments[1], "seq_cst")

        return types.int64(types.Array(types.int64, 1, "C"), types.int64), generate

    return intrinsic(typed)  # type: ignore[return-value, unused-ignore]


fetch_add = _atomic("add")
"""(array of one int64, amount) -> what was in it, before `amount` was added: by one thread after the other. What a thread did before
is there for those that see what it added."""
fetch_min = _atomic("min")
"""The same, but it becomes the smaller of both."""
exchange = _atomic("xchg")
"""The same, but it becomes the second."""


def _call_entry(_context: Any, entry: Any, frame: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), (word,))
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), (arguments[1],))

    return types.int32(types.int64, types.int64), generate


call_entry: Callable[[int, int], int] = intrinsic(_call_entry)  # type: ignore[assignment, unused-ignore]
"""(where the ENTRY of another kernel is, the address of its frame) -> how many results there are at the start of the frame, below 0 where
it failed: see `native_code`."""


@intrinsic
def _bytes_on_stack(context: Any, count: Any) -> Any:
    if not isinstance(count, types.IntegerLiteral):
        return None  # numba asks again with the constant

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return cgutils.alloca_once(builder, ir.IntType(8), size=count.literal_value)  # type: ignore[no-untyped-call, unused-ignore]

    return types.CPointer(types.uint8)(count), generate  # type: ignore[no-untyped-call, unused-ignore]


bytes_on_stack: Any = _bytes_on_stack
"""(constant) -> so many bytes, until the kernel returns: machine code makes no arrays."""
