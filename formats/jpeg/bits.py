"""Bits of entropy-coded JPEG data (ITU-T T.81 annex F): stuffed bytes taken out, bits read and written. For kernels only.

A reader knows its position as a number of bits from the start of data without stuffing; behind their end lie PADDING_BYTES
of zeros, more than one block can use up, so that kernels check once a block.
"""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import inlined_kernel, kernel, signed

from .limits import LOOK_BITS, MAX_CODE_BITS, PADDING_BYTES, SEARCHED_BYTES
from .tables import HuffmanTables
from .vectors import copy_until_ff

INVALID = -1
_WORD_BITS = 64
_COPIED_BYTES = 7
"""At a time, with up to 7 bits that wait: both fit into a word."""


@kernel
def unstuff(
    source: NDArray[np.uint8], start: int, stop: int, plain: NDArray[np.uint8], segments: NDArray[np.int64]
) -> tuple[int, int]:
    """Copy `source[start:stop]`, the data of a scan, to `plain` without stuffed bytes, restart markers and fill bytes.

    plain     as long as the scan and PADDING_BYTES more.
    segments  filled with the byte in `plain` where each restart segment starts.

    Returns the bytes copied and the number of segments; INVALID for the latter when restart markers are out of order
    or more than `segments` has room for.
    """
    position, filled, count = start, 0, 1
    segments[0] = 0
    while position < stop:
        if position + SEARCHED_BYTES <= stop:
            count_before = copy_until_ff(source, position, plain, filled)
            if count_before == SEARCHED_BYTES:  # apart: where to go on is known before these were looked at
                position += SEARCHED_BYTES
                filled += SEARCHED_BYTES
                continue
            position += count_before
            filled += count_before
        byte = source[position]
        position += 1
        if byte != 0xFF:
            plain[filled] = byte
            filled += 1
            continue
        if position >= stop:
            break
        after = source[position]
        if after == 0:
            plain[filled] = byte
            filled += 1
            position += 1
        elif after != 0xFF:  # a second 0xFF makes the first a fill byte
            if after != 0xD0 + ((count - 1) & 7) or count == len(segments):
                return filled, INVALID
            segments[count] = filled
            count += 1
            position += 1
    plain[filled : filled + PADDING_BYTES] = 0
    return filled, count


@kernel
def copy_bytes(source: NDArray[np.uint8], start: int, stop: int, target: NDArray[np.uint8], filled: int) -> int:
    """Append `source[start:stop]` to `target`; returns the bytes that it then has. With slices numba compiles for 2 s more."""
    for byte in range(stop - start):  # becomes one memcpy
        target[np.uint64(filled + byte)] = source[np.uint64(start + byte)]
    return filled + stop - start


@inlined_kernel
def word_at(plain: NDArray[np.uint8], byte: int) -> np.uint64:
    """The 64 bits from a byte on."""
    at = np.uint64(byte)
    word = np.uint64(0)
    for each in range(8):  # becomes one load
        word |= np.uint64(plain[at + np.uint64(each)]) << np.uint64(56 - 8 * each)
    return word


@inlined_kernel
def fill_word(plain: NDArray[np.uint8], byte: int, word: np.uint64, bits: int) -> tuple[int, np.uint64, int]:
    """The next `bits` bits are the highest of `word`, what follows is in `plain` from `byte` on: the three with 56 bits at least.

    Without a branch: which way it goes would have to be guessed anew for every code.
    """
    return byte + ((_WORD_BITS - 1 - bits) >> 3), word | word_at(plain, byte) >> np.uint64(bits), bits | 56


@kernel
def peek32(plain: NDArray[np.uint8], position: int) -> int:
    """The 32 bits from bit `position` on; reads 8 bytes."""
    return signed((word_at(plain, position >> 3) << np.uint64(position & 7)) >> np.uint64(32))


@kernel
def find_code(window: int, tables: HuffmanTables, table: int) -> int:
    """`length << 8 | symbol` of the code that the 16 bits of `window` start with; 0 when there is none."""
    found = signed(tables.look[table, window >> (MAX_CODE_BITS - LOOK_BITS)])  # no rows: a view of one costs more
    if found:
        return found
    for bits in range(LOOK_BITS + 1, MAX_CODE_BITS + 1):
        if window < tables.limit[table, bits]:
            place = (window >> (MAX_CODE_BITS - bits)) + tables.delta[table, bits]
            return bits << 8 | signed(tables.symbols[table, place & 255])
    return 0


