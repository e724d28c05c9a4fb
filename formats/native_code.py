"""Kernels as machine code, called without numba: 0.3 s and 80 MB of every process that imports it.

A kernel is compiled once a machine, by a process beside this one (`native_jobs`), and kept on disk (`native_files`).
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import threading
import time
import warnings
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import machine_code, native_symbols
from .errors import StageinError
from .forks import renew_in_forks
from .native_files import cache_folder
from .native_jobs import ObjectFile

ENTRY = "call"
"""The function of an object file: (address of a frame) -> how many results there are, below 0 where it raised something. A frame is
words of 64 bits: an integer, a bool, or where the fields of an array are that numpy shows to C (PyArrayObject_fields): what is there
costs a microsecond an array when Python asks for it. Results take the place of the first."""
MOST_RESULTS = 2

_WAIT_SECONDS = 0.01
_LOOK_SECONDS = 0.1
"""Between looks at whether a kernel is ready: a caller may ask for every image."""
_IMPORT = re.compile(rb"^\s*from (\.|stagein\.formats\.)(\w+) import", re.MULTILINE)
_PROCESSOR = ("vendor_id", "cpu family", "model", "stepping", "flags")
"""Lines of /proc/cpuinfo that say what code is made for."""
_OF_NUMBA = ("NUMBA_BOUNDSCHECK", "NUMBA_DISABLE_JIT")
"""What is set where kernels are tried out: numba runs them then."""


class Argument(NamedTuple):
    """What a kernel is compiled for: the dtype of an array, as numpy writes it, and its dimensions; -1 of them for a number."""

    dtype: str
    dimensions: int

    def __str__(self) -> str:
        return f"{self.dtype}/{self.dimensions}"

    @classmethod
    def parse(cls, text: str) -> "Argument":
        dtype, dimensions = text.split("/")
        return cls(dtype, int(dimensions))

    @classmethod
    def of(cls, argument: Any) -> "Argument":
        if isinstance(argument, np.ndarray):
            return cls(argument.dtype.str, argument.ndim)
        return cls(np.dtype(bool if isinstance(argument, bool) else np.int64).str, -1)


_IN_ORDER = 0x0001 | 0x0100
"""Of the flags of an array: in C order, and aligned (NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_ALIGNED)."""
_HEAD_BYTES = object.__basicsize__
"""What every object of Python begins with, before fields of its own."""


class _Code(NamedTuple):
    """Machine code: where its ENTRY is, and a function that calls it with the words of a frame."""

    entry: int
    call: Callable[[list[int]], Any]


_Kinds = tuple[Any, ...]
"""Of arguments: dtype and dimensions of an array, the type of anything else."""


class NativeKernel:
    """The kernel `name` of `module`, called with integers, bools and arrays in C order; it returns integers, or nothing.

    Other threads run meanwhile. Its module, and with it numba, is not imported, but where there can be no machine code.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._code: dict[_Kinds, _Code | None] = {}
        self._files: dict[_Kinds, ObjectFile] = {}
        self._look_again_at = 0.0
        self.renew()
        renew_in_forks(self)

    def renew(self) -> None:
        """Have a lock that nobody holds."""
        self._loading = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        kinds, frame = self._kinds_and_frame(arguments)
        return self._run(self._wait_for_code(kinds, arguments), frame, arguments)

    def call_with(self, *arguments: Any) -> Callable[[], Any] | None:
        """What calls it with these arguments, from any thread; None where a call would have to wait, as `is_awaited` says."""
        kinds, frame = self._kinds_and_frame(arguments)
        if kinds not in self._code and self.is_awaited(*arguments):
            return None
        return functools.partial(self._run, self._wait_for_code(kinds, arguments), frame, arguments)

    def _run(self, code: _Code | None, frame: list[int], arguments: tuple[Any, ...]) -> Any:
        return self._run_by_numba(arguments) if code is None else code.call(frame)

    def _kinds_and_frame(self, arguments: tuple[Any, ...]) -> tuple[_Kinds, list[int]]:
        """What these arguments are, and the words that the code is called with, as `frame_of` says."""
        kinds: list[Any] = []  # called for every image: some 5 us with a dozen arguments
        frame: list[int] = []
        for argument in arguments:
            kind = type(argument)
            if kind is np.ndarray:
                if argument.flags.num & _IN_ORDER != _IN_ORDER:
                    raise TypeError(f"kernel {self._name} takes arrays in C order")
                kinds.append(argument.dtype)
                kinds.append(argument.ndim)
                frame.append(id(argument) + _HEAD_BYTES)
            else:
                kinds.append(kind)
                frame.append(int(argument))
        return tuple(kinds), frame

    def prepare(self, *arguments: Any) -> None:
        """Have the machine code for arguments of these kinds compiled meanwhile, before all that nobody will wait for."""
        if self._loading.acquire(blocking=False):
            try:
                self._look_for_code(_kinds_of(arguments), arguments, is_urgent=True)
            finally:
                self._loading.release()

    def is_ready(self, *arguments: Any) -> bool:
        """Whether there is machine code for arguments of these kinds, so that a call takes no longer than it computes.

        Who asks first has it compiled meanwhile, once a machine. It stays False where there can be none.
        """
        kinds = _kinds_of(arguments)
        if (
            kinds not in self._code
            and time.monotonic() >= self._look_again_at
            and self._loading.acquire(blocking=False)
        ):
            try:
                self._look_for_code(kinds, arguments, is_urgent=False)
                self._look_again_at = time.monotonic() + _LOOK_SECONDS
            finally:
                self._loading.release()
        return self._code.get(kinds) is not None

    def is_awaited(self, *arguments: Any) -> bool:
        """As `is_ready`, but whether a call would have to wait, for as long as compiling takes: who can do without does meanwhile."""
        return not self.is_ready(*arguments) and _kinds_of(arguments) not in self._code

    def entry(self, *arguments: Any) -> int | None:
        """Where the ENTRY of the machine code for arguments of these kinds is, for kernels that call it (`native.call_entry`) with a
        `frame_of` arguments; None until `is_ready`."""
        kinds = _kinds_of(arguments)
        if kinds not in self._code and not self.is_ready(*arguments):
            return None
        code = self._code[kinds]
        return None if code is None else code.entry

    def _run_by_numba(self, arguments: tuple[Any, ...]) -> Any:
        try:
            module = importlib.import_module(self._module)
        except ImportError as error:
            raise StageinError(
                f"numba, which compiles kernel {self._name}, cannot be imported ({error}): install it anew"
            ) from None
        return getattr(module, self._name)(*arguments)

    def _wait_for_code(self, kinds: _Kinds, arguments: tuple[Any, ...]) -> _Code | None:
        """The code for arguments of these kinds; None where there is none."""
        if kinds not in self._code:
            with self._loading:
                while not self._look_for_code(kinds, arguments, is_urgent=True):
                    time.sleep(_WAIT_SECONDS)
        return self._code[kinds]

    def _look_for_code(self, kinds: _Kinds, arguments: tuple[Any, ...], *, is_urgent: bool) -> bool:
        """Whether it is known if there is code, in `_code` then."""
        if kinds in self._code:
            return True
        folder = cache_folder()
        if folder is None or not _is_possible():
            self._code[kinds] = None
            return True
        if kinds not in self._files:
            self._files[kinds] = self._file(folder, tuple(map(Argument.of, arguments)))
        file = self._files[kinds]
        if not file.is_settled(is_urgent=is_urgent):
            return False
        self._code[kinds] = None if file.content is None else _callable(file.content, self._name)
        del self._files[kinds]
        if file.content is None:
            warnings.warn(
                f"kernel {self._name} could not be compiled ahead: this process goes on without it, or compiles it by itself, "
                "and is slower",
                RuntimeWarning,
                stacklevel=3,
            )
        return True

    def _file(self, folder: Path, signature: tuple[Argument, ...]) -> ObjectFile:
        about = [self._module, self._name, *map(str, signature)]
        known_by = f"{' '.join(about)} {_sources_digest_of(self._module)} {_machine()}"
        return ObjectFile(folder / f"{self._name}-{hashlib.sha256(known_by.encode()).hexdigest()[:32]}.o", about)


