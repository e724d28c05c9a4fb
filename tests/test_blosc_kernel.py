"""Blosc frames are decoded as the library made them, wherever they go; what is no frame of the record is refused."""

import struct
from collections.abc import Iterator

import numcodecs.blosc
import numpy as np
import pytest
from numpy.typing import NDArray

from stagein.formats.blosc_kernel import decode_blosc
from stagein.formats.codecs import WORK_BYTES

WORK = np.zeros(WORK_BYTES, np.uint8)
GUARD = 128
ONE_STREAM = 0x10
"""The flag of a frame whose blocks are not divided into planes that are compressed each by itself."""
SHUFFLES = {"none": 0, "byte": 1, "bit": 2}


def smooth(nbytes: int, itemsize: int) -> bytes:
    """Bytes of which some planes shrink, and some do not."""
    steps = np.arange(nbytes // itemsize + 1, dtype=np.uint64)
    items = steps // 7 + np.random.default_rng(nbytes).integers(0, 200, len(steps)).astype(np.uint64)
    return items.view(np.uint8).reshape(-1, 8)[:, :itemsize].tobytes().ljust(nbytes, b"\x01")[:nbytes]


def framed(record: bytes, itemsize: int, shuffle: str = "byte", name: bytes = b"lz4", block_bytes: int = 0) -> bytes:
    return bytes(numcodecs.blosc.compress(record, name, 5, SHUFFLES[shuffle], block_bytes, itemsize))


def decoded(frame: bytes, nbytes: int, misalignment: int = 0) -> NDArray[np.uint8] | None:
    """What the kernel makes of it, None where it refuses; fails where it writes elsewhere."""
    memory = np.full(nbytes + 2 * GUARD, 77, np.uint8)
    start = GUARD + misalignment
    record = memory[start : start + nbytes]
    is_right = decode_blosc(np.frombuffer(bytearray(frame), np.uint8), record, WORK)
    assert (memory[:start] == 77).all() and (memory[start + nbytes :] == 77).all()
    return record if is_right else None


@pytest.mark.parametrize("itemsize", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("nbytes", [1, 15, 33, 250, 4096, 100_001, 2_500_008])
def test_frames_of_the_library(nbytes: int, shuffle: str, itemsize: int) -> None:
    record = smooth(nbytes, itemsize)
    for misalignment in (0, itemsize, 1):
        made = decoded(framed(record, itemsize, shuffle), nbytes, misalignment)
        assert made is not None and made.tobytes() == record


@pytest.mark.parametrize(
    ("name", "block_bytes"), [(b"zstd", 0), (b"lz4hc", 0), (b"blosclz", 0), (b"lz4", 500), (b"lz4", 3 << 20)]
)
def test_other_codecs_and_blocks(name: bytes, block_bytes: int) -> None:
    record = smooth(4 << 20, 4)
    made = decoded(framed(record, 4, name=name, block_bytes=block_bytes), len(record))
    assert made is not None and made.tobytes() == record


@pytest.fixture(params=["ALWAYS", "NEVER"])
def split_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whether the library divides blocks into planes: it looks it up when it may use threads, and keeps to it until told otherwise."""
    monkeypatch.setattr(numcodecs.blosc, "use_threads", True)
    monkeypatch.setenv("BLOSC_SPLITMODE", request.param)
    yield request.param
    monkeypatch.setenv("BLOSC_SPLITMODE", "FORWARD_COMPAT")  # its default
    framed(bytes(100), 1)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("nbytes", [4096, 100_001, 400_000])
def test_blocks_of_one_stream_and_of_one_a_plane(split_mode: str, nbytes: int, itemsize: int) -> None:
    record = smooth(nbytes, itemsize)
    frame = framed(record, itemsize)
    assert bool(frame[2] & ONE_STREAM) == (split_mode == "NEVER")
    assert struct.unpack_from("<I", frame, 8)[0] <= WORK_BYTES
    made = decoded(frame, nbytes)
    assert made is not None and made.tobytes() == record


@pytest.mark.parametrize("itemsize", [4, 8])
def test_planes_of_few_bytes_are_one_stream_also_in_frames_that_do_not_say_so(itemsize: int) -> None:
    record = smooth(500, itemsize)
    frame = bytearray(framed(record, itemsize))
    assert frame[2] & ONE_STREAM
    frame[2] ^= ONE_STREAM  # as older versions of the library left it
    assert numcodecs.blosc.decompress(bytes(frame)) == record
    made = decoded(bytes(frame), 500)
    assert made is not None and made.tobytes() == record


def test_noise_is_stored_raw() -> None:
    record = np.random.default_rng(0).bytes(300_000)
    made = decoded(framed(record, 4), len(record))
    assert made is not None and made.tobytes() == record


def test_a_frame_of_another_size_is_refused() -> None:
    frame = framed(smooth(40_000, 2), 2)
    assert decoded(frame, 39_998) is None
    assert decoded(frame, 40_002) is None
    assert decoded(frame + b"\0", 40_000) is None
    for nbytes in (0, 3, 15, 16, 17, 40, len(frame) - 1):
        cut = frame[:nbytes]
        assert decoded(cut, 40_000) is None
        if nbytes >= 16:  # as if it had been written so
            assert decoded(cut[:12] + struct.pack("<I", nbytes) + cut[16:], 40_000) is None


def test_a_frame_of_another_version_is_refused() -> None:
    frame = framed(smooth(40_000, 2), 2)
    assert decoded(bytes([frame[0] + 1]) + frame[1:], 40_000) is None


def test_damage_is_refused_or_gives_other_bytes_but_never_leaves_the_record() -> None:
    random = np.random.default_rng(1)
    record = smooth(40_000, 2)
    frame = framed(record, 2)
    for place in [*range(16, 40), *random.integers(40, len(frame), 300)]:
        for bit in (0, 7):
            damaged = bytearray(frame)
            damaged[place] ^= 1 << bit
            decoded(bytes(damaged), len(record))


def test_a_stream_that_begins_outside_is_refused() -> None:
    frame = framed(smooth(40_000, 2), 2)
    for position in (len(frame), len(frame) - 3, 2**31, 2**32 - 4):
        assert decoded(frame[:16] + struct.pack("<I", position) + frame[20:], 40_000) is None
    position = struct.unpack_from("<I", frame, 16)[0]
    for nbytes in (0, len(frame), 2**31, 2**32 - 1):
        assert decoded(frame[:position] + struct.pack("<I", nbytes) + frame[position + 4 :], 40_000) is None
