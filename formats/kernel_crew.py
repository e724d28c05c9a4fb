"""Threads that have a part in their caller's call of a kernel, and wait for the next without Python: one that has to take the GIL
first begins a tenth of a millisecond late, and in the end holds it when its caller wants it back.
"""

import ctypes
import functools
import threading
from typing import Any

import numpy as np

from .forks import renew_in_forks
from .native_code import NativeKernel, frame_of

SEATS, LEFT, LOOKING, WOKEN, ENTRY, FRAME, WORDS, ENDED = range(4, 12)
"""Words of a desk, behind its semaphore: how many may still have a part in the call; how many had, and are out of it; how many threads
look for one; how many were woken and do not yet; where the ENTRY of the kernel is, and the frame of its arguments, of so many words; whether there will be none any more."""
_DESK_WORDS = 16
_MOST_WORDS = 64
"""Of a frame."""
_END_SECONDS = 10

_help_until_told = NativeKernel(f"{__package__}.crew_kernels", "help_until_told")
_call_together = NativeKernel(f"{__package__}.crew_kernels", "call_together")


class KernelCrew:
    """As many threads as were ever asked for; they end with `close()`, or with the last reference to this.

    Daemons, as those of `HelperThreads`. Safe to use from many threads: one call at a time has their help.
    """

    def __init__(self) -> None:
        self.renew()
        renew_in_forks(self)

    def renew(self) -> None:
        """Have no threads: they start when they are needed."""
        self._desk = np.zeros(_DESK_WORDS, np.int64)
        self._semaphore = self._desk.ctypes.data
        _c_library().sem_init(self._semaphore, 0, 0)
        self._threads: list[threading.Thread] = []
        self._starting, self._calling = threading.Lock(), threading.Lock()

    def wake(self, count: int) -> None:
        """Have so many threads look for a call that comes presently: they get up meanwhile."""
        if len(self._threads) < count:
            self._start(count)
        for _ in range(len(self._threads) - self._desk.item(LOOKING)):
            self._post()

    def call(self, kernel: NativeKernel, arguments: tuple[Any, ...], count: int) -> list[int] | None:
        """What `kernel(*arguments)` returns, called by the caller and at the same time by so many threads.

        None, without a call, where they help another one, or are not there: without machine code, and as long as that is made.
        """
        entry = kernel.entry(*arguments)
        if entry is None or len(self._threads) < count or not self._calling.acquire(blocking=False):
            return None
        try:
            frame = frame_of(*arguments)
            assert len(frame) <= _MOST_WORDS, "threads copy it to frames of their own"
            own_frame = frame.copy()
            results = _call_together(self._desk, entry, frame, own_frame, count)
        finally:
            self._calling.release()
        if results < 0:
            raise RuntimeError("a kernel failed")
        return own_frame[:results].tolist()  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the threads, and wait until they have."""
        for thread in self._tell_to_end():
            thread.join(_END_SECONDS)

    def __del__(self) -> None:
        self._tell_to_end()

    def _tell_to_end(self) -> list[threading.Thread]:
        with self._starting:
            threads, self._threads = self._threads, []
            self._desk[ENDED] = 1
        for _ in threads:
            self._post()
        return threads

    def _start(self, count: int) -> None:
        frame = np.zeros(_MOST_WORDS, np.int64)
        if not (
            _help_until_told.is_ready(self._desk, frame) and _call_together.is_ready(self._desk, 0, frame, frame, 0)
        ):
            return
        with self._starting:
            while len(self._threads) < count and not self._desk[ENDED]:
                name, arguments = f"stagein-crew-{len(self._threads)}", (self._desk, frame.copy())
                thread = threading.Thread(target=_help_until_told, args=arguments, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def _post(self) -> None:
        _c_library().sem_post(self._semaphore)


@functools.cache
def _c_library() -> ctypes.PyDLL:
    """It keeps the GIL: what is called does not wait, and to have it back takes longer."""
    library = ctypes.PyDLL(None)
    library.sem_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
    library.sem_post.argtypes = (ctypes.c_void_p,)
    return library
