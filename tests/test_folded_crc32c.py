"""CRC-32C by vectors: the same sums as google-crc32c's, for every length around the sizes of its steps and any place."""

import ctypes
from collections.abc import Callable

import google_crc32c
import numpy as np
import pytest

from stagein.formats import folded_crc32c

WIDTHS = folded_crc32c.vector_widths() or [
    pytest.param(0, marks=pytest.mark.skip(reason="this processor multiplies no vectors"))
]


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_any_length_place_and_beginning(width: int) -> None:
    signature = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int64)
    extend = signature(folded_crc32c.function_address(width))
    random = np.random.default_rng(0)
    content = np.frombuffer(random.bytes(200_000), np.uint8)
    for nbytes in [*range(1100), *random.integers(1100, 190_000, 200).tolist()]:
        start, before = int(random.integers(200)), int(random.integers(1 << 32))
        piece = content[start : start + nbytes]
        found = extend(before, piece.ctypes.data, nbytes)
        assert found == google_crc32c.extend(before, piece.tobytes()), (nbytes, start, before)


@pytest.mark.parametrize(
    "address_of", [folded_crc32c.copying_function_address, folded_crc32c.streaming_function_address]
)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_copied_on_the_way_is_whole_and_nothing_else_is_written(
    width: int, address_of: Callable[[int], int]
) -> None:
    signature = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    copy = signature(address_of(width))
    random = np.random.default_rng(0)
    content = np.frombuffer(random.bytes(200_000), np.uint8)
    for nbytes in [*range(1100), *random.integers(1100, 190_000, 200).tolist()]:
        start, before = int(random.integers(200)), int(random.integers(1 << 32))
        piece, target, place = (
            content[start : start + nbytes],
            np.zeros(nbytes + 300, np.uint8),
            int(random.integers(200)),
        )
        found = copy(before, piece.ctypes.data, nbytes, target.ctypes.data + place)
        assert found == google_crc32c.extend(before, piece.tobytes()), (nbytes, start, before)
        assert np.array_equal(target[place : place + nbytes], piece), (nbytes, start, place)
        assert not target[:place].any() and not target[place + nbytes :].any(), (nbytes, place)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_sum_that_the_standard_gives(width: int) -> None:
    """RFC 3720, appendix B.4: 32 bytes of zeros, of ones, counting up and down."""
    signature = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_int64)
    extend = signature(folded_crc32c.function_address(width))
    up = bytes(range(32))
    sums = [extend(0, content, 32) for content in (bytes(32), b"\xff" * 32, up, up[::-1])]
    assert sums == [0x8A9136AA, 0x62A8AB43, 0x46DD794E, 0x113FDB5C]
