"""Seekable JPEG: the same image with a restart marker every few MCUs, so that any MCU row can be decoded by itself.

Nothing is lost: every quantised coefficient stays what it is, so every decoder gives the same pixels. A sequential JPEG of
one scan, as nearly all are, is rewritten bit by bit: only the DC codes behind new restart markers change. Others
(progressive, several scans) are decoded to coefficients and coded again (`jpeg.scans`).
"""

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native import kernel, signed

from .bits import (
    INVALID,
    bit_size,
    copy_bits,
    end_segment,
    extend,
    find_code,
    peek32,
    put,
    unstuff,
)
from .header import BLOCK_PIXELS, Frame, UnsupportedJpegError, damaged, read_frame, sequential_header
from .huffman import DC_SIZES, LOOK_BITS, HuffmanTables, complete_dc_table, stack_tables
from .limits import PADDING_BYTES
from .pieces import DAMAGED, SeekableJpeg, target_bytes
from .scans import code_again

MAX_OVERHEAD = 0.014
"""Restart markers are set so densely that they cost about this share of a file."""

_SEGMENT_COST_BYTES = 3.5
"""A marker, half a byte of fill bits, and longer DC codes, as measured on ImageNet."""

_MAX_FILE_BYTES = 1 << 30


def make_seekable(content: bytes) -> SeekableJpeg:
    """The JPEG file `content` with restart markers at an interval that divides its MCU columns.

    The metadata segments stay, bytes behind the end marker go. Raises UnsupportedJpegError for what is damaged,
    or of a kind that T.81 baseline and 8-bit progressive decoders do not take (arithmetic coding, 12 bits, lossless).
    """
    if len(content) > _MAX_FILE_BYTES:
        raise UnsupportedJpegError(f"larger than {_MAX_FILE_BYTES} bytes")
    frame = read_frame(content)
    scan_bytes = sum(scan.stop - scan.start for scan in frame.scans)
    blocks = frame.mcu_columns * frame.mcu_rows * len(frame.mcu_components)
    if blocks > 8 * scan_bytes:  # a block takes a bit at least: no memory for what cannot be there
        damaged(DAMAGED)
    interval = choose_interval(frame.mcu_columns, frame.mcu_rows, scan_bytes)
    if _is_plain(frame):
        dc_tables = [complete_dc_table(table) for table in frame.scans[0].dc_tables]
        complete = [table for table in dc_tables if table is not None]
        if len(complete) == len(dc_tables):
            return _insert_restarts(np.frombuffer(content, np.uint8), frame, complete, interval)
    return code_again(np.frombuffer(content, np.uint8), frame, interval)


