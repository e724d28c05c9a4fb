"""The kernel of `window`: from a JPEG to the pixels of a window of it.

Blocks in front of the window, and beside it, are walked over; those of the window, and one more on every side, from which chroma is
interpolated, become samples; nothing behind the window is looked at. A row of MCUs becomes pixels as soon as the one below it is there:
samples are kept of two rows, which stay in the level 2 cache.
"""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import inlined_kernel, kernel, signed

from .bits import INVALID, copy_bytes, fill_word, unstuff
from .header import BLOCK_PIXELS
from .limits import BAND_ROWS, BLOCK_COEFFICIENTS, LOOKED_UP_BITS, MAX_CODE_BITS, VECTOR_PIXELS
from .vectors import interpolate, to_rgb, to_samples
from .window_header import (
    AC_TABLE,
    CODE_BITS,
    CODE_SHIFT,
    COMPONENTS,
    DC_TABLE,
    END_RUN,
    FREE_BITS,
    FREE_SHIFT,
    HEIGHT,
    HORIZONTAL,
    INTERVAL,
    NO_CODE_RUN,
    QUANTIZATION,
    RUN_SHIFT,
    SCAN_START,
    TOTAL_BITS,
    VERTICAL,
    WIDTH,
    ZEROS_RUN,
    pack_entry,
    read_header,
)

_MARGIN_SAMPLES = 1
"""Chroma samples on every side of a window that its pixels depend on."""
_NOT_INTERPOLATED = 4
"""Pixels of a row of which two chroma samples or fewer are interpolated in no way."""
_WORD_BITS = 64
_COMPONENT, _DC_TABLE, _AC_TABLE, _FACTORS, _PLACE, _RIGHT_BYTES, _DOWN_BYTES, _ROW_BYTES = range(8)
"""Of a block of an MCU in a plan, int64 [MCU_BLOCKS, BLOCK_WORDS]: its component, tables, where its quantisation factors are, where
its samples go in the first MCU of the planes, how far from there in the next one and the one below, and bytes of a row of them."""
_NO_COLOUR = 128


