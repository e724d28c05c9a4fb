"""Any Huffman-coded JPEG as its quantised coefficients, and those as one sequential scan (ITU-T T.81 annexes F and G).

For files that cannot be rewritten bit by bit: progressive ones, several scans, DC tables without room. The new Huffman
tables are optimal for the image.
"""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import kernel, signed

from .bits import INVALID, bit_size, end_segment, extend, find_code, peek32, put, unstuff
from .header import BLOCK_PIXELS, Frame, Scan, UnsupportedJpegError, damaged, sequential_header
from .huffman import optimal_table, stack_tables
from .limits import DC_SIZES, MAX_CODE_BITS, PADDING_BYTES
from .pieces import DAMAGED, SeekableJpeg, target_bytes
from .tables import HuffmanTables

_COEFFICIENTS = 64
_OUT_OF_RANGE = -2
_MAX_AC_SIZE = 10
_MOST_BLOCKS = 1 << 24
_NO_TABLE = bytes([1, *[0] * 15, 0])
"""Stands for a table that a scan does not use."""


def code_again(source: NDArray[np.uint8], frame: Frame, interval: int) -> SeekableJpeg:
    """The JPEG file `source` as one sequential scan with a restart marker every `interval` MCUs.

    Raises UnsupportedJpegError.
    """
    blocks = BlockGrid(frame)
    if blocks.first[-1] > _MOST_BLOCKS:
        raise UnsupportedJpegError("too large to be coded again")
    coefficients = decode_coefficients(source, frame, blocks)
    classes = np.array([min(number, 1) for number in range(len(frame.components))], np.int64)
    order = blocks.mcu_order()
    components = np.array(frame.mcu_components, np.int64)
    dc_frequency, ac_frequency = np.zeros((2, 257), np.int64), np.zeros((2, 257), np.int64)
    status = _count_symbols(coefficients, order, components, classes, interval, dc_frequency, ac_frequency)
    if status < 0:
        raise UnsupportedJpegError("its coefficients are beyond those of 8-bit samples")
    dc_tables, ac_tables = (
        [_optimal_definition(frequency[each]) for each in classes] for frequency in (dc_frequency, ac_frequency)
    )
    header = sequential_header(frame, dc_tables, ac_tables, interval)
    segments = frame.mcu_columns * frame.mcu_rows // interval
    # No code is longer than 16 bits and no coefficient takes more than a code and 11 raw bits.
    room = target_bytes(len(header), 4 * coefficients.size, segments)
    target = np.empty(room, np.uint8)
    target[: len(header)] = np.frombuffer(header, np.uint8)
    piece_ends = np.empty(1 + frame.mcu_rows, np.uint32)
    piece_ends[0] = len(header)
    nbytes = _encode(
        coefficients,
        order,
        components,
        interval,
        frame.mcu_columns,
        stack_tables(dc_tables),
        stack_tables(ac_tables),
        target,
        piece_ends,
    )
    return SeekableJpeg(target[:nbytes].copy(), piece_ends, BLOCK_PIXELS * frame.vertical)