def frame_of(*arguments: Any) -> NDArray[np.int64]:
    """The words that an ENTRY is called with, for as long as the arrays among the arguments live; an integer is a number, or the address
    of the words of an array: that of its data, any, the address of its extents."""
    words = [id(each) + _HEAD_BYTES if isinstance(each, np.ndarray) else int(each) for each in arguments]
    return np.array(words + [0] * MOST_RESULTS, np.int64)


def _kinds_of(arguments: tuple[Any, ...]) -> _Kinds:
    """As `NativeKernel._kinds_and_frame` finds them."""
    kinds: list[Any] = []
    for argument in arguments:
        kinds += (argument.dtype, argument.ndim) if isinstance(argument, np.ndarray) else (type(argument),)
    return tuple(kinds)


def sources_digest(module: Path) -> str:
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


@functools.cache
def _sources_digest_of(module: str) -> str:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    compiler = Path(__file__).with_name("native_compiler.py")
    return sources_digest(Path(found.origin)) + sources_digest(compiler)


@functools.cache
def _is_possible() -> bool:
    is_tried_out = any(os.environ.get(name, "0") != "0" for name in _OF_NUMBA)
    return platform.machine() == "x86_64" and sys.platform == "linux" and not is_tried_out


@functools.cache
def _machine() -> str:
    """What code depends on beside its sources: the processor, and who compiles."""
    lines = []
    with open("/proc/cpuinfo") as about:
        for line in about:
            if not line.strip():  # the next processor
                break
            if line.split("\t")[0] in _PROCESSOR:
                lines.append(line)
    return "".join(lines) + importlib.metadata.version("numba")


def _callable(object_file: bytes, name: str) -> _Code:
    address = machine_code.load(object_file, ENTRY, native_symbols.address_of)
    function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(address)

    def call(words: list[int]) -> Any:
        frame = array("q", words)
        frame.extend([0] * (MOST_RESULTS - len(frame)))
        count = function(frame.buffer_info()[0])
        if count < 0:
            raise RuntimeError(f"kernel {name} failed")
        return tuple(frame[:count]) if count > 1 else frame[0] if count else None

    return _Code(address, call)
