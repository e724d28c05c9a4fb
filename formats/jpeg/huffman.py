"""Huffman tables of JPEG (ITU-T T.81 annexes C, F and K.2): look-up tables for kernels that decode, codes for those that encode.

A table is given as in a DHT segment: how many codes have each length 1 to 16, then their symbols. An AC symbol is
`run << 4 | size`, a DC symbol the size; `size` raw bits follow the code.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import kernel, signed

from .header import damaged
from .limits import MAX_CODE_BITS

LOOK_BITS = 11
"""Codes of up to so many bits are looked up at once; 2,048 entries of 4 bytes stay in the level 1 cache."""

DC_SIZES = 12
"""Sizes that a DC difference of 8-bit samples can have: 0 to 11."""


class HuffmanTables(NamedTuple):
    """Several tables of one class, the first axis counts them.

    look    [tables, 2**LOOK_BITS]  by the next bits: length << 8 | symbol of the code they start with, 0 for longer codes.
    skip    [tables, 2**LOOK_BITS]  the same for AC tables when values do not matter; see `_skip_entry`.
    limit   [tables, 17]            16 bits below limit[n] start with a code of at most n bits.
    delta   [tables, 17]            symbol of an n-bit code: symbols[code + delta[n]].
    symbols, code, length [tables, 256]: symbols in order; code and its length by symbol, length 0 for no code.
    """

    look: NDArray[np.int32]
    skip: NDArray[np.int32]
    limit: NDArray[np.int32]
    delta: NDArray[np.int32]
    symbols: NDArray[np.int32]
    code: NDArray[np.int32]
    length: NDArray[np.int32]


def stack_tables(definitions: list[bytes], *, to_skip: bool = False) -> HuffmanTables:
    """The tables of these definitions, with `skip` if that is wanted. Raises UnsupportedJpegError when one is no prefix code."""
    tables = [_build_table(definition, to_skip) for definition in definitions]
    return HuffmanTables(*(np.stack(parts) for parts in zip(*tables, strict=True)))


@lru_cache(maxsize=64)
def _build_table(definition: bytes, to_skip: bool) -> tuple[NDArray[np.int32], ...]:
    """One table; most files have the standard tables of annex K.3, so that a few are kept."""
    table = HuffmanTables(
        look=np.zeros(1 << LOOK_BITS, np.int32),
        skip=np.zeros(1 << LOOK_BITS, np.int32),
        limit=np.zeros(MAX_CODE_BITS + 1, np.int32),
        delta=np.zeros(MAX_CODE_BITS + 1, np.int32),
        symbols=np.zeros(256, np.int32),
        code=np.zeros(256, np.int32),
        length=np.zeros(256, np.int32),
    )
    content = np.frombuffer(definition, np.uint8)
    counts, values = content[:MAX_CODE_BITS], content[MAX_CODE_BITS:]
    if len(counts) < MAX_CODE_BITS or not _fill_table(
        counts, values, table.look, table.limit, table.delta, table.symbols, table.code, table.length
    ):
        damaged("a Huffman table is missing or no prefix code")
    if to_skip:
        _fill_skip(table.look, table.skip)
    return tuple(table)


@kernel
def _fill_table(
    counts: NDArray[np.uint8],
    values: NDArray[np.uint8],
    look: NDArray[np.int32],
    limit: NDArray[np.int32],
    delta: NDArray[np.int32],
    symbols: NDArray[np.int32],
    code: NDArray[np.int32],
    length: NDArray[np.int32],
) -> bool:
    """Fill the arrays of one table; False when it is no prefix code. `values` has as many elements as `counts` say."""
    next_code, number = 0, 0
    for bits in range(1, MAX_CODE_BITS + 1):
        delta[bits] = number - next_code
        for _ in range(counts[bits - 1]):
            if number >= len(values) or next_code >= 1 << bits:
                return False
            symbol = signed(values[number])
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
def _fill_skip(look: NDArray[np.int32], skip: NDArray[np.int32]) -> None:
    for entry in range(1 << LOOK_BITS):
        skip[entry] = _skip_entry(look, entry)


@kernel
def _skip_entry(look: NDArray[np.int32], window: int) -> int:
    """What the next LOOK_BITS bits say about AC coefficients whose values do not matter, packed:

    bits 0-5    length of all codes, with raw bits, that lie in the window; 0 when it does not hold the first code
    bits 6-11   coefficients they move on by, the end of the block not counted
    bit  12     the last of them ends the block
    bits 13-17, 18-22, bit 23   the same of the first code alone
    """
    first = used = moved = ends = 0
    while used < LOOK_BITS and not ends:
        found = signed(look[(window << used) & ((1 << LOOK_BITS) - 1)])
        bits, run, size = found >> 8, (found >> 4) & 15, found & 15
        if bits == 0 or bits > LOOK_BITS - used or (size == 0 and 0 < run < 15):
            break
        is_end = 1 if run == 0 and size == 0 else 0
        move = 0 if is_end else run + 1
        if moved + move > 63:
            break
        if used == 0:
            first = (bits + size) << 13 | move << 18 | is_end << 23
        used += bits + size
        moved += move
        ends = is_end
    return used | moved << 6 | ends << 12 | first


def complete_dc_table(definition: bytes) -> bytes | None:
    """The same DC codes, and codes for all sizes that are missing; None when there is no room for them.

    They go below the code of all ones, which T.81 leaves free: codes that are in use stay as they are.
    """
    counts, symbols = list(definition[:MAX_CODE_BITS]), definition[MAX_CODE_BITS:]
    missing = bytes(size for size in range(DC_SIZES) if size not in symbols)
    if not missing or not symbols:
        return definition
    longest = max((bits for bits in range(1, MAX_CODE_BITS + 1) if counts[bits - 1]), default=1)
    taken = sum(count << (longest - bits) for bits, count in enumerate(counts[:longest], start=1))
    for bits in range(longest, MAX_CODE_BITS + 1):
        free = ((1 << longest) - taken) << (bits - longest)
        if free > len(missing):  # one more: the code of all ones stays free
            counts[bits - 1] += len(missing)
            return bytes(counts) + symbols + missing
    return None


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
