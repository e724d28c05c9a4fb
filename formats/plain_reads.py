"""Reading records one by one, without a kernel: for the seconds in which that is compiled."""

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .checksums import crc32c_extend, pread_exactly
from .codecs import Codec
from .errors import ChecksumError
from .read_troubles import CUT_OFF, DAMAGED, UNDECODABLE


def read_plainly(
    turns: Iterator[int],
    descriptors: NDArray[np.int32],
    offsets: NDArray[np.int64],
    targets: list[NDArray[np.uint8]],
    before: NDArray[np.uint32],
    after: NDArray[np.uint32],
) -> tuple[int, int]:
    """What `read_kernels.read_records` does, which says what it returns and what `before` and `after` are.

    turns    numbers of records, 0 … len(targets) - 1; several threads share them out.
    targets  where each record goes.
    """
    for number in turns:
        target, descriptor = targets[number], int(descriptors[number])
        try:
            got = pread_exactly(descriptor, memoryview(target), int(offsets[number]))
        except OSError as error:
            assert error.errno is not None
            return number, error.errno
        if got < len(target):
            return number, CUT_OFF
        seed = int(before[number]) if len(before) else 0
        if len(after) and crc32c_extend(seed, target) != after[number]:
            return number, DAMAGED
    return len(targets), 0


def read_and_decode_plainly(
    turns: Iterator[int],
    descriptors: NDArray[np.int32],
    offsets: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    sums: NDArray[np.uint32],
    codec: Codec,
    rows: NDArray[np.uint8],
    decode_nanoseconds: NDArray[np.int64],
) -> tuple[int, int]:
    """What `read_kernels.read_and_decode` does, which says what the arguments are but for `turns`, those of `read_plainly`."""
    for number in turns:
        stored = np.empty(nbytes[number], np.uint8)
        some = slice(number, number + 1)
        _, trouble = read_plainly(iter((0,)), descriptors[some], offsets[some], [stored], sums[:0], sums[some])
        if trouble:
            return number, trouble
        began = time.perf_counter_ns()
        try:
            codec.decode_into(stored, rows[number])
        except ChecksumError:
            return number, UNDECODABLE
        decode_nanoseconds += time.perf_counter_ns() - began
    return len(rows), 0
