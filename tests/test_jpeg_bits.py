"""The search for 0xFF and for markers in entropy-coded data, which takes many bytes at a time, beside one that takes one by one."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stagein.formats.jpeg.bits import INVALID, unstuff
from stagein.formats.jpeg.cut_kernels import _behind_marker
from stagein.formats.jpeg.limits import PADDING_BYTES, SEARCHED_BYTES

GUARD = 0xA5


@st.composite
def scans(draw):
    """Pieces of data without 0xFF, of all lengths around what is taken at a time, and between them what 0xFF may stand before."""
    content, markers = bytearray(), 0
    for _ in range(draw(st.integers(0, 6))):
        length = draw(st.integers(0, 3) | st.integers(SEARCHED_BYTES - 3, SEARCHED_BYTES + 3) | st.integers(0, 300))
        content += bytes([draw(st.integers(0, 0xFE))]) * length
        kind = draw(st.sampled_from(["stuffed", "restart", "filled restart", "end", "other", "nothing"]))
        if kind == "stuffed":
            content += b"\xff\x00"
        elif kind in ("restart", "filled restart"):
            content += (b"\xff" if kind == "restart" else b"\xff\xff") + bytes([0xD0 + (markers & 7)])
            markers += 1
        elif kind == "end":
            content += bytes([0xFF, draw(st.sampled_from([0xD8, 0xD9]))])
        elif kind == "other":
            content += bytes([0xFF, draw(st.integers(1, 0xFF))])
    return bytes(content) + draw(st.sampled_from([b"", b"\xff"]))


def unstuffed(scan: bytes) -> tuple[bytes, list[int]] | None:
    """Byte by byte, by ITU-T T.81 annex B: the data, and where each segment starts; None where markers are out of order."""
    plain, segments, place = bytearray(), [0], 0
    while place < len(scan):
        byte, after = scan[place], scan[place + 1 : place + 2]
        if byte != 0xFF:
            plain.append(byte)
            place += 1
        elif after == b"\x00":
            plain.append(byte)
            place += 2
        elif after in (b"\xff", b""):
            place += 1
        elif after[0] == 0xD0 + (len(segments) - 1) % 8:
            segments.append(len(plain))
            place += 2
        else:
            return None
    return bytes(plain), segments


@settings(max_examples=400)
@given(scans(), st.integers(0, 40))
def test_data_are_the_same_without_what_is_stuffed(scan, start):
    source = np.frombuffer(b"\xff" * start + scan, np.uint8)
    room = len(scan) + PADDING_BYTES
    plain, segments = np.full(room + SEARCHED_BYTES, GUARD, np.uint8), np.full(64, -1, np.int64)
    filled, count = unstuff(source, start, len(source), plain, segments)
    expected = unstuffed(scan)
    assert (plain[room:] == GUARD).all()
    if expected is None:
        assert count == INVALID
        return
    assert plain[:filled].tobytes() == expected[0]
    assert segments[:count].tolist() == expected[1]
    assert not plain[filled : filled + PADDING_BYTES].any()


@settings(max_examples=400)
@given(scans(), st.integers(0, 40), st.sampled_from([b"", b"\xd0" * 70, b"\xff\xd0" * 70]))
@example(b"a" * (SEARCHED_BYTES - 1) + b"\xff", 0, b"\xd0" * 70)
def test_the_next_marker_is_found_if_it_ends_before_the_stop(scan, start, behind):
    source = np.frombuffer(b"\xff" * start + scan + behind, np.uint8)
    stop = start + len(scan)
    places = [
        place + 2 for place in range(start, stop - 1) if source[place] == 0xFF and 0xD0 <= source[place + 1] <= 0xD9
    ]
    assert _behind_marker(source, start, stop) == (places[0] if places else -1)
