"""Huffman tables of JPEG (ITU-T T.81 annexes C, F and K.2): look-up tables for kernels that decode, codes for those that encode.

A table is given as in a DHT segment: how many codes have each length 1 to 16, then their symbols. An AC symbol is
`run << 4 | size`, a DC symbol the size; `size` raw bits follow the code.
"""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import kernel, signed

from .header import damaged
from .limits import LOOK_BITS, MAX_CODE_BITS, TABLE_SYMBOLS
from .pieces import BAD_TABLE
from .tables import HuffmanTables, definition_rows, room_for_tables


def stack_tables(definitions: list[bytes]) -> HuffmanTables:
    """The tables of these definitions. Raises UnsupportedJpegError when one is no prefix code."""
    tables = room_for_tables(len(definitions))
    if not fill_tables(definition_rows(definitions), tables):
        damaged(BAD_TABLE)
    return tables


@kernel
def fill_tables(definitions: NDArray[np.uint8], tables: HuffmanTables) -> bool:
    """Fill the first tables from `definition_rows`; False when one is no prefix code."""
    for number in range(len(definitions)):
        if not _fill_table(
            definitions[number],
            tables.look[number],
            tables.limit[number],
            tables.delta[number],
            tables.symbols[number],
            tables.code[number],
            tables.length[number],
        ):
            return False
    return True


@kernel
def _fill_table(
    definition: NDArray[np.uint8],
    look: NDArray[np.int32],
    limit: NDArray[np.int32],
    delta: NDArray[np.int32],
    symbols: NDArray[np.int32],
    code: NDArray[np.int32],
    length: NDArray[np.int32],
) -> bool:
    """Fill the arrays of one table; False when it is no prefix code."""
    look[:] = 0
    length[:] = 0
    next_code, number = 0, 0
    for bits in range(1, MAX_CODE_BITS + 1):
        delta[bits] = number - next_code
        for _ in range(definition[bits - 1]):
            if number == TABLE_SYMBOLS or next_code >= 1 << bits:
                return False
            symbol = signed(definition[MAX_CODE_BITS + number])
            symbols[number], code[symbol], length[symbol] = symbol, next_code, bits
            if bits <= LOOK_BITS:
                first = next_code << (LOOK_BITS - bits)
                for entry in range(first, first + (1 << (LOOK_BITS - bits))):
                    look[entry] = bits << 8 | symbol
            next_code += 1
            number += 1
        limit[bits] = next_code << (MAX_CODE_BITS - bits)
        next_code <<= 1
    return number > 0


@kernel
def optimal_table(frequency: NDArray[np.int64], counts: NDArray[np.int64], symbols: NDArray[np.int64]) -> int:
    """The Huffman table of least size for symbols of these frequencies (T.81 K.2), no code longer than 16 bits.

    frequency  [257], changed; the last element stands for the code of all ones, which stays free.
    counts     [17], filled: codes of each length. symbols [256], filled, shortest codes first.

    Returns how many symbols have a code.
    """
    frequency[256] = 1
    size = np.zeros(257, np.int64)
    other = np.full(257, -1, np.int64)
    while True:
        least = second = -1
        for symbol in range(257):
            if frequency[symbol] == 0:
                continue
            if least < 0 or frequency[symbol] <= frequency[least]:
                least, second = symbol, least
            elif second < 0 or frequency[symbol] <= frequency[second]:
                second = symbol
        if second < 0:
            break
        frequency[least] += frequency[second]
        frequency[second] = 0
        size[least] += 1
        while other[least] >= 0:
            least = other[least]
            size[least] += 1
        other[least] = second
        size[second] += 1
        while other[second] >= 0:
            second = other[second]
            size[second] += 1
    by_size = np.zeros(258, np.int64)
    for symbol in range(257):
        by_size[size[symbol]] += 1 if size[symbol] else 0
    for bits in range(257, MAX_CODE_BITS, -1):  # shorten codes that are too long, pair by pair
        while by_size[bits] > 0:
            shorter = bits - 2
            while by_size[shorter] == 0:
                shorter -= 1
            by_size[bits] -= 2
            by_size[bits - 1] += 1
            by_size[shorter + 1] += 2
            by_size[shorter] -= 1
    longest = MAX_CODE_BITS
    while by_size[longest] == 0:
        longest -= 1
    by_size[longest] -= 1  # the code of all ones
    for bits in range(1, MAX_CODE_BITS + 1):
        counts[bits] = by_size[bits]
    number = 0
    for bits in range(1, 258):
        for symbol in range(256):
            if size[symbol] == bits:
                symbols[number] = symbol
                number += 1
    return number
