"""The header of a JPEG of the most common kind, read by a kernel: sequential, Huffman-coded, 8 bits, one scan, grey or YCbCr."""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import inlined_kernel, kernel, signed

from .limits import HEADER_WORDS, LOOKED_UP_BITS, MAX_CODE_BITS, MOST_TABLES, TABLE_SYMBOLS

HEIGHT, WIDTH, COMPONENTS, HORIZONTAL, VERTICAL, INTERVAL, SCAN_START, FOUND_FRAME, FOUND_JFIF, ADOBE_TRANSFORM = range(
    10
)
"""Of a header, int64 [HEADER_WORDS]: size in pixels, components, sampling factors of the first (1 or 2, the others have 1 x 1), MCUs
between restart markers (0: there are none), where entropy-coded data start, and what was found on the way."""
IDENTIFIERS, QUANTIZATION, DC_TABLE, AC_TABLE = 12, 15, 18, 21
"""First of three words each, one a component."""
_QUANTIZATIONS_FOUND, _TABLES_FOUND = 24, 28

TOTAL_BITS, CODE_SHIFT, FREE_SHIFT, RUN_SHIFT = 31, 5, 10, 16
"""An entry of a look-up table says of the code that the next bits start with: in bits 0 to 4 how many it and its raw bits are, from
CODE_SHIFT on how many it is, from FREE_SHIFT on 64 less its raw bits, 0 if it has none, from RUN_SHIFT on the zeros before the value. 0 for
a longer code, or none."""
CODE_BITS, FREE_BITS = 31, 63
END_RUN, ZEROS_RUN, NO_CODE_RUN = 128, 256, 512
"""In place of the zeros: the end of the block, 16 zeros and no value, no code."""
_NO_TRANSFORM = -1


@kernel
def read_header(
    record: NDArray[np.uint8],
    zigzag: NDArray[np.uint8],
    header: NDArray[np.int64],
    quantization: NDArray[np.int16],
    look: NDArray[np.int32],
    limit: NDArray[np.int32],
    delta: NDArray[np.int32],
    symbols: NDArray[np.uint8],
) -> bool:
    """Fill `header` and the tables; False for a JPEG of another kind, or a damaged one.

    zigzag        [64]: the place of each coefficient in its block, row by row.
    quantization  [MOST_TABLES * 64], row by row.
    look, limit, delta, symbols  [2 * MOST_TABLES, 1 << LOOKED_UP_BITS, 17, 17 and 256]: DC tables, then AC tables; see `tables.HuffmanTables`.
    """
    for word in range(HEADER_WORDS):
        header[word] = 0
    header[ADOBE_TRANSFORM] = _NO_TRANSFORM
    position = 2
    if len(record) < 4 or record[0] != 0xFF or record[1] != 0xD8:
        return False
    while position + 4 <= len(record):
        if record[position] != 0xFF:
            return False
        marker = signed(record[position + 1])
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        start = position + 4
        stop = position + 2 + _two_bytes(record, position + 2)
        if marker < 0xC0 or 0xD0 <= marker < 0xDA or stop < start or stop > len(record):
            return False
        position = stop
        if marker == 0xC0 or marker == 0xC1:
            if not _read_frame(record, start, stop, header):
                return False
        elif marker == 0xC4:
            if not _read_tables(record, start, stop, header, look, limit, delta, symbols):
                return False
        elif marker == 0xDB:
            if not _read_quantization(record, start, stop, zigzag, header, quantization):
                return False
        elif marker == 0xDD:
            if stop - start != 2:
                return False
            header[INTERVAL] = _two_bytes(record, start)
        elif marker == 0xE0:
            is_jfif = (
                stop - start >= 14 and _two_bytes(record, start) == 0x4A46 and _two_bytes(record, start + 2) == 0x4946
            )
            if is_jfif and record[start + 4] == 0:
                header[FOUND_JFIF] = 1
        elif marker == 0xEE:
            if stop - start >= 12 and _two_bytes(record, start) == 0x4164 and _two_bytes(record, start + 2) == 0x6F62:
                header[ADOBE_TRANSFORM] = record[start + 11]
        elif marker == 0xDA:
            header[SCAN_START] = stop
            return _read_scan(record, start, stop, header)
        elif not (0xE0 <= marker < 0xF0 or marker == 0xFE):
            return False
    return False


@kernel
def _two_bytes(record: NDArray[np.uint8], position: int) -> int:
    return signed(record[position]) << 8 | signed(record[position + 1])


