"""Native kernels: functions that numba compiles once, keeps on disk, and runs off the GIL.

Kernels do not check bounds of arrays by themselves: whoever writes one does, and tries it with NUMBA_BOUNDSCHECK=1. Import a
module with kernels where it is used: numba takes half a second to load.
"""

import functools
import hashlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, SupportsInt, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from numpy.typing import NDArray

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_IMPORT = re.compile(rb"^\s*from (\.|stagein\.formats\.)(\w+) import", re.MULTILINE)


class _KernelCache(FunctionCache):  # type: ignore[misc, unused-ignore]
    """numba's cache on disk, which knows a kernel by its own module alone, though functions and constants of others are
    compiled into it. Here it is known by all of them: a kernel from before an upgrade is never used after it.
    """

    def _index_key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
        key: tuple[Any, ...] = super()._index_key(signature, codegen)  # type: ignore[no-untyped-call, unused-ignore]
        return (*key, _sources_digest(Path(inspect.getfile(self._py_func))))


@functools.cache
def _sources_digest(module: Path) -> str:
    """The sha256 of a module and of all modules of ours that it imports, directly or not."""
    pending, sources = [module], dict[Path, bytes]()
    while pending:
        path = pending.pop()
        if path not in sources and path.exists():
            sources[path] = path.read_bytes()
            for folder, name in _IMPORT.findall(sources[path]):
                pending.append((path.parent if folder == b"." else Path(__file__).parent) / f"{name.decode()}.py")
    digest = hashlib.sha256()
    for _, source in sorted(sources.items()):
        digest.update(hashlib.sha256(source).digest())
    return digest.hexdigest()


def kernel(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`function` compiled; integers stay 64 bits wide and wrap, other threads run meanwhile."""
    compiled = numba.njit(nogil=True)(function)
    if hasattr(compiled, "_cache"):  # it has none when NUMBA_DISABLE_JIT leaves the function as it is
        compiled._cache = _KernelCache(function)  # type: ignore[no-untyped-call, unused-ignore]
    result: Callable[_Arguments, _Result] = compiled
    return result


@kernel
def signed(value: SupportsInt) -> int:
    """An element of an array as a signed integer of 64 bits: numba makes a float of uint64 with int64."""
    return np.int64(value)  # type: ignore[return-value, call-overload, unused-ignore]


def _fetch_add(_context: Any, counter: Any, amount: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(array.data, ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", address, arguments[1], "monotonic")

    return types.int64(types.Array(types.int64, 1, "C"), types.int64), generate


fetch_add: Callable[[NDArray[np.int64], int], int] = intrinsic(_fetch_add)  # type: ignore[assignment, unused-ignore]
"""(array of one int64, amount) -> what was in it, before `amount` was added: by one thread after the other."""
