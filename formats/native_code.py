"""Kernels as machine code, called without numba: 0.3 s and 80 MB of every process that imports it.

A kernel is compiled once a machine, by a process of its own (`native_compiler`), and kept on disk.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import machine_code, native_symbols

ENTRY = "call"
"""The function of an object file: (address of a frame) -> how many results there are, below 0 where it raised something. A frame is
words of 64 bits: one for an integer or a bool, the address and the shape of an array. Results take the place of the first."""
MOST_RESULTS = 2

_COMPILE_SECONDS = 300
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
_Code = Callable[[list[int]], Any]


class NativeKernel:
    """The kernel `name` of `module`, called with integers, bools and arrays in C order; it returns integers, or nothing.

    Other threads run meanwhile. Its module, and with it numba, is not imported, but where there can be no machine code.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._code: dict[tuple[Any, ...], _Code | None] = {}
        self._loading = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        kinds: list[Any] = []  # called for every image: some 10 us with a dozen arguments
        frame: list[int] = []
        for argument in arguments:
            kind = type(argument)
            if kind is np.ndarray:
                if argument.flags.num & _IN_ORDER != _IN_ORDER:
                    raise TypeError(f"kernel {self._name} takes arrays in C order")
                kinds.append(argument.dtype)
                kinds.append(argument.ndim)
                frame.append(argument.__array_interface__["data"][0])
                frame += argument.shape
            else:
                kinds.append(kind)
                frame.append(int(argument))
        code = self._load(tuple(kinds), arguments)
        if code is None:
            return getattr(importlib.import_module(self._module), self._name)(*arguments)
        return code(frame)

    def _load(self, kinds: tuple[Any, ...], arguments: tuple[Any, ...]) -> _Code | None:
        """The code for arguments of these kinds; None where there is none."""
        if kinds not in self._code:
            with self._loading:
                if kinds not in self._code:
                    signature = tuple(map(Argument.of, arguments))
                    self._code[kinds] = self._find_or_compile(signature) if _is_possible() else None
        return self._code[kinds]

    def _find_or_compile(self, signature: tuple[Argument, ...]) -> _Code | None:
        about = " ".join([self._module, self._name, *map(str, signature)])
        sources = _sources_digest_of(self._module)
        name = f"{self._name}-{hashlib.sha256(f'{about} {sources} {_machine()}'.encode()).hexdigest()[:32]}.o"
        with tempfile.TemporaryDirectory(prefix="stagein-kernels-") as lost:
            path = (_cache_folder() or Path(lost)) / name
            if (content := _read(path)) is None:
                _compile(about, path)
                content = _read(path)
        return None if content is None else _callable(content, self._name)


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


@functools.cache
def _cache_folder() -> Path | None:
    """Where numba keeps its own: where it is told to, else beside our bytecode, else in the cache of the user. None: nowhere."""
    if told := os.environ.get("NUMBA_CACHE_DIR"):
        folders = [Path(told)]
    else:
        of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "stagein"
        folders = [Path(__file__).parent / "__pycache__", of_user]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None


def write(path: Path, object_file: bytes) -> None:
    """Keep code, with a sum before it: whoever runs what a full disk left of a file is lost."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(hashlib.sha256(object_file).digest() + object_file)
    part.replace(path)


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    kept, object_file = content[:32], content[32:]
    return object_file if hashlib.sha256(object_file).digest() == kept else None


def _compile(about: str, path: Path) -> None:
    """Have another process do it, which sees the modules that this one sees. Where it fails, there is no file."""
    script = f"import sys; sys.path[:] = {sys.path!r}; from {__package__}.native_compiler import main; main()"
    command = [sys.executable, "-c", script, *about.split(), str(path)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, capture_output=True, timeout=_COMPILE_SECONDS, stdin=subprocess.DEVNULL)


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

    return call