@kernel
def decode_window(
    record: NDArray[np.uint8],
    window: NDArray[np.int64],
    zigzag: NDArray[np.uint8],
    header: NDArray[np.int64],
    quantization: NDArray[np.int16],
    look: NDArray[np.int32],
    limit: NDArray[np.int32],
    delta: NDArray[np.int32],
    symbols: NDArray[np.uint8],
    plain: NDArray[np.uint8],
    segments: NDArray[np.int64],
    block: NDArray[np.int16],
    plan: NDArray[np.int64],
    dc: NDArray[np.int64],
    planes: NDArray[np.uint8],
    columns: NDArray[np.uint16],
    rows: NDArray[np.uint8],
    pixels: NDArray[np.uint8],
) -> bool:
    """Fill `pixels`, as `window.WindowDecoder.decode` says; False: some other decoder must do it.

    The other arrays are those of `window.WindowDecoder`: constants, and memory to work in.
    """
    if not read_header(record, zigzag, header, quantization, look, limit, delta, symbols):
        return False
    top, left, height, width = window
    if top < 0 or left < 0 or height < 1 or width < 1:
        return False
    if top + height > header[HEIGHT] or left + width > header[WIDTH]:
        return False
    length = len(record)
    if record[length - 2] != 0xFF or record[length - 1] != 0xD9:
        return False
    filled, num_segments = unstuff(record, header[SCAN_START], length - 2, plain, segments)
    mcu_height, mcu_width = BLOCK_PIXELS * header[VERTICAL], BLOCK_PIXELS * header[HORIZONTAL]
    mcu_columns = (header[WIDTH] + mcu_width - 1) // mcu_width
    mcu_rows = (header[HEIGHT] + mcu_height - 1) // mcu_height
    interval = header[INTERVAL] if header[INTERVAL] > 0 else mcu_columns * mcu_rows
    if num_segments != (mcu_columns * mcu_rows + interval - 1) // interval:
        return False
    first_row = max(top - _MARGIN_SAMPLES * header[VERTICAL], 0) // mcu_height
    stop_row = min((top + height + _MARGIN_SAMPLES * header[VERTICAL] - 1) // mcu_height + 1, mcu_rows)
    first_column = max(left - _MARGIN_SAMPLES * header[HORIZONTAL], 0) // mcu_width
    stop_column = min((left + width + _MARGIN_SAMPLES * header[HORIZONTAL] - 1) // mcu_width + 1, mcu_columns)
    row_bytes = (stop_column - first_column) * mcu_width
    plane_bytes = BAND_ROWS * mcu_height * row_bytes
    needed_bytes = plane_bytes + 2 * (plane_bytes // (header[VERTICAL] * header[HORIZONTAL]))
    if needed_bytes + VECTOR_PIXELS > len(planes):
        return False
    if header[COMPONENTS] > 1 and header[HORIZONTAL] == 2 and header[WIDTH] <= _NOT_INTERPOLATED:
        return False
    num_blocks = _plan_blocks(header, row_bytes, plane_bytes, plan)
    for sample in range(len(rows)):
        rows[sample] = _NO_COLOUR
    mcu = (first_row * mcu_columns + first_column) // interval * interval
    byte, end, word, bits = signed(0), signed(0), np.uint64(0), signed(0)
    painted = top
    for row in range(mcu // mcu_columns, stop_row):
        row_start = row * mcu_columns
        row_stop = row_start + (mcu_columns if row < stop_row - 1 else stop_column)
        while mcu < row_stop:
            segment = mcu // interval
            if mcu == segment * interval:
                byte, word, bits = segments[segment], np.uint64(0), signed(0)
                end = segments[segment + 1] if segment + 1 < num_segments else filled
                for component in range(len(dc)):
                    dc[component] = 0
            stop = min((segment + 1) * interval, row_stop)
            byte, word, bits = _decode_mcus(
                plain, byte, end, word, bits, mcu - row_start, stop - row_start, row, first_column,
                stop_column if row >= first_row else first_column, zigzag, quantization, look, limit, delta, symbols,
                block, planes, plan, num_blocks, dc,
            )  # fmt: skip
            if byte < 0:
                return False
            mcu = stop
        if row >= first_row:
            stop = min((row + 1) * mcu_height - (header[VERTICAL] - 1), top + height)
            if row == stop_row - 1:
                stop = top + height
            _paint(window, header, painted, stop, first_column, row_bytes, plane_bytes, planes, columns, rows, pixels)
            painted = max(painted, stop)
    return True


@kernel
def _plan_blocks(header: NDArray[np.int64], row_bytes: int, plane_bytes: int, plan: NDArray[np.int64]) -> int:
    """What the blocks of an MCU are, and where their samples go: fills `plan`, returns how many they are."""
    horizontal, vertical, count = header[HORIZONTAL], header[VERTICAL], 0
    for component in range(header[COMPONENTS]):
        high, wide, step, start = vertical, horizontal, row_bytes, 0
        if component > 0:
            high, wide, step = 1, 1, row_bytes // horizontal
            start = plane_bytes + (component - 1) * (plane_bytes // (horizontal * vertical))
        for number in range(high * wide):
            plan[count, _COMPONENT] = component
            plan[count, _DC_TABLE], plan[count, _AC_TABLE] = header[DC_TABLE + component], header[AC_TABLE + component]
            plan[count, _FACTORS] = BLOCK_COEFFICIENTS * header[QUANTIZATION + component]
            plan[count, _PLACE] = start + BLOCK_PIXELS * (number // wide * step + number % wide)
            plan[count, _RIGHT_BYTES], plan[count, _DOWN_BYTES] = BLOCK_PIXELS * wide, BLOCK_PIXELS * high * step
            plan[count, _ROW_BYTES] = step
            count += 1
    return count


@kernel
def _decode_mcus(
    plain: NDArray[np.uint8],
    byte: int,
    end: int,
    word: np.uint64,
    bits: int,
    column: int,
    stop: int,
    row: int,
    first_column: int,
    stop_column: int,
    zigzag: NDArray[np.uint8],
    quantization: NDArray[np.int16],
    look: NDArray[np.int32],
    limit: NDArray[np.int32],
    delta: NDArray[np.int32],
    symbols: NDArray[np.uint8],
    block: NDArray[np.int16],
    planes: NDArray[np.uint8],
    plan: NDArray[np.int64],
    num_blocks: int,
    dc: NDArray[np.int64],
) -> tuple[int, np.uint64, int]:
    """Read MCUs `column` to `stop` of a row; those from `first_column` to `stop_column` become samples.

    Returns where the bits behind them are, as `_decode_block` does; INVALID for the byte where they are damaged. The restart segment
    that they are in lies in `plain` up to `end`, and there is padding behind `plain`.
    """
    for each in range(column, stop):
        is_seen = first_column <= each < stop_column
        for number in range(num_blocks):
            byte, word, bits, difference, is_block = _decode_block(
                plain, byte, word, bits, plan[number, _DC_TABLE], plan[number, _AC_TABLE], is_seen, zigzag, look, limit,
                delta, symbols, block,
            )  # fmt: skip
            if not is_block or 8 * byte - bits > 8 * end:
                return INVALID, word, bits
            component = plan[number, _COMPONENT]
            dc[component] += difference
            if is_seen:
                block[0] = dc[component]
                place = plan[number, _PLACE] + row % BAND_ROWS * plan[number, _DOWN_BYTES]
                place += (each - first_column) * plan[number, _RIGHT_BYTES]
                to_samples(block, quantization, plan[number, _FACTORS], planes, place, plan[number, _ROW_BYTES])
    return byte, word, bits


@inlined_kernel
def _decode_block(
    plain: NDArray[np.uint8],
    byte: int,
    word: np.uint64,
    bits: int,
    dc_table: int,
    ac_table: int,
    is_seen: bool,
    zigzag: NDArray[np.uint8],
    look: NDArray[np.int32],
    limit: NDArray[np.int32],
    delta: NDArray[np.int32],
    symbols: NDArray[np.uint8],
    block: NDArray[np.int16],
) -> tuple[int, np.uint64, int, int, bool]:
    """Read a block; returns where the bits behind it are, (byte, word, bits), its DC difference, and whether it is one.

    The next `bits` bits are the highest of `word`, what follows is in `plain` from `byte` on. Of a block that is seen, the AC
    coefficients go into `block`, which is 0 before.
    """
    byte, word, bits = fill_word(plain, byte, word, bits)
    entry = _entry(word, dc_table, look, limit, delta, symbols)
    difference = _raw_value(word, entry) if (entry >> FREE_SHIFT) & FREE_BITS else 0
    word, bits = _behind(word, bits, entry)
    done = 1 + (entry >> RUN_SHIFT)
    while done < BLOCK_COEFFICIENTS:
        byte, word, bits = fill_word(plain, byte, word, bits)
        entry = _entry(word, ac_table, look, limit, delta, symbols)
        done += entry >> RUN_SHIFT
        if done < BLOCK_COEFFICIENTS:
            if is_seen:
                block[np.uint64(zigzag[np.uint64(done)])] = _raw_value(word, entry)
            done += 1
        elif ZEROS_RUN <= done < NO_CODE_RUN:
            done += 16 - ZEROS_RUN
        elif done < END_RUN:  # a value behind the last coefficient
            done = NO_CODE_RUN
        word, bits = _behind(word, bits, entry)
    return byte, word, bits, difference, done == BLOCK_COEFFICIENTS or END_RUN < done < ZEROS_RUN


@inlined_kernel
def _behind(word: np.uint64, bits: int, entry: int) -> tuple[np.uint64, int]:
    return word << np.uint64(entry & TOTAL_BITS), bits - (entry & TOTAL_BITS)


@inlined_kernel
def _entry(
    word: np.uint64,
    table: int,
    look: NDArray[np.int32],
    limit: NDArray[np.int32],
    delta: NDArray[np.int32],
    symbols: NDArray[np.uint8],
) -> int:
    """Of the code at the start of `word`, also of a long one, or none."""
    entry = signed(look[np.uint64(table), word >> np.uint64(_WORD_BITS - LOOKED_UP_BITS)])
    if entry == 0:
        entry = _long_entry(signed(word >> np.uint64(_WORD_BITS - MAX_CODE_BITS)), table, limit, delta, symbols)
    return entry


@inlined_kernel
def _raw_value(word: np.uint64, entry: int) -> int:
    """The number that the raw bits behind the code at the start of `word` stand for (T.81 F.2.2.1)."""
    from_raw = word << np.uint64((entry >> CODE_SHIFT) & CODE_BITS)
    sign = ~(signed(from_raw) >> (_WORD_BITS - 1))  # -1 or 0
    magnitude = signed((from_raw ^ np.uint64(sign)) >> np.uint64((entry >> FREE_SHIFT) & FREE_BITS))
    return (magnitude ^ sign) - sign


@kernel
def _long_entry(
    window: int, table: int, limit: NDArray[np.int32], delta: NDArray[np.int32], symbols: NDArray[np.uint8]
) -> int:
    for bits in range(LOOKED_UP_BITS + 1, MAX_CODE_BITS + 1):
        if window < limit[table, bits]:
            place = (window >> (MAX_CODE_BITS - bits)) + delta[table, bits]
            return pack_entry(table, bits, signed(symbols[table, place & 255]))
    return NO_CODE_RUN << RUN_SHIFT


@kernel
def _paint(
    window: NDArray[np.int64],
    header: NDArray[np.int64],
    start: int,
    stop: int,
    first_column: int,
    row_bytes: int,
    plane_bytes: int,
    planes: NDArray[np.uint8],
    columns: NDArray[np.uint16],
    rows: NDArray[np.uint8],
    pixels: NDArray[np.uint8],
) -> None:
    """Rows `start` to `stop` of the image, as far as the window has them, from the samples in the planes, which begin with this
    column of MCUs."""
    top, left, _, width = window
    horizontal, vertical = header[HORIZONTAL], header[VERTICAL]
    plane_left, band_height = first_column * BLOCK_PIXELS * horizontal, BAND_ROWS * BLOCK_PIXELS * vertical
    red_at = len(rows) // 2
    for y in range(start, stop):
        if header[COMPONENTS] > 1:
            near, far = y // vertical, y // vertical
            if vertical == 2:
                last = (header[HEIGHT] - 1) // 2
                far = min(near + 1, last) if y & 1 else max(near - 1, 0)
            near_at = plane_bytes + near % (band_height // vertical) * (row_bytes // horizontal)
            far_at = plane_bytes + far % (band_height // vertical) * (row_bytes // horizontal)
            chroma_bytes = plane_bytes // (horizontal * vertical)
            for colour in range(2):
                if horizontal == 2:
                    _blend_columns(planes, near_at, far_at, row_bytes // 2, columns)
                    last_column = min(row_bytes // 2, (header[WIDTH] + 1) // 2 - plane_left // 2)
                    columns[0], columns[last_column + 1] = columns[1], columns[last_column]
                    even_bias, odd_bias = (8, 7) if vertical == 2 else (4, 8)
                    for column in range(0, row_bytes // 2, VECTOR_PIXELS):
                        interpolate(columns, 1 + column, even_bias, odd_bias, rows, colour * red_at + 2 * column)
                else:
                    bias = 1 + (y & 1) if vertical == 2 else 0
                    _blend_rows(planes, near_at, far_at, row_bytes, bias, rows, colour * red_at)
                near_at += chroma_bytes
                far_at += chroma_bytes
        luma_at = y % band_height * row_bytes + left - plane_left
        for x in range(0, width, VECTOR_PIXELS):
            chroma_at = left - plane_left + x
            to_rgb(planes, luma_at + x, rows, chroma_at, red_at + chroma_at, pixels, 3 * ((y - top) * width + x))


@kernel
def _blend_columns(
    planes: NDArray[np.uint8], near_at: int, far_at: int, count: int, columns: NDArray[np.uint16]
) -> None:
    for column in range(count):
        near, far = planes[np.uint64(near_at + column)], planes[np.uint64(far_at + column)]
        columns[np.uint64(1 + column)] = 3 * np.uint16(near) + np.uint16(far)


@kernel
def _blend_rows(
    planes: NDArray[np.uint8],
    near_at: int,
    far_at: int,
    count: int,
    bias: int,
    rows: NDArray[np.uint8],
    to: int,
) -> None:
    if bias == 0:
        copy_bytes(planes, near_at, near_at + count, rows, to)
        return
    for column in range(count):
        near, far = planes[np.uint64(near_at + column)], planes[np.uint64(far_at + column)]
        rows[np.uint64(to + column)] = (3 * np.uint16(near) + np.uint16(far) + bias) >> 2
