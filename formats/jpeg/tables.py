"""Huffman tables of JPEG as arrays that kernels fill and read. Without numba, which takes half a second to load."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .limits import LOOK_BITS, MAX_CODE_BITS, TABLE_SYMBOLS


class HuffmanTables(NamedTuple):
    """Several tables, the first axis counts them.

    look    [tables, 2**LOOK_BITS]  by the next bits: length << 8 | symbol of the code they start with, 0 for longer codes.
    limit   [tables, 17]            16 bits below limit[n] start with a code of at most n bits.
    delta   [tables, 17]            symbol of an n-bit code: symbols[code + delta[n]].
    symbols, code, length [tables, 256]: symbols in order; code and its length by symbol, length 0 for no code.
    """

    look: NDArray[np.int32]
    limit: NDArray[np.int32]
    delta: NDArray[np.int32]
    symbols: NDArray[np.int32]
    code: NDArray[np.int32]
    length: NDArray[np.int32]


def room_for_tables(count: int) -> HuffmanTables:
    """Memory for so many, to be filled."""
    return HuffmanTables(
        np.zeros((count, 1 << LOOK_BITS), np.int32),
        *np.zeros((2, count, MAX_CODE_BITS + 1), np.int32),
        *np.zeros((3, count, TABLE_SYMBOLS), np.int32),
    )


def definition_rows(definitions: list[bytes]) -> NDArray[np.uint8]:
    """Definitions, as a DHT segment has them, in rows of equal length [definitions, 16 counts and 256 symbols]: zeros fill them up."""
    width = MAX_CODE_BITS + TABLE_SYMBOLS
    return np.frombuffer(b"".join(each.ljust(width, b"\0") for each in definitions), np.uint8).reshape(-1, width)