@kernel
def _read_frame(record: NDArray[np.uint8], start: int, stop: int, header: NDArray[np.int64]) -> bool:
    if header[FOUND_FRAME] or stop - start < 9 or record[start] != 8:
        return False
    components = signed(record[start + 5])
    if (components != 1 and components != 3) or stop - start != 6 + 3 * components:
        return False
    header[FOUND_FRAME], header[COMPONENTS] = 1, components
    header[HEIGHT], header[WIDTH] = _two_bytes(record, start + 1), _two_bytes(record, start + 3)
    for component in range(components):
        at = start + 6 + 3 * component
        factors = signed(record[at + 1])
        horizontal, vertical = factors >> 4, factors & 15
        header[IDENTIFIERS + component] = record[at]
        header[QUANTIZATION + component] = record[at + 2]
        if record[at + 2] >= MOST_TABLES or not (1 <= horizontal <= 2 and 1 <= vertical <= 2):
            return False
        if component > 0 and factors != 0x11:
            return False
        if component == 0:  # a scan of one component has no MCUs of several blocks
            header[HORIZONTAL] = horizontal if components == 3 else 1
            header[VERTICAL] = vertical if components == 3 else 1
    return bool(header[HEIGHT] > 0 and header[WIDTH] > 0)


@kernel
def _read_quantization(
    record: NDArray[np.uint8],
    start: int,
    stop: int,
    zigzag: NDArray[np.uint8],
    header: NDArray[np.int64],
    quantization: NDArray[np.int16],
) -> bool:
    while start < stop:
        table, is_wide = signed(record[start]) & 15, signed(record[start]) >> 4
        if table >= MOST_TABLES or is_wide > 1 or start + 1 + 64 * (1 + is_wide) > stop:
            return False
        for number in range(64):
            at = start + 1 + number * (1 + is_wide)
            quantization[64 * table + signed(zigzag[number])] = (
                _two_bytes(record, at) if is_wide else signed(record[at])
            )
        header[_QUANTIZATIONS_FOUND + table] = 1
        start += 1 + 64 * (1 + is_wide)
    return True


@kernel
def _read_tables(
    record: NDArray[np.uint8],
    start: int,
    stop: int,
    header: NDArray[np.int64],
    look: NDArray[np.int32],
    limit: NDArray[np.int32],
    delta: NDArray[np.int32],
    symbols: NDArray[np.uint8],
) -> bool:
    while start < stop:
        kind, place = signed(record[start]) >> 4, signed(record[start]) & 15
        if kind > 1 or place >= MOST_TABLES or start + 17 > stop:
            return False
        table, number, next_code = MOST_TABLES * kind + place, 0, 0
        values = start + 17
        for entry in range(1 << LOOKED_UP_BITS):
            look[table, entry] = 0
        for bits in range(1, MAX_CODE_BITS + 1):
            delta[table, bits] = number - next_code
            for _ in range(signed(record[start + bits])):
                if number >= TABLE_SYMBOLS or values + number >= stop or next_code >= 1 << bits:
                    return False
                symbol = signed(record[values + number])
                symbols[table, number] = symbol
                if kind == 0 and symbol > 15:
                    return False
                if bits <= LOOKED_UP_BITS:
                    entry, free_bits = pack_entry(table, bits, symbol), LOOKED_UP_BITS - bits
                    for rest in range(1 << free_bits):
                        look[table, (next_code << free_bits) + rest] = entry
                next_code += 1
                number += 1
            limit[table, bits] = next_code << (MAX_CODE_BITS - bits)
            next_code <<= 1
        header[_TABLES_FOUND + table] = 1
        start = values + number
    return True


@inlined_kernel
def pack_entry(table: int, bits: int, symbol: int) -> int:
    """The entry of a code of so many bits in this table."""
    run, size = symbol >> 4, symbol & 15
    if table >= MOST_TABLES and size == 0:
        run = ZEROS_RUN if run == 15 else END_RUN
    return bits + size | bits << CODE_SHIFT | (-size & FREE_BITS) << FREE_SHIFT | run << RUN_SHIFT


@kernel
def _read_scan(record: NDArray[np.uint8], start: int, stop: int, header: NDArray[np.int64]) -> bool:
    """Whether it is the only scan, and all that it needs is there."""
    components = header[COMPONENTS]
    if not header[FOUND_FRAME] or stop - start != 4 + 2 * components or record[start] != components:
        return False
    for component in range(components):
        at = start + 1 + 2 * component
        dc_table, ac_table = signed(record[at + 1]) >> 4, signed(record[at + 1]) & 15
        if record[at] != header[IDENTIFIERS + component] or dc_table >= MOST_TABLES or ac_table >= MOST_TABLES:
            return False
        header[DC_TABLE + component], header[AC_TABLE + component] = dc_table, MOST_TABLES + ac_table
        if not (header[_TABLES_FOUND + dc_table] and header[_TABLES_FOUND + MOST_TABLES + ac_table]):
            return False
        if not header[_QUANTIZATIONS_FOUND + header[QUANTIZATION + component]]:
            return False
    at = start + 1 + 2 * components
    if record[at] != 0 or record[at + 1] != 63 or record[at + 2] != 0:
        return False
    if components == 1 or header[FOUND_JFIF]:
        return True
    if header[ADOBE_TRANSFORM] != _NO_TRANSFORM:
        return bool(header[ADOBE_TRANSFORM] == 1)
    return bool(header[IDENTIFIERS] == 1 and header[IDENTIFIERS + 1] == 2 and header[IDENTIFIERS + 2] == 3)