class BlockGrid:
    """Where the blocks of each component lie in one array of all: row by row, padded to whole interleaved MCUs."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        single = len(frame.components) == 1
        self.factors = [(1, 1) if single else (each.vertical, each.horizontal) for each in frame.components]
        self.strides = [frame.mcu_columns * horizontal for _, horizontal in self.factors]
        counts = [
            stride * frame.mcu_rows * vertical for stride, (vertical, _) in zip(self.strides, self.factors, strict=True)
        ]
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def mcu_order(self, components: tuple[int, ...] | None = None) -> NDArray[np.int64]:
        """Number of each block, [MCUs, blocks in an MCU], as a scan of these components codes them (None: of all)."""
        frame = self._frame
        if components is not None and len(components) == 1:
            (number,) = components
            high, wide = frame.component_blocks(number)
            rows = self.first[number] + np.arange(high)[:, None] * self.strides[number]
            blocks: NDArray[np.int64] = (rows + np.arange(wide)).reshape(-1, 1)
            return blocks
        parts = []
        for number in components or range(len(frame.components)):
            vertical, horizontal = self.factors[number]
            rows = np.arange(frame.mcu_rows)[:, None] * vertical + np.arange(vertical)
            columns = np.arange(frame.mcu_columns)[:, None] * horizontal + np.arange(horizontal)
            places = self.first[number] + rows[:, None, :, None] * self.strides[number] + columns[None, :, None, :]
            parts.append(places.reshape(frame.mcu_rows * frame.mcu_columns, -1))
        return np.ascontiguousarray(np.concatenate(parts, axis=1))


def decode_coefficients(source: NDArray[np.uint8], frame: Frame, blocks: BlockGrid) -> NDArray[np.int16]:
    """The quantised coefficients of all blocks, [blocks, 64] in zigzag order. Raises UnsupportedJpegError.

    Blocks that only pad a component to whole MCUs may be coded or not; decoders do not show them.
    """
    coefficients = np.zeros((int(blocks.first[-1]), _COEFFICIENTS), np.int16)
    missing_bits = np.full((len(frame.components), _COEFFICIENTS), -1)  # of each coefficient; -1: all of them
    for scan in frame.scans:
        _note_progress(scan, frame.is_progressive, missing_bits)
        _decode_scan(source, scan, frame, blocks, coefficients)
    if missing_bits.any():
        raise UnsupportedJpegError("a progressive JPEG whose scans leave out coefficients or bits of them")
    return coefficients


def _note_progress(scan: Scan, progressive: bool, missing_bits: NDArray[np.int64]) -> None:
    """Refuse a scan that does not go on where earlier ones ended; decoders differ in what they make of such files."""
    (first, last), (high, low) = scan.spectral, scan.approximation
    if not progressive:
        first, last, high, low = 0, 63, 0, 0  # decoders ignore what a sequential scan says here
    elif (
        not first <= last < _COEFFICIENTS
        or (first == 0) != (last == 0)
        or low > 13
        or (first and len(scan.components) > 1)
    ):
        damaged("a scan of no valid band of coefficients")
    for component in scan.components:
        before = missing_bits[component, first : last + 1]
        if (before != (high if high else -1)).any() or (high and low != high - 1):
            damaged("its scans do not follow one another")
        missing_bits[component, first : last + 1] = low
        if first and missing_bits[component, 0] < 0:
            damaged("its scans do not follow one another")


def _decode_scan(
    source: NDArray[np.uint8], scan: Scan, frame: Frame, blocks: BlockGrid, coefficients: NDArray[np.int16]
) -> None:
    order = blocks.mcu_order(scan.components)
    if len(scan.components) == 1:
        components = np.zeros(1, np.int64)
    else:
        sizes = [blocks.factors[number][0] * blocks.factors[number][1] for number in scan.components]
        components = np.repeat(np.arange(len(sizes)), sizes)
    # DC refinement is raw bits, and what a sequential scan says of bands and bits does not count.
    needs_dc = not frame.is_progressive or (scan.spectral[0] == 0 and scan.approximation[0] == 0)
    needs_ac = scan.spectral[1] > 0 or not frame.is_progressive
    dc_tables = stack_tables([table if needs_dc else _NO_TABLE for table in scan.dc_tables])
    ac_tables = stack_tables([table if needs_ac else _NO_TABLE for table in scan.ac_tables])
    interval = scan.restart_interval or len(order)
    plain = np.empty(scan.stop - scan.start + PADDING_BYTES, np.uint8)
    segments = np.empty((len(order) - 1) // interval + 3, np.int64)
    plain_bytes, num_segments = unstuff(source, scan.start, scan.stop, plain, segments[:-1])
    if num_segments * interval < len(order):
        damaged(DAMAGED)
    segments[num_segments] = plain_bytes
    for segment in range(-(-len(order) // interval)):
        mcus = order[segment * interval : (segment + 1) * interval]
        first_bit, stop_bit = 8 * int(segments[segment]), 8 * int(segments[segment + 1])
        if not frame.is_progressive:
            end = _decode_sequential(plain, first_bit, stop_bit, mcus, components, dc_tables, ac_tables, coefficients)
        elif scan.spectral[0] == 0 and scan.approximation[0] == 0:
            low = scan.approximation[1]
            end = _decode_dc_first(plain, first_bit, stop_bit, mcus, components, dc_tables, low, coefficients)
        elif scan.spectral[0] == 0:
            end = _decode_dc_refinement(plain, first_bit, stop_bit, mcus, scan.approximation[1], coefficients)
        elif scan.approximation[0] == 0:
            end = _decode_ac_first(
                plain, first_bit, stop_bit, mcus, ac_tables, *scan.spectral, scan.approximation[1], coefficients
            )
        else:
            end = _decode_ac_refinement(
                plain, first_bit, stop_bit, mcus, ac_tables, *scan.spectral, scan.approximation[1], coefficients
            )
        if end < 0:
            damaged(DAMAGED)


@kernel
def _code_at(plain: NDArray[np.uint8], position: int, tables: HuffmanTables, table: int) -> int:
    return find_code(peek32(plain, position) >> 16, tables, table)


@kernel
def _bits_at(plain: NDArray[np.uint8], position: int, bits: int) -> int:
    return peek32(plain, position) >> (32 - bits) if bits else 0


@kernel
def _decode_sequential(
    plain: NDArray[np.uint8],
    position: int,
    stop: int,
    mcus: NDArray[np.int64],
    components: NDArray[np.int64],
    dc_tables: HuffmanTables,
    ac_tables: HuffmanTables,
    coefficients: NDArray[np.int16],
) -> int:
    """Decode one restart segment of a sequential scan from bit `position` on; returns where it ends, or INVALID."""
    prediction = np.zeros(4, np.int64)
    for mcu in range(len(mcus)):
        for place in range(len(components)):
            component, block = components[place], mcus[mcu, place]
            code = _code_at(plain, position, dc_tables, component)
            size = code & 0xFF
            if code == 0 or size >= DC_SIZES:
                return INVALID
            position += code >> 8
            if size:
                prediction[component] += extend(_bits_at(plain, position, size), size)
                position += size
            if abs(prediction[component]) > 32767:
                return INVALID
            coefficients[block, 0] = prediction[component]
            done = 1
            while done < 64:
                code = _code_at(plain, position, ac_tables, component)
                run, size = (code >> 4) & 15, code & 15
                if code == 0:
                    return INVALID
                position += code >> 8
                if size == 0:
                    if run == 0:
                        break
                    if run < 15:
                        return INVALID
                    done += 16
                    continue
                done += run
                if done > 63:
                    return INVALID
                coefficients[block, done] = extend(_bits_at(plain, position, size), size)
                position += size
                done += 1
            if done > 64 or position > stop:
                return INVALID
    return position


@kernel
def _decode_dc_first(
    plain: NDArray[np.uint8],
    position: int,
    stop: int,
    mcus: NDArray[np.int64],
    components: NDArray[np.int64],
    tables: HuffmanTables,
    low: int,
    coefficients: NDArray[np.int16],
) -> int:
    """One segment of the first DC scan, which leaves out `low` bits; returns where it ends, or INVALID."""
    prediction = np.zeros(4, np.int64)
    for mcu in range(len(mcus)):
        for place in range(len(components)):
            component = components[place]
            code = _code_at(plain, position, tables, component)
            size = code & 0xFF
            if code == 0 or size >= DC_SIZES:
                return INVALID
            position += code >> 8
            if size:
                prediction[component] += extend(_bits_at(plain, position, size), size)
                position += size
            if position > stop or abs(prediction[component] << low) > 32767:
                return INVALID
            coefficients[mcus[mcu, place], 0] = prediction[component] << low
    return position


@kernel
def _decode_dc_refinement(
    plain: NDArray[np.uint8],
    position: int,
    stop: int,
    mcus: NDArray[np.int64],
    low: int,
    coefficients: NDArray[np.int16],
) -> int:
    """One segment of a scan that adds bit `low` to each DC coefficient; returns where it ends, or INVALID."""
    for mcu in range(len(mcus)):
        for place in range(mcus.shape[1]):
            if position >= stop:
                return INVALID
            coefficients[mcus[mcu, place], 0] |= _bits_at(plain, position, 1) << low
            position += 1
    return position


@kernel
def _decode_ac_first(
    plain: NDArray[np.uint8],
    position: int,
    stop: int,
    mcus: NDArray[np.int64],
    tables: HuffmanTables,
    first: int,
    last: int,
    low: int,
    coefficients: NDArray[np.int16],
) -> int:
    """One segment of the first scan of a band of AC coefficients; returns where it ends, or INVALID."""
    blocks_to_skip = 0
    for mcu in range(len(mcus)):
        if blocks_to_skip:
            blocks_to_skip -= 1
            continue
        block, place = mcus[mcu, 0], first
        while place <= last:
            code = _code_at(plain, position, tables, 0)
            run, size = (code >> 4) & 15, code & 15
            if code == 0:
                return INVALID
            position += code >> 8
            if size == 0:
                if run < 15:  # the end of this band, and of that in as many blocks behind
                    blocks_to_skip = (1 << run) - 1 + _bits_at(plain, position, run)
                    position += run
                    break
                place += 16
                continue
            place += run
            value = extend(_bits_at(plain, position, size), size) << low
            if place > last or abs(value) > 32767:
                return INVALID
            coefficients[block, place] = value
            position += size
            place += 1
        if position > stop:
            return INVALID
    return INVALID if blocks_to_skip else position


@kernel
def _decode_ac_refinement(
    plain: NDArray[np.uint8],
    position: int,
    stop: int,
    mcus: NDArray[np.int64],
    tables: HuffmanTables,
    first: int,
    last: int,
    low: int,
    coefficients: NDArray[np.int16],
) -> int:
    """One segment of a scan that adds bit `low` to a band of AC coefficients (T.81 G.1.2.3); returns its end, or INVALID."""
    bit = 1 << low
    blocks_to_end = 0  # this block and so many more have no new coefficients in the rest of the band
    for mcu in range(len(mcus)):
        block, place = mcus[mcu, 0], first
        while blocks_to_end == 0 and place <= last:
            code = _code_at(plain, position, tables, 0)
            run, size = (code >> 4) & 15, code & 15
            if code == 0 or size > 1:
                return INVALID
            position += code >> 8
            value = 0
            if size:
                value = bit if _bits_at(plain, position, 1) else -bit
                position += 1
            elif run < 15:
                blocks_to_end = (1 << run) + _bits_at(plain, position, run)
                position += run
                break
            while place <= last:  # over `run` zero coefficients; those that are not zero get a bit on the way
                if coefficients[block, place]:
                    position = _refine(plain, position, coefficients, block, place, bit)
                elif run == 0:
                    break
                else:
                    run -= 1
                place += 1
            if value:
                if place > last:
                    return INVALID
                coefficients[block, place] = value
            place += 1
        if blocks_to_end:
            while place <= last:
                if coefficients[block, place]:
                    position = _refine(plain, position, coefficients, block, place, bit)
                place += 1
            blocks_to_end -= 1
        if position > stop:
            return INVALID
    return INVALID if blocks_to_end else position


@kernel
def _refine(
    plain: NDArray[np.uint8], position: int, coefficients: NDArray[np.int16], block: int, place: int, bit: int
) -> int:
    """Read the correction bit of a coefficient that is not zero; returns the position behind it."""
    value = signed(coefficients[block, place])
    if _bits_at(plain, position, 1):  # earlier scans left that bit out
        coefficients[block, place] = value + bit if value > 0 else value - bit
    return position + 1


@kernel
def _count_symbols(
    coefficients: NDArray[np.int16],
    order: NDArray[np.int64],
    components: NDArray[np.int64],
    classes: NDArray[np.int64],
    interval: int,
    dc_frequency: NDArray[np.int64],
    ac_frequency: NDArray[np.int64],
) -> int:
    """How often `_encode` will use each symbol, by table; _OUT_OF_RANGE when a coefficient has no symbol."""
    prediction = np.zeros(4, np.int64)
    for mcu in range(len(order)):
        if mcu % interval == 0:
            prediction[:] = 0
        for place in range(len(components)):
            component, block = components[place], order[mcu, place]
            table = classes[component]
            size = bit_size(signed(coefficients[block, 0]) - prediction[component])
            prediction[component] = coefficients[block, 0]
            if size >= DC_SIZES:
                return _OUT_OF_RANGE
            dc_frequency[table, size] += 1
            run = 0
            for each in range(1, 64):
                value = signed(coefficients[block, each])
                if value == 0:
                    run += 1
                    continue
                size = bit_size(value)
                if size > _MAX_AC_SIZE:
                    return _OUT_OF_RANGE
                ac_frequency[table, 0xF0] += run >> 4
                ac_frequency[table, (run & 15) << 4 | size] += 1
                run = 0
            if run:
                ac_frequency[table, 0] += 1
    return 0


def _optimal_definition(frequency: NDArray[np.int64]) -> bytes:
    """The optimal table for symbols of these frequencies, as a DHT segment has it."""
    counts, symbols = np.zeros(MAX_CODE_BITS + 1, np.int64), np.zeros(256, np.int64)
    number = optimal_table(frequency.copy(), counts, symbols)
    return bytes(counts[1:].tolist()) + bytes(symbols[:number].tolist())


@kernel
def _encode(
    coefficients: NDArray[np.int16],
    order: NDArray[np.int64],
    components: NDArray[np.int64],
    interval: int,
    mcu_columns: int,
    dc_tables: HuffmanTables,
    ac_tables: HuffmanTables,
    target: NDArray[np.uint8],
    piece_ends: NDArray[np.uint32],
) -> int:
    """Code all blocks to `target` from `piece_ends[0]` on; returns the bytes that it then has."""
    prediction = np.zeros(4, np.int64)
    filled, pending, pending_bits, marker, row = signed(piece_ends[0]), 0, 0, 0, 0
    for mcu in range(len(order)):
        if mcu and mcu % interval == 0:
            filled = end_segment(target, filled, pending, pending_bits, 0xD0 + marker)
            pending = pending_bits = 0
            marker = (marker + 1) & 7
            prediction[:] = 0
            if mcu % mcu_columns == 0:
                row += 1
                piece_ends[row] = filled
        for place in range(len(components)):
            component, block = components[place], order[mcu, place]
            value = signed(coefficients[block, 0]) - prediction[component]
            prediction[component] = coefficients[block, 0]
            filled, pending, pending_bits = _put_number(
                target, filled, pending, pending_bits, dc_tables, component, 0, value
            )
            run = 0
            for each in range(1, 64):
                value = signed(coefficients[block, each])
                if value == 0:
                    run += 1
                    continue
                while run > 15:
                    filled, pending, pending_bits = _put_number(
                        target, filled, pending, pending_bits, ac_tables, component, 0xF0, 0
                    )
                    run -= 16
                filled, pending, pending_bits = _put_number(
                    target, filled, pending, pending_bits, ac_tables, component, run << 4, value
                )
                run = 0
            if run:
                filled, pending, pending_bits = _put_number(
                    target, filled, pending, pending_bits, ac_tables, component, 0, 0
                )
    filled = end_segment(target, filled, pending, pending_bits, 0xD9)
    piece_ends[row + 1] = filled
    return filled


@kernel
def _put_number(
    target: NDArray[np.uint8],
    filled: int,
    pending: int,
    pending_bits: int,
    tables: HuffmanTables,
    table: int,
    run: int,
    value: int,
) -> tuple[int, int, int]:
    """Append the code of `run | size of value` and the raw bits of `value`; see `put`."""
    size = bit_size(value)
    code = signed(tables.code[table, run | size]) << size
    raw = value if value >= 0 else value + (1 << size) - 1
    bits = signed(tables.length[table, run | size]) + size
    return put(target, filled, pending, pending_bits, code | raw, bits)