def choose_interval(mcu_columns: int, mcu_rows: int, scan_bytes: int) -> int:
    """MCUs between restart markers: the least divisor of the columns that keeps to MAX_OVERHEAD, else a whole row."""
    affordable = MAX_OVERHEAD * scan_bytes / _SEGMENT_COST_BYTES
    for interval in range(1, mcu_columns):
        if mcu_columns % interval == 0 and mcu_rows * (mcu_columns // interval) <= affordable:
            return interval
    return mcu_columns


def _is_plain(frame: Frame) -> bool:
    """One sequential scan with all components interleaved."""
    scan = frame.scans[0]
    return not frame.is_progressive and len(frame.scans) == 1 and len(scan.components) == len(frame.components)


def _insert_restarts(
    source: NDArray[np.uint8], frame: Frame, dc_definitions: list[bytes], interval: int
) -> SeekableJpeg:
    scan = frame.scans[0]
    source_tables, target_tables = stack_tables(list(scan.dc_tables)), stack_tables(dc_definitions)
    ac_tables = stack_tables(list(scan.ac_tables), to_skip=True)
    header = sequential_header(frame, dc_definitions, list(scan.ac_tables), interval)
    mcus = frame.mcu_columns * frame.mcu_rows
    source_interval = scan.restart_interval or mcus
    room = target_bytes(len(header), scan.stop - scan.start, mcus // interval + mcus // source_interval)
    target = np.empty(room, np.uint8)
    target[: len(header)] = np.frombuffer(header, np.uint8)
    piece_ends = np.empty(1 + frame.mcu_rows, np.uint32)
    piece_ends[0] = len(header)
    nbytes = _copy_with_restarts(
        source,
        scan.start,
        scan.stop,
        source_interval,
        interval,
        frame.mcu_columns,
        frame.mcu_rows,
        np.array(frame.mcu_components, np.int64),
        source_tables,
        target_tables,
        ac_tables,
        target,
        piece_ends,
    )
    if nbytes < 0:
        damaged(DAMAGED)
    return SeekableJpeg(target[:nbytes], piece_ends, BLOCK_PIXELS * frame.vertical)


@kernel
def _copy_with_restarts(
    source: NDArray[np.uint8],
    start: int,
    stop: int,
    source_interval: int,
    interval: int,
    mcu_columns: int,
    mcu_rows: int,
    mcu_components: NDArray[np.int64],
    source_tables: HuffmanTables,
    target_tables: HuffmanTables,
    ac_tables: HuffmanTables,
    target: NDArray[np.uint8],
    piece_ends: NDArray[np.uint32],
) -> int:
    """Copy a scan of all components to `target` from `piece_ends[0]` on, with a restart marker every `interval` MCUs.

    Only DC codes whose prediction changes are written anew, by `target_tables`: `source_tables` with codes for what they have
    none for. All between them is copied bit by bit without a look at its values. Returns the bytes that `target` then has,
    INVALID when the scan is damaged.
    """
    mcus = mcu_columns * mcu_rows
    plain = np.empty(stop - start + PADDING_BYTES, np.uint8)
    segments = np.empty((mcus - 1) // source_interval + 2, np.int64)
    plain_bytes, num_segments = unstuff(source, start, stop, plain, segments)
    if num_segments * source_interval < mcus:
        return INVALID
    source_dc, target_dc = np.zeros(4, np.int64), np.zeros(4, np.int64)
    filled, pending, pending_bits = signed(piece_ends[0]), 0, 0
    segment = 0
    segment_end = 8 * (segments[1] if num_segments > 1 else plain_bytes)
    position = copied = 0  # bits of `plain` that are understood, and that are in `target`
    until_source_restart, until_restart = source_interval, interval
    column, row, marker = 0, 0, 0
    for _ in range(mcus):
        if until_source_restart == 0:
            filled, pending, pending_bits = copy_bits(plain, copied, position, target, filled, pending, pending_bits)
            segment += 1
            position = copied = 8 * segments[segment]
            segment_end = 8 * (segments[segment + 1] if segment + 1 < num_segments else plain_bytes)
            source_dc[:] = 0
            until_source_restart = source_interval
        if until_restart == 0:
            filled, pending, pending_bits = copy_bits(plain, copied, position, target, filled, pending, pending_bits)
            copied = position
            filled = end_segment(target, filled, pending, pending_bits, 0xD0 + marker)
            pending = pending_bits = 0
            marker = (marker + 1) & 7
            target_dc[:] = 0
            until_restart = interval
            if column == mcu_columns:
                column = 0
                row += 1
                piece_ends[row] = filled
        until_source_restart -= 1
        until_restart -= 1
        column += 1
        for component in mcu_components:
            window = peek32(plain, position)
            found = find_code(window >> 16, source_tables, component)
            bits, size = found >> 8, found & 0xFF
            if bits == 0 or size >= DC_SIZES:
                return INVALID
            before = position
            position += bits + size
            change = extend((window >> (32 - bits - size)) & ((1 << size) - 1), size) if size else 0
            source_dc[component] += change
            new_change = source_dc[component] - target_dc[component]
            target_dc[component] = source_dc[component]
            if new_change != change:
                filled, pending, pending_bits = copy_bits(plain, copied, before, target, filled, pending, pending_bits)
                size = bit_size(new_change)
                if size >= DC_SIZES:
                    return INVALID
                bits = signed(target_tables.length[component, size])
                code = signed(target_tables.code[component, size]) << size
                raw = new_change if new_change >= 0 else new_change + (1 << size) - 1
                filled, pending, pending_bits = put(target, filled, pending, pending_bits, code | raw, bits + size)
                copied = position
            position = _skip_ac(plain, position, component, ac_tables)
            if position < 0 or position > segment_end:
                return INVALID
    filled, pending, pending_bits = copy_bits(plain, copied, position, target, filled, pending, pending_bits)
    filled = end_segment(target, filled, pending, pending_bits, 0xD9)
    piece_ends[mcu_rows] = filled
    return filled


@kernel
def _skip_ac(plain: NDArray[np.uint8], position: int, component: int, tables: HuffmanTables) -> int:
    """Where the AC coefficients of a block that start at bit `position` end; INVALID when they are no valid codes."""
    byte = np.uint64(position >> 3)
    # The bits to come stand at the top of the window; shifts by the low six bits of an entry need no mask on most processors.
    window = np.uint64(plain[byte]) << np.uint64(56 + (position & 7))
    window_bits = 8 - (position & 7)
    byte += np.uint64(1)
    done = 1
    while True:
        if window_bits < 32:
            four = (
                np.uint64(plain[byte]) << np.uint64(24)
                | np.uint64(plain[byte + np.uint64(1)]) << np.uint64(16)
                | np.uint64(plain[byte + np.uint64(2)]) << np.uint64(8)
                | np.uint64(plain[byte + np.uint64(3)])
            )
            window |= four << np.uint64(32 - window_bits)
            byte += np.uint64(4)
            window_bits += 32
        entry = signed(tables.skip[component, window >> np.uint64(64 - LOOK_BITS)])
        moved = (entry >> 6) & 63
        if entry and done + moved <= 63:
            window <<= np.uint64(entry & 63)
            window_bits -= entry & 63
            done += moved
            if entry & (1 << 12):
                break
            continue
        bits, moved, ends = (entry >> 13) & 31, (entry >> 18) & 31, entry >> 23
        if entry == 0:
            code = find_code(signed(window >> np.uint64(48)), tables, component)
            run, size = (code >> 4) & 15, code & 15
            if code == 0 or (size == 0 and 0 < run < 15):
                return INVALID
            bits, ends = (code >> 8) + size, 1 if run == 0 and size == 0 else 0
            moved = 0 if ends else run + 1
        window <<= np.uint64(bits)
        window_bits -= bits
        done += moved
        if done >= 64 or ends:
            break
    if done > 64:
        return INVALID
    return 8 * signed(byte) - window_bits
