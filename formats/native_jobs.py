"""Making object files of kernels: each is compiled once a machine, by a process beside this one, however many ask for it at once.

What somebody waits for is compiled at once. All else is compiled behind that by one process: it loads numba once, and leaves the
processor to others.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .forks import renew_in_forks
from .native_files import Lock, read, remove_lock, write

_COMPILE_SECONDS = 300
_NICENESS = 5
"""Of what nobody waits for: what somebody does, and what the caller does meanwhile, comes first."""


class ObjectFile:
    """The object file of a kernel, found on disk or made by a process of our own, or by one of those who ask for the same file.

    Who makes it has its lock. For one thread at a time.
    """

    def __init__(self, path: Path, about: Sequence[str]) -> None:
        """about  what `native_compiler.compile_kernel` is told of the kernel."""
        self._job, self._lock = _Job(path, about), Lock(path)
        self.content = read(path)
        """What is in it; None as long as it is not there."""
        self._patient_until: float | None = None
        renew_in_forks(self)

    def renew(self) -> None:
        """Wait for the compiler as for that of any other process: it is the parent's."""
        self._job.compiler = None
        self._lock.let_go()

    def is_settled(self, *, is_urgent: bool) -> bool:
        """Whether it is there, or cannot be made. Until then it is being made: who asks again learns when that is done.

        is_urgent  somebody waits for it.
        """
        if self.content is not None:
            return True
        if self._job.compiler is not None:
            is_tried = not self._job.compiler.is_at_work
        elif self._lock.take():
            is_tried = self._lock.is_removed
        else:
            return self._takes_too_long()
        self.content = read(self._job.path)  # after that look: it may have come since the last one
        if self.content is None and self._job.compiler is None and not is_tried:
            return not _compilers.compile(self._job, self._lock, is_urgent=is_urgent)
        if self.content is not None:
            remove_lock(self._job.path)  # it may be one that we made after others had done it
        self._lock.let_go()
        return is_tried or self.content is not None or self._takes_too_long()

    def _takes_too_long(self) -> bool:
        """Whether it has been made for longer than is waited for, since that was first seen: nobody may have asked for hours before."""
        now = time.monotonic()
        if self._patient_until is None:
            self._patient_until = now + _COMPILE_SECONDS
        return now > self._patient_until


@dataclass(eq=False)
class _Job:
    """A file to make, and what the compiler is told of the kernel."""

    path: Path
    about: Sequence[str]
    compiler: "_Compiler | None" = None
    """Who does it, or did, for this process."""


class _Compiler:
    """A process that does jobs in this order, and lets go of the lock of each when it is done. It ends with this process, and when nobody
    asks for its files any more.

    Raises OSError where it cannot be started. It sees the modules that this process sees.
    """

    def __init__(self, locked: Sequence[tuple[_Job, Lock]], niceness: int) -> None:
        script = f"import os, sys; os.nice({niceness}); sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
        jobs = [(str(job.path), lock.descriptor, *job.about) for job, lock in locked]
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(jobs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[lock.descriptor for _, lock in locked if lock.descriptor is not None],
        )
        weakref.finalize(self, _end, self._process)  # forks are not its parent, and cannot

    @property
    def is_at_work(self) -> bool:
        return self._process.poll() is None


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.returncode is None:
        process.kill()
        process.wait()


class _Gathered(threading.local):
    """What a thread gathers, each job with its lock, which is ours; None when it does not."""

    locked: dict[_Job, Lock] | None = None


class _Compilers:
    """The compilers of this process."""

    def __init__(self) -> None:
        self.renew()
        renew_in_forks(self)

    def renew(self) -> None:
        """Have none: those of the parent are not ours."""
        self._changing = threading.Lock()
        self._started: weakref.WeakSet[_Compiler] = weakref.WeakSet()
        self._waiting: weakref.WeakKeyDictionary[_Job, None] = weakref.WeakKeyDictionary()
        self._gathered = _Gathered()

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside, what is urgent in this thread waits for the end of the block, where one process begins with all of it."""
        gathered = self._gathered.locked = {}
        try:
            yield
        finally:
            self._gathered.locked = None
            with self._changing, contextlib.ExitStack() as locks:
                for lock in gathered.values():
                    locks.callback(lock.let_go)
                if gathered:
                    self._start(list(gathered.items()), 0)

    def compile(self, job: _Job, lock: Lock, *, is_urgent: bool) -> bool:
        """Have a job done, now or, unless it is urgent, behind what is being done: who asks again then has it begun, with all others
        that wait for that. Lets go of the lock.

        False where no process can be started.
        """
        if is_urgent and self._gathered.locked is not None:
            self._gathered.locked[job] = lock
            return True
        with self._changing, contextlib.ExitStack() as locks:
            locks.callback(lock.let_go)
            self._waiting.setdefault(job)
            if not is_urgent and any(compiler.is_at_work for compiler in self._started):
                return True
            locked = []
            for each in [job] if is_urgent else list(self._waiting):
                del self._waiting[each]
                own = lock if each is job else Lock(each.path)
                locks.callback(own.let_go)
                if each is job or own.take():
                    locked.append((each, own))
            return self._start(locked, 0 if is_urgent else _NICENESS)

    def _start(self, locked: "Sequence[tuple[_Job, Lock]]", niceness: int) -> bool:
        """Whether a process could be started for these jobs."""
        try:
            compiler = _Compiler(locked, niceness)
        except OSError:
            return False
        self._started.add(compiler)
        for job, _ in locked:
            job.compiler = compiler
        return True


_compilers = _Compilers()


def by_one_process() -> contextlib.AbstractContextManager[None]:
    """Inside, kernels are prepared and not called: one process compiles them, in this order, and loads numba once."""
    return _compilers.gathering()


def main() -> None:
    """What a compiler does: the jobs of its last argument."""
    gc.disable()  # a tenth of the time; there is little to collect
    for path, lock, *about in json.loads(sys.argv[-1]):
        try:
            from .native_compiler import compile_kernel

            if read(Path(path)) is None:
                write(Path(path), compile_kernel(*about))
        except Exception:  # whoever calls it learns why; there are others
            continue
        finally:
            remove_lock(Path(path))
            if lock is not None:
                os.close(lock)
