"""The kernel of `rows`: what to read of many records at once."""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import kernel, signed

from .cut_kernels import needed_rows


@kernel
def plan_reads(
    entries: NDArray[np.uint32],
    first_entry: NDArray[np.int64],
    num_entries: NDArray[np.int64],
    record_bytes: NDArray[np.int64],
    record_crc32c: NDArray[np.uint32],
    windows: NDArray[np.int64],
    start: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    before: NDArray[np.uint32],
    after: NDArray[np.uint32],
    header_bytes: NDArray[np.int64],
    first_row: NDArray[np.int64],
    num_rows: NDArray[np.int64],
) -> int:
    """Fill the arrays of a WindowReads; returns the first record that its table does not fit, or -1."""
    for number in range(len(windows)):
        table = entries[first_entry[number] : first_entry[number] + num_entries[number]]
        start[number] = nbytes[number] = 0
        before[number] = after[number] = 0
        if len(table) < 3:
            nbytes[number, 1], after[number, 1] = record_bytes[number], record_crc32c[number]
            header_bytes[number] = first_row[number] = num_rows[number] = 0
            continue
        if table[0, 0] == 0:
            return number
        first, stop = needed_rows(windows[number, 0], windows[number, 2], signed(table[0, 0]), len(table) - 2)
        header_bytes[number], first_row[number], num_rows[number] = table[1, 0], first, stop - first
        after[number, 1], end = table[1 + stop, 1], signed(table[1 + stop, 0])
        if first > 0:
            nbytes[number, 0], after[number, 0] = table[1, 0], table[1, 1]
            start[number, 1], before[number, 1] = table[1 + first, 0], table[1 + first, 1]
        nbytes[number, 1] = end - start[number, 1]
        if not 0 < header_bytes[number] <= start[number, 1] + nbytes[number, 1] <= record_bytes[number]:
            return number
        if nbytes[number, 1] <= 0 or nbytes[number, 0] > start[number, 1]:
            return number
    return -1
