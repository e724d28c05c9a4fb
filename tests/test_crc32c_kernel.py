"""crc32c by vectors is the crc32c of the library, at any length, alignment and seed."""

from typing import Any

import numba
import numpy as np
import pytest

from stagein.formats import crc32c_kernel
from stagein.formats.checksums import crc32c_extend

LENGTHS = (0, 1, 255, 256, 257, 511, 512, 513, 767, 4096, 10_007, 262_144)


def test_the_published_sum() -> None:
    digits = np.frombuffer(b"123456789", np.uint8)
    assert crc32c_kernel.crc32c_extend(np.uint32(0), digits.ctypes.data, 9) == 0xE3069283
    zeros = np.zeros(32 << 20, np.uint8)
    assert crc32c_kernel.crc32c_extend(np.uint32(0), zeros.ctypes.data, len(zeros)) == crc32c_extend(0, zeros)


@pytest.mark.parametrize("words", [4, 8])
def test_vectors_sum_as_bytes_do(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if words > crc32c_kernel._WORDS:
        pytest.skip("this processor has no such vectors")
    monkeypatch.setattr(crc32c_kernel, "_WORDS", words)
    extend: Any = numba.njit(crc32c_kernel.extend_by_vectors.py_func)  # type: ignore[attr-defined]
    data = np.random.default_rng(words).integers(0, 256, max(LENGTHS) + 9, dtype=np.uint8)
    for nbytes in LENGTHS:
        for start in (0, 1, 9):
            for before in (0, 0xDEADBEEF, 0xFFFFFFFF):
                piece = data[start : start + nbytes]
                found = extend(np.uint32(before), piece.ctypes.data, nbytes)
                assert found == crc32c_extend(before, piece), (nbytes, start, before)


def test_every_bit_counts() -> None:
    data = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8)
    whole = crc32c_kernel.crc32c_extend(np.uint32(0), data.ctypes.data, len(data))
    for place in range(0, len(data), 7):
        data[place] ^= 1 << place % 8
        assert crc32c_kernel.crc32c_extend(np.uint32(0), data.ctypes.data, len(data)) != whole
        data[place] ^= 1 << place % 8
