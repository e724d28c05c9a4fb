"""Seekable JPEGs: the same coefficients and pixels, restart markers where they belong, and no trust in what is read."""

import re
import struct
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jpegs import opencv_pixels, picture, pillow_jpeg, pixels, variants
from numpy.typing import NDArray

from stagein.formats.jpeg.header import UnsupportedJpegError, read_frame
from stagein.formats.jpeg.huffman import optimal_table, stack_tables
from stagein.formats.jpeg.restart import choose_interval, complete_dc_table, make_seekable
from stagein.formats.jpeg.scans import BlockGrid, code_again, decode_coefficients

VARIANTS = variants()


def coefficients(content: bytes) -> list[NDArray[np.int16]]:
    """The coefficients of the blocks that hold pixels, component by component."""
    frame = read_frame(content)
    grid = BlockGrid(frame)
    blocks = decode_coefficients(np.frombuffer(content, np.uint8), frame, grid)
    return [blocks[grid.mcu_order((number,)).ravel()] for number in range(len(frame.components))]


def assert_same_image(original: bytes, result: bytes) -> None:
    assert np.array_equal(pixels(result), pixels(original))
    assert np.array_equal(opencv_pixels(result), opencv_pixels(original))
    for ours, theirs in zip(coefficients(result), coefficients(original), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_keeps_its_coefficients_and_pixels(name: str) -> None:
    original = VARIANTS[name]
    result = make_seekable(original).content.tobytes()
    assert_same_image(original, result)
    assert result[-2:] == b"\xff\xd9"
    if pixels(original).ndim == 3 and "CMYK" not in name and "YCCK" not in name:
        assert np.array_equal(simplejpeg.decode_jpeg(result), simplejpeg.decode_jpeg(original))


@pytest.mark.parametrize("name", VARIANTS)
def test_coding_again_from_coefficients_gives_the_same_image(name: str) -> None:
    """The path of progressive files is right for all others as well."""
    frame = read_frame(VARIANTS[name])
    interval = choose_interval(frame.mcu_columns, frame.mcu_rows, len(VARIANTS[name]))
    assert_same_image(
        VARIANTS[name], code_again(np.frombuffer(VARIANTS[name], np.uint8), frame, interval).content.tobytes()
    )


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (16, 16), (17, 33), (65, 31)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_odd_sizes(size: tuple[int, int], progressive: bool, subsampling: str) -> None:
    original = pillow_jpeg(picture(*size), progressive=progressive, subsampling=subsampling)
    assert_same_image(original, make_seekable(original).content.tobytes())


@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_are_the_header_and_one_mcu_row_each(name: str) -> None:
    seekable = make_seekable(VARIANTS[name])
    content, ends = seekable.content.tobytes(), seekable.piece_ends.tolist()
    frame = read_frame(content)
    assert len(frame.scans) == 1 and not frame.is_progressive
    assert len(ends) == 1 + frame.mcu_rows and seekable.mcu_height * frame.mcu_rows >= frame.height
    assert ends[0] == frame.scans[0].start and ends[-1] == len(content)
    interval = frame.scans[0].restart_interval
    assert frame.mcu_columns % interval == 0
    found = list(re.finditer(b"\xff([\xd0-\xd7])", content[ends[0] :]))
    a_row = frame.mcu_columns // interval
    assert len(found) == a_row * frame.mcu_rows - 1
    assert [marker[1][0] for marker in found] == [0xD0 + count % 8 for count in range(len(found))]
    assert [ends[0] + marker.end() for marker in found][a_row - 1 :: a_row] == ends[1:-1]


def test_metadata_stay_and_junk_goes() -> None:
    with_metadata = make_seekable(VARIANTS["metadata"]).content.tobytes()
    assert b"profile" * 99 in with_metadata and b"Exif" in with_metadata and b"said" in with_metadata
    assert b"Adobe" in make_seekable(VARIANTS["CMYK"]).content.tobytes()
    assert b"junk" not in make_seekable(VARIANTS["junk behind the end"]).content.tobytes()


def test_interval_is_the_least_divisor_that_is_affordable_else_a_row() -> None:
    assert choose_interval(32, 24, 10**9) == 1
    assert choose_interval(32, 24, 100_000) == 2
    assert choose_interval(47, 24, 100_000) == 47
    assert choose_interval(63, 47, 100_000) == 9
    assert choose_interval(32, 24, 0) == 32


def test_size_grows_little() -> None:
    """Files of the size that ImageNet has grow by less than 2 %."""
    for subsampling in ("4:4:4", "4:2:0"):
        original = pillow_jpeg(picture(375, 500), quality=90, subsampling=subsampling)
        assert len(make_seekable(original).content) < 1.02 * len(original)


def _frame_segment(content: bytes) -> bytes:
    start = content.index(b"\xff\xc0")
    return content[start : start + 19]


REFUSED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "12 bits": (lambda b: b.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"), "12-bit samples"),
    "arithmetic": (lambda b: b.replace(b"\xff\xc0", b"\xff\xc9"), "arithmetic"),
    "lossless": (lambda b: b.replace(b"\xff\xc0", b"\xff\xc3"), "lossless"),
    "no start": (lambda b: b"JFIF" + b, "start marker"),
    "empty": (lambda b: b"", "start marker"),
    "half": (lambda b: b[: len(b) // 2], "no end marker"),
    "half with an end": (lambda b: b[: len(b) // 2] + b"\xff\xd9", "cut off"),
    "header alone": (lambda b: b[: b.index(b"\xff\xda")] + b"\xff\xd9", "no scan"),
    "no Huffman table": (lambda b: b.replace(b"\xff\xc4", b"\xff\xfe"), "Huffman table is missing"),
    "no quantisation table": (lambda b: b.replace(b"\xff\xdb", b"\xff\xfe"), "quantisation table is missing"),
    "huge": (lambda b: b.replace(struct.pack(">HH", 83, 130), b"\xff\xff\xff\xff"), "cut off"),
    "two frames": (lambda b: b.replace(_frame_segment(b), 2 * _frame_segment(b)), "two frames"),
    "sampling by 3": (lambda b: b.replace(b"\x01\x22\x00", b"\x01\x32\x00"), "sampling factors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_handled_is_refused_with_a_reason(name: str) -> None:
    change, reason = REFUSED[name]
    changed = change(VARIANTS["4:2:0"])
    assert changed != VARIANTS["4:2:0"]
    with pytest.raises(UnsupportedJpegError, match=reason):
        make_seekable(changed)


def test_progressive_files_that_lack_scans_are_refused() -> None:
    """Decoders smooth what is missing there, and would not in a sequential file."""
    original = VARIANTS["progressive 4:2:0"]
    last = original.rindex(b"\xff\xda")
    with pytest.raises(UnsupportedJpegError, match="leave out"):
        make_seekable(original[:last] + b"\xff\xd9")


def test_quantisation_that_changes_between_scans_is_refused() -> None:
    """Decoders take the table that stood when a component's first scan began; one header cannot say that."""
    original = VARIANTS["three scans 4:4:4"]
    table = original[original.index(b"\xff\xdb") :][:69]
    second_scan = original.index(b"\xff\xda", original.index(b"\xff\xda") + 2)
    same = original[:second_scan] + table + original[second_scan:]
    assert_same_image(same, make_seekable(same).content.tobytes())
    other = original[:second_scan] + table[:-1] + b"\x63" + original[second_scan:]
    with pytest.raises(UnsupportedJpegError, match="change between scans"):
        make_seekable(other)


def test_restart_markers_out_of_order_are_refused() -> None:
    changed = VARIANTS["restarts every MCU"].replace(b"\xff\xd3", b"\xff\xd5", 1)
    with pytest.raises(UnsupportedJpegError, match="cut off"):
        make_seekable(changed)


@settings(max_examples=300)
@example(name="16-bit quantisation", flips=[(0.9999, 16)], keep=1.0, header_only=True)
@example(name="4:2:0 optimal tables", flips=[(0.75, 1)], keep=1.0, header_only=False)  # a code not in its table
@given(
    name=st.sampled_from(sorted(VARIANTS)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
    keep=st.sampled_from([1.0, 1.0, 0.9, 0.5]),
    header_only=st.booleans(),
)
def test_damage_is_refused_or_changes_nothing(
    name: str, flips: list[tuple[float, int]], keep: float, header_only: bool
) -> None:
    """Whatever the bytes are: an UnsupportedJpegError, or a file that decoders take for the same image."""
    content = bytearray(VARIANTS[name])
    reach = read_frame(VARIANTS[name]).scans[0].start if header_only else len(content)
    for place, flip in flips:
        content[int(place * reach)] ^= flip
    damaged = bytes(content[: int(keep * len(content))]) + (b"" if keep == 1.0 else b"\xff\xd9")
    try:
        result = make_seekable(damaged).content.tobytes()
    except UnsupportedJpegError:
        return
    for ours, theirs in zip(coefficients(result), coefficients(damaged), strict=True):
        assert np.array_equal(ours, theirs)
    try:
        expected = pixels(damaged)
    except (OSError, SyntaxError, ValueError):  # Pillow is stricter with metadata
        return
    assert np.array_equal(pixels(result), expected)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_optimal_tables_are_prefix_codes_of_at_most_16_bits(frequencies: list[int]) -> None:
    frequency = np.zeros(257, np.int64)
    frequency[: len(frequencies)] = frequencies
    if not frequency.any():
        return
    counts, symbols = np.zeros(17, np.int64), np.zeros(256, np.int64)
    number = optimal_table(frequency.copy(), counts, symbols)
    assert sorted(symbols[:number].tolist()) == np.flatnonzero(frequency[:256]).tolist()
    assert counts.sum() == number
    assert sum(int(count) << (16 - bits) for bits, count in enumerate(counts)) < 1 << 16  # the code of all ones is free


def test_missing_dc_codes_are_added_below_the_free_code() -> None:
    definition = bytes([0, 2, 1, *[0] * 13, 3, 4, 5])  # 00, 01, 100
    complete = complete_dc_table(definition)
    assert complete is not None
    before, after = stack_tables([definition]), stack_tables([complete])
    for size in (3, 4, 5):
        assert (after.code[0, size], after.length[0, size]) == (before.code[0, size], before.length[0, size])
    assert (after.length[0, :12] > 0).all()
    assert complete_dc_table(bytes([2, *[0] * 15, 0, 1])) is None  # no code is free


def test_images_whose_dc_tables_have_no_room_are_coded_again() -> None:
    """A table has 256 codes at most; these have that many, and yet not all sizes."""
    original = VARIANTS["4:2:0 optimal tables"]
    changed, start = original, 0
    while (start := changed.find(b"\xff\xc4", start)) >= 0:
        (nbytes,) = struct.unpack_from(">H", changed, start + 2)
        kind, counts, symbols = (
            changed[start + 4],
            changed[start + 5 : start + 21],
            changed[start + 21 : start + 2 + nbytes],
        )
        if kind >> 4 == 0:
            assert len(symbols) == sum(counts) < 12
            more = 256 - len(symbols)
            segment = bytes((kind, *counts[:15], counts[15] + more)) + symbols + more * b"\x0f"
            segment = b"\xff\xc4" + struct.pack(">H", 2 + len(segment)) + segment
            changed = changed[:start] + segment + changed[start + 2 + nbytes :]
        start += 4
    assert_same_image(original, changed)
    assert_same_image(original, make_seekable(changed).content.tobytes())
