"""The kernel of `restart`: a scan copied bit by bit, with restart markers."""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import inlined_kernel, kernel, signed

from .bits import INVALID, bit_size, copy_bits, end_segment, extend, fill_word, find_code, put, unstuff
from .huffman import fill_tables
from .limits import BLOCK_COEFFICIENTS, DC_SIZES, LOOK_BITS, MAX_CODE_BITS
from .tables import HuffmanTables

BAD_DEFINITION = 0
"""Instead of a number of bytes: a Huffman table is no prefix code."""

_STEP_BITS, _STEP_SHIFT = 31, 5
"""Of a step over AC codes: in bits 0 to 4 how many bits it takes, raw bits too, above them the coefficients it moves on by."""
_ENDS, _NO_STEP = 64, 128
"""Added to the coefficients: it ends with the end of the block. Instead of them: one code must be looked at alone."""
_WINDOW_SHIFT, _CODE_SHIFT = 64 - LOOK_BITS, 64 - MAX_CODE_BITS
_SOURCE, _TARGET = 0, 1
"""Of `dc`: the DC values of the components as they were read, and as they were written."""


@kernel
def copy_with_restarts(
    source: NDArray[np.uint8],
    start: int,
    stop: int,
    source_interval: int,
    interval: int,
    mcu_columns: int,
    mcu_rows: int,
    blocks: NDArray[np.int64],
    definitions: NDArray[np.uint8],
    num_ac: int,
    look: NDArray[np.int32],
    limit: NDArray[np.int32],
    delta: NDArray[np.int32],
    symbols: NDArray[np.int32],
    code: NDArray[np.int32],
    length: NDArray[np.int32],
    steps: NDArray[np.uint16],
    dc: NDArray[np.int64],
    plain: NDArray[np.uint8],
    segments: NDArray[np.int64],
    target: NDArray[np.uint8],
    piece_ends: NDArray[np.uint32],
) -> int:
    """Copy a scan of all components to `target` from `piece_ends[0]` on, with a restart marker every `interval` MCUs.

    blocks       of an MCU, as `restart` plans them; their tables are among `definitions`, of which the first `num_ac` are for AC codes.
    look to dc   memory to work in, as are `plain` and `segments`; see `restart`, and `bits.unstuff`.
    piece_ends   [1 + mcu_rows]: where each row of MCUs ends in `target`, the first is given.

    Only DC codes whose prediction changes are written anew, by tables with codes for all sizes. All between them is copied bit by bit
    without a look at its values. Returns the bytes that `target` then has, INVALID when the scan is damaged, or BAD_DEFINITION.
    """
    tables = HuffmanTables(look, limit, delta, symbols, code, length)
    if not fill_tables(definitions, tables):
        return BAD_DEFINITION
    for table in range(num_ac):
        for window in range(1 << LOOK_BITS):
            steps[table, window] = _step_over(look, table, window)
    mcus = mcu_columns * mcu_rows
    plain_bytes, num_segments = unstuff(source, start, stop, plain, segments)
    if num_segments * source_interval < mcus:
        return INVALID
    dc[:] = 0
    filled, pending, pending_bits = signed(piece_ends[0]), 0, 0
    segment = 0
    segment_end = 8 * (segments[1] if num_segments > 1 else plain_bytes)
    byte, word, bits = signed(0), np.uint64(0), signed(0)
    copied = 0  # bits of `plain` that are in `target`
    until_source_restart, until_restart = source_interval, interval
    column, row, marker = 0, 0, 0
    for _ in range(mcus):
        position = 8 * byte - bits
        if until_source_restart == 0:
            filled, pending, pending_bits = copy_bits(plain, copied, position, target, filled, pending, pending_bits)
            segment += 1
            byte, word, bits = segments[segment], np.uint64(0), signed(0)
            position = copied = 8 * byte
            segment_end = 8 * (segments[segment + 1] if segment + 1 < num_segments else plain_bytes)
            dc[_SOURCE] = 0
            until_source_restart = source_interval
        if until_restart == 0:
            filled, pending, pending_bits = copy_bits(plain, copied, position, target, filled, pending, pending_bits)
            copied = position
            filled = end_segment(target, filled, pending, pending_bits, 0xD0 + marker)
            pending = pending_bits = 0
            marker = (marker + 1) & 7
            dc[_TARGET] = 0
            until_restart = interval
            if column == mcu_columns:
                column = 0
                row += 1
                piece_ends[row] = filled
        until_source_restart -= 1
        until_restart -= 1
        column += 1
        for block in range(len(blocks)):
            component, ac_table, dc_table, new_dc_table = blocks[block]
            byte, word, bits = fill_word(plain, byte, word, bits)
            found = find_code(signed(word >> np.uint64(_CODE_SHIFT)), tables, dc_table)
            code_bits, size = found >> 8, found & 0xFF
            if code_bits == 0 or size >= DC_SIZES:
                return INVALID
            position = 8 * byte - bits
            raw = signed((word << np.uint64(code_bits)) >> np.uint64(1) >> np.uint64(63 - size))
            change = extend(raw, size)
            word, bits = word << np.uint64(code_bits + size), bits - code_bits - size
            dc[_SOURCE, component] += change
            new_change = dc[_SOURCE, component] - dc[_TARGET, component]
            dc[_TARGET, component] = dc[_SOURCE, component]
            if new_change != change:
                filled, pending, pending_bits = copy_bits(
                    plain, copied, position, target, filled, pending, pending_bits
                )
                size = bit_size(new_change)
                if size >= DC_SIZES:
                    return INVALID
                raw = new_change if new_change >= 0 else new_change + (1 << size) - 1
                new_code = signed(code[new_dc_table, size]) << size
                new_bits = signed(length[new_dc_table, size]) + size
                filled, pending, pending_bits = put(target, filled, pending, pending_bits, new_code | raw, new_bits)
                copied = 8 * byte - bits
            byte, word, bits = _skip_ac(plain, byte, word, bits, steps, tables, ac_table)
            if byte == INVALID or 8 * byte - bits > segment_end:
                return INVALID
    filled, pending, pending_bits = copy_bits(plain, copied, 8 * byte - bits, target, filled, pending, pending_bits)
    filled = end_segment(target, filled, pending, pending_bits, 0xD9)
    piece_ends[mcu_rows] = filled
    return filled


