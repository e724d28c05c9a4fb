"""What threads that share out records keep together: whose turn is next, what each is at, and what went wrong."""

import numpy as np
from numpy.typing import NDArray

AT_WORK, TROUBLE = 4, 5
"""Words of `new_turns`, behind the number of the next record, and three to work in: how many threads are at work, the first trouble."""
TROUBLE_BITS = 16
"""What is wrong with a record is in so many bits, its number above them."""
NO_TROUBLE = 2**63 - 1
BEGUN = 6
"""How many threads ever were at work."""
_TURNS_WORDS = 8

NEXT, BUSY, FAILED, NUMBER, NBYTES, BLOCKS, CLOCK = range(7)
"""Words of a job, of a thread that decodes: the next block; how many other threads are at it; whether one could not be decoded; the
number of the record, its stored bytes and its blocks; two to read the clock to."""
CLOSED = 1 << 40
"""The next block of a job that nobody may take blocks of."""
_JOB_WORDS = 8


def new_turns() -> NDArray[np.int64]:
    """For threads that have not begun."""
    turns = np.zeros(_TURNS_WORDS, np.int64)
    turns[TROUBLE] = NO_TROUBLE
    return turns


def new_jobs(threads: int) -> NDArray[np.int64]:
    """For so many threads, [threads, words]; none is open."""
    jobs = np.zeros((threads, _JOB_WORDS), np.int64)
    jobs[:, NEXT] = CLOSED
    return jobs
