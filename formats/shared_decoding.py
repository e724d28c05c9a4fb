"""Decoding a Blosc frame by all threads that have nothing else to do, block by block: so that all end together.

A thread that decodes a record has a job open for it, from which any thread takes the next block.
"""

import numpy as np
from numpy.typing import NDArray

from .blosc_kernel import decode_block, decode_by_library, own_blocks
from .codecs import WORK_BYTES
from .native import fetch_add, fetch_min, kernel
from .native_calls import sched_yield
from .read_turns import BLOCKS, BUSY, CLOSED, FAILED, NBYTES, NEXT, NUMBER


@kernel
def decode_together(
    job: NDArray[np.int64], scratch: NDArray[np.uint8], nbytes: int, number: int, rows: NDArray[np.uint8]
) -> bool:
    """Fill row `number` with what is stored in `scratch`, WORK_BYTES from its start; other threads may take blocks of it from `job`.

    False when that is not a record of this size, or not all of what is stored.
    """
    stored = scratch[WORK_BYTES : WORK_BYTES + nbytes]
    blocks = own_blocks(stored, rows[number])
    if blocks <= 0:
        return blocks == 0 and decode_by_library(stored, rows[number])
    job[NUMBER], job[NBYTES], job[BLOCKS], job[FAILED] = number, nbytes, blocks, 0
    fetch_min(job[NEXT:], 0)  # open
    _take_blocks(job, scratch, rows, scratch)
    fetch_add(job[NEXT:], CLOSED)  # first: who took a block before is busy
    while fetch_add(job[BUSY:], 0) > 0:
        sched_yield()
    return job[FAILED] == 0  # type: ignore[no-any-return]


@kernel
def help_with(
    job: NDArray[np.int64], scratch: NDArray[np.uint8], rows: NDArray[np.uint8], planes: NDArray[np.uint8]
) -> None:
    """Decode blocks of another thread's job, which has that `scratch`, as long as there are some; `planes` are this thread's."""
    if job[NEXT] < CLOSED:
        fetch_add(job[BUSY:], 1)
        _take_blocks(job, scratch, rows, planes)
        fetch_add(job[BUSY:], -1)


@kernel
def _take_blocks(
    job: NDArray[np.int64], scratch: NDArray[np.uint8], rows: NDArray[np.uint8], planes: NDArray[np.uint8]
) -> None:
    while True:
        block = fetch_add(job[NEXT:], 1)
        if block >= CLOSED or block >= job[BLOCKS]:
            return
        stored = scratch[WORK_BYTES : WORK_BYTES + job[NBYTES]]
        if not decode_block(stored, block, rows[job[NUMBER]], planes):
            job[FAILED] = 1
