"""What the threads of a `kernel_crew` do, and its caller: a kernel's call is shared out without the GIL.

The desk is where they meet: words that say which call is open, and for how many. Who takes a seat has a part in it.
"""

import numpy as np
from numpy.typing import NDArray

from .kernel_crew import ENDED, ENTRY, FRAME, LEFT, LOOKING, SEATS, WOKEN, WORDS
from .native import call_entry, exchange, fetch_add, kernel
from .native_calls import memcpy, sched_yield, sem_getvalue, sem_post, sem_wait

_LOOKS = 1000
"""Of a thread that was woken for a call, for that, before it sleeps again: some 0.3 ms, if nobody else wants the processor."""
_WORD_BYTES = 8


@kernel
def help_until_told(desk: NDArray[np.int64], frame: NDArray[np.int64]) -> None:
    """Have a part in calls at `desk`, one each time it is woken, until it says that it is over. `frame` is this thread's, for arguments."""
    while desk[ENDED] == 0:
        if sem_wait(desk.ctypes.data) != 0:  # a signal came
            continue
        fetch_add(desk[LOOKING:], 1)
        looks = 0
        while looks < _LOOKS and not _take_a_seat(desk):
            sched_yield()
            looks += 1
        fetch_add(desk[LOOKING:], -1)
        if looks < _LOOKS or _take_a_seat(desk):  # who opened a call before that has not woken anybody
            memcpy(frame.ctypes.data, desk[FRAME], _WORD_BYTES * desk[WORDS])
            call_entry(desk[ENTRY], frame.ctypes.data)
            fetch_add(desk[LEFT:], 1)


@kernel
def call_together(
    desk: NDArray[np.int64], entry: int, frame: NDArray[np.int64], own_frame: NDArray[np.int64], seats: int
) -> int:
    """Call the kernel at `entry` with `own_frame`, and let so many threads at `desk` do the same meanwhile, with copies of `frame`, which
    is equal; returns what the caller's call did, when all have left. Results go to `own_frame`: threads may copy `frame` until then.
    """
    desk[ENTRY], desk[FRAME], desk[WORDS], desk[LEFT] = entry, frame.ctypes.data, len(frame), 0
    exchange(desk[SEATS:], seats)
    desk[WOKEN] = 0
    sem_getvalue(desk.ctypes.data, desk[WOKEN:].ctypes.data)
    for _ in range(seats - fetch_add(desk[LOOKING:], 0) - desk[WOKEN]):
        sem_post(desk.ctypes.data)
    results = call_entry(entry, own_frame.ctypes.data)
    taken = seats - max(0, exchange(desk[SEATS:], 0))
    while fetch_add(desk[LEFT:], 0) < taken:
        sched_yield()
    return results


@kernel
def _take_a_seat(desk: NDArray[np.int64]) -> bool:
    return desk[SEATS] > 0 and fetch_add(desk[SEATS:], -1) > 0