@inlined_kernel
def _skip_ac(
    plain: NDArray[np.uint8],
    byte: int,
    word: np.uint64,
    bits: int,
    steps: NDArray[np.uint16],
    tables: HuffmanTables,
    table: int,
) -> tuple[int, np.uint64, int]:
    """(byte, word, bits), see `bits.fill_word`, behind the AC codes of a block; INVALID for the byte when they are no valid codes."""
    done = 1
    while True:
        byte, word, bits = fill_word(plain, byte, word, bits)  # enough for two steps
        step = _next_step(word, steps, table)
        if done + (step >> _STEP_SHIFT) < BLOCK_COEFFICIENTS:
            word, bits, done = _behind_step(step, word, bits, done)
            step = _next_step(word, steps, table)
            if done + (step >> _STEP_SHIFT) < BLOCK_COEFFICIENTS:
                word, bits, done = _behind_step(step, word, bits, done)
                continue
        moved = step >> _STEP_SHIFT
        if _ENDS <= moved < _NO_STEP and done + moved - _ENDS < BLOCK_COEFFICIENTS:
            return byte, word << np.uint64(step & _STEP_BITS), bits - (step & _STEP_BITS)
        byte, word, bits = fill_word(plain, byte, word, bits)
        found = find_code(signed(word >> np.uint64(_CODE_SHIFT)), tables, table)
        run, size = (found >> 4) & 15, found & 15
        if found == 0 or (size == 0 and 0 < run < 15):
            return INVALID, word, bits
        word, bits = word << np.uint64((found >> 8) + size), bits - (found >> 8) - size
        if run == 0 and size == 0:
            return byte, word, bits
        done += run + 1
        if done >= BLOCK_COEFFICIENTS:
            return byte if done == BLOCK_COEFFICIENTS else INVALID, word, bits


@inlined_kernel
def _next_step(word: np.uint64, steps: NDArray[np.uint16], table: int) -> int:
    return signed(steps[np.uint64(table), word >> np.uint64(_WINDOW_SHIFT)])


@inlined_kernel
def _behind_step(step: int, word: np.uint64, bits: int, done: int) -> tuple[np.uint64, int, int]:
    return word << np.uint64(step & _STEP_BITS), bits - (step & _STEP_BITS), done + (step >> _STEP_SHIFT)


@kernel
def _step_over(look: NDArray[np.int32], table: int, window: int) -> int:
    """The step over all codes that lie in the LOOK_BITS bits of `window`; raw bits of the last may lie behind it."""
    used = moved = ends = 0
    while used < LOOK_BITS and not ends:
        found = signed(look[table, (window << used) & ((1 << LOOK_BITS) - 1)])
        code_bits, run, size = found >> 8, (found >> 4) & 15, found & 15
        is_end = run == 0 and size == 0
        if code_bits == 0 or code_bits > LOOK_BITS - used or (size == 0 and 0 < run < 15):
            break
        if not is_end and moved + run + 1 >= _ENDS:
            break
        used += code_bits + size
        moved += 0 if is_end else run + 1
        ends = 1 if is_end else 0
    return used | (moved + _ENDS * ends) << _STEP_SHIFT if used else _NO_STEP << _STEP_SHIFT