@kernel
def extend(raw: int, size: int) -> int:
    """The number that `size` raw bits stand for (T.81 F.2.2.1); 0 for none."""
    return raw if raw >= 1 << size >> 1 else raw - (1 << size) + 1


@kernel
def bit_size(value: int) -> int:
    """Bits of the magnitude of `value`: the size that its code names."""
    magnitude, size = abs(value), 0
    while magnitude:
        magnitude >>= 1
        size += 1
    return size


@kernel
def put(
    target: NDArray[np.uint8], filled: int, pending: int, pending_bits: int, value: int, bits: int
) -> tuple[int, int, int]:
    """Append the lowest `bits` of `value`, at most 32, to a bit stream; returns its new (filled, pending, pending_bits).

    `pending_bits`, below 32, wait in `pending`; whole words go to `target`, with a 0 behind every 0xFF byte.
    """
    pending = pending << bits | value
    pending_bits += bits
    if pending_bits >= 32:
        pending_bits -= 32
        word = (pending >> pending_bits) & 0xFFFFFFFF
        absent = ~word & 0xFFFFFFFF
        at = np.uint64(filled)
        if (absent - 0x01010101) & ~absent & 0x80808080:  # some byte is 0xFF
            for shift in (24, 16, 8, 0):
                filled = put_byte(target, filled, (word >> shift) & 0xFF)
        else:
            target[at] = word >> 24
            target[at + np.uint64(1)] = word >> 16 & 0xFF
            target[at + np.uint64(2)] = word >> 8 & 0xFF
            target[at + np.uint64(3)] = word & 0xFF
            filled += 4
    return filled, pending & 0xFFFFFFFF, pending_bits


@kernel
def put_byte(target: NDArray[np.uint8], filled: int, byte: int) -> int:
    target[filled] = byte
    filled += 1
    if byte == 0xFF:
        target[filled] = 0
        filled += 1
    return filled


@kernel
def end_segment(target: NDArray[np.uint8], filled: int, pending: int, pending_bits: int, marker: int) -> int:
    """Fill the last byte with ones (T.81 F.1.2.3) and append a marker; returns the bytes that `target` then has."""
    while pending_bits >= 8:
        pending_bits -= 8
        filled = put_byte(target, filled, (pending >> pending_bits) & 0xFF)
    if pending_bits:
        last = (pending << (8 - pending_bits)) | ((1 << (8 - pending_bits)) - 1)
        filled = put_byte(target, filled, last & 0xFF)
    target[filled], target[filled + 1] = 0xFF, marker
    return filled + 2


@kernel
def copy_bits(
    plain: NDArray[np.uint8],
    position: int,
    stop: int,
    target: NDArray[np.uint8],
    filled: int,
    pending: int,
    pending_bits: int,
) -> tuple[int, int, int]:
    """Append bits `position` to `stop` of `plain` to a bit stream; see `put`. Writes up to a byte more than that."""
    while pending_bits >= 8:
        pending_bits -= 8
        filled = put_byte(target, filled, (pending >> pending_bits) & 0xFF)
    waiting = np.uint64(pending & ((1 << pending_bits) - 1))
    while stop - position >= 8 * _COPIED_BYTES:
        seven = (word_at(plain, position >> 3) << np.uint64(position & 7)) >> np.uint64(8)
        joined = waiting << np.uint64(8 * _COPIED_BYTES) | seven
        word = joined >> np.uint64(pending_bits)
        waiting = joined & np.uint64((1 << pending_bits) - 1)
        position += 8 * _COPIED_BYTES
        absent = ~signed(word)
        if (absent - 0x01010101010101) & ~absent & 0x80808080808080:  # some byte is 0xFF
            for shift in range(8 * (_COPIED_BYTES - 1), -1, -8):
                filled = put_byte(target, filled, (signed(word) >> shift) & 0xFF)
        else:
            word <<= np.uint64(8)
            for byte in range(8):  # becomes one store
                target[np.uint64(filled + byte)] = word >> np.uint64(56 - 8 * byte)
            filled += _COPIED_BYTES
    pending = signed(waiting)
    while stop - position >= 32:
        filled, pending, pending_bits = put(target, filled, pending, pending_bits, peek32(plain, position), 32)
        position += 32
    bits = stop - position
    if bits > 0:
        filled, pending, pending_bits = put(
            target, filled, pending, pending_bits, peek32(plain, position) >> (32 - bits), bits
        )
    return filled, pending, pending_bits
