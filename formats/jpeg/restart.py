"""Seekable JPEG: the same image with a restart marker every few MCUs, so that any MCU row can be decoded by itself.

Nothing is lost: every quantised coefficient stays what it is, so every decoder gives the same pixels. A sequential JPEG of
one scan, as nearly all are, is rewritten bit by bit: only the DC codes behind new restart markers change. Others
(progressive, several scans) are decoded to coefficients and coded again (`jpeg.scans`).
"""

import threading

import numpy as np
from numpy.typing import NDArray

from stagein.formats.native_code import NativeKernel
from stagein.formats.scratch import Scratch

from .header import BLOCK_PIXELS, Frame, UnsupportedJpegError, damaged, read_frame, sequential_header
from .limits import DC_SIZES, LOOK_BITS, MAX_CODE_BITS, MOST_TABLES, PADDING_BYTES, TABLE_SYMBOLS
from .pieces import BAD_TABLE, DAMAGED, SeekableJpeg, target_bytes
from .tables import definition_rows, room_for_tables

_copy_with_restarts = NativeKernel(f"{__package__}.restart_kernels", "copy_with_restarts")

MAX_OVERHEAD = 0.014
"""Restart markers are set so densely that they cost about this share of a file."""

_SEGMENT_COST_BYTES = 3.5
"""A marker, half a byte of fill bits, and longer DC codes, as measured on ImageNet."""

_MAX_FILE_BYTES = 1 << 30
_MOST_DEFINITIONS = 3 * MOST_TABLES
"""Huffman tables of a scan, each component with others: for AC and DC coefficients, and for the DC codes that are written."""


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
    from .scans import code_again  # and numba, which few images need

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


class _Memory(threading.local):
    """What the kernel works in, for one thread: tables, and the steps over AC codes that `restart_kernels` makes of the first."""

    def __init__(self) -> None:
        self.tables = room_for_tables(_MOST_DEFINITIONS)
        self.steps = np.empty((MOST_TABLES, 1 << LOOK_BITS), np.uint16)
        self.dc = np.empty((2, MOST_TABLES), np.int64)


_memory, _plain, _segments, _target = _Memory(), Scratch(), Scratch(), Scratch()


def _insert_restarts(
    source: NDArray[np.uint8], frame: Frame, dc_definitions: list[bytes], interval: int
) -> SeekableJpeg:
    """`source` with restart markers, its DC codes by these tables: those that it has, with codes for what they have none for."""
    scan = frame.scans[0]
    header = sequential_header(frame, dc_definitions, list(scan.ac_tables), interval)
    mcus, scan_bytes = frame.mcu_columns * frame.mcu_rows, scan.stop - scan.start
    source_interval = scan.restart_interval or mcus
    target = _target.of(target_bytes(len(header), scan_bytes, mcus // interval + mcus // source_interval))
    target[: len(header)] = np.frombuffer(header, np.uint8)
    piece_ends = np.empty(1 + frame.mcu_rows, np.uint32)
    piece_ends[0] = len(header)
    ac_definitions = list(dict.fromkeys(scan.ac_tables))
    definitions = ac_definitions + list(dict.fromkeys((*scan.dc_tables, *dc_definitions)))
    nbytes = _copy_with_restarts(
        source,
        scan.start,
        scan.stop,
        source_interval,
        interval,
        frame.mcu_columns,
        frame.mcu_rows,
        _plan_blocks(frame, dc_definitions, definitions),
        definition_rows(definitions),
        len(ac_definitions),
        *_memory.tables,
        _memory.steps,
        _memory.dc,
        _plain.of(scan_bytes + PADDING_BYTES),
        _segments.of(8 * (mcus // source_interval + 2)).view(np.int64),
        target,
        piece_ends,
    )
    if nbytes <= 0:
        damaged(DAMAGED if nbytes else BAD_TABLE)
    return SeekableJpeg(target[:nbytes].copy(), piece_ends, BLOCK_PIXELS * frame.vertical)


def _plan_blocks(frame: Frame, dc_definitions: list[bytes], definitions: list[bytes]) -> NDArray[np.int64]:
    """Of each block of an MCU, [blocks, 4]: its component, and of `definitions` that of its AC codes, of its DC codes, and of those to be."""
    scan, place = frame.scans[0], definitions.index
    of_component = [
        (number, place(ac), place(dc), place(complete))
        for number, (ac, dc, complete) in enumerate(zip(scan.ac_tables, scan.dc_tables, dc_definitions, strict=True))
    ]
    return np.array([of_component[number] for number in frame.mcu_components], np.int64)


def complete_dc_table(definition: bytes) -> bytes | None:
    """The same DC codes, and codes for all sizes that are missing; None when there is no room for them.

    They go below the code of all ones, which T.81 leaves free: codes that are in use stay as they are.
    """
    counts, symbols = list(definition[:MAX_CODE_BITS]), definition[MAX_CODE_BITS:]
    missing = bytes(size for size in range(DC_SIZES) if size not in symbols)
    if not missing or not symbols:
        return definition
    if len(symbols) + len(missing) >= TABLE_SYMBOLS:
        return None
    longest = max((bits for bits in range(1, MAX_CODE_BITS + 1) if counts[bits - 1]), default=1)
    taken = sum(count << (longest - bits) for bits, count in enumerate(counts[:longest], start=1))
    for bits in range(longest, MAX_CODE_BITS + 1):
        free = ((1 << longest) - taken) << (bits - longest)
        if free > len(missing):  # one more: the code of all ones stays free
            counts[bits - 1] += len(missing)
            return bytes(counts) + symbols + missing
    return None
