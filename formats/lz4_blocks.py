"""Where the LZ4 blocks of stored records lie, for whoever inflates them elsewhere, as a GPU does."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .codecs import lz4_block_bytes
from .errors import ChecksumError
from .native import kernel
from .read_kernels import big_endian_32

_HEADER_BYTES = 12


@dataclass(frozen=True)
class Lz4Blocks:
    """The blocks of records of one field, `[records, blocks]` int32 each: where they begin in the stored record, and their bytes."""

    offset: NDArray[np.int32]
    nbytes: NDArray[np.int32]


def find_lz4_blocks(stored: list[NDArray[np.uint8]], record_bytes: int, place: Callable[[int], str]) -> Lz4Blocks:
    """The blocks of records as `codecs.Codec` writes them: equally long when inflated, none stored raw.

    Raises ChecksumError for a record that is none of these, which `place` names by its number in `stored`.
    """
    block_bytes = lz4_block_bytes(record_bytes)
    num_blocks = record_bytes // block_bytes if block_bytes else 0
    blocks = Lz4Blocks(*np.empty((2, len(stored), num_blocks), np.int32))
    for row, record in enumerate(stored):
        if not _find_blocks(record, record_bytes, block_bytes, blocks.offset[row], blocks.nbytes[row]):
            raise ChecksumError(
                f"{place(row)} is not in LZ4 blocks of {block_bytes} bytes each: it was not written by stagein, convert the data set "
                "again"
            )
    return blocks


@kernel
def _find_blocks(
    stored: NDArray[np.uint8],
    record_bytes: int,
    block_bytes: int,
    offset: NDArray[np.int32],
    nbytes: NDArray[np.int32],
) -> bool:
    if len(stored) < _HEADER_BYTES or big_endian_32(stored, 0) != 0 or big_endian_32(stored, 4) != record_bytes:
        return False
    if big_endian_32(stored, 8) != block_bytes:
        return False
    position = _HEADER_BYTES
    for block in range(len(offset)):
        if position + 4 > len(stored):
            return False
        length = big_endian_32(stored, position)
        position += 4
        if length == block_bytes or position + length > len(stored):
            return False
        offset[block], nbytes[block] = position, length
        position += length
    return position == len(stored)
