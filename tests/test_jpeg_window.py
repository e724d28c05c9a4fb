"""The window of a JPEG decoded by our own kernel: the very pixels of libjpeg-turbo, or nothing."""

import itertools
import os
import platform
import time

import numpy as np
import pytest
import simplejpeg
from jpegs import opencv_jpeg, picture, pillow_jpeg, variants

import stagein.formats.jpeg.window as jpeg_window
from stagein.formats.jpeg.restart import make_seekable
from stagein.formats.jpeg.window import WindowDecoder

_COMPILE_SECONDS = 240
OF_OTHER_KINDS = ("4:1:1", "RGB", "CMYK", "YCCK", "progressive", "three scans", "junk behind the end")


class BoundsChecked:
    """The kernel as numba runs it, which checks the bounds of arrays where NUMBA_BOUNDSCHECK=1 is set."""

    def is_ready(self, *_: object) -> bool:
        return True

    def __call__(self, *arguments: object) -> bool:
        from stagein.formats.jpeg.window_kernels import decode_window

        return decode_window(*arguments)


@pytest.fixture(scope="module")
def decoder():
    """One whose kernel is compiled."""
    if platform.machine() != "x86_64":
        pytest.skip("machine code is made for x86-64 only")
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("NUMBA_BOUNDSCHECK", "0") != "0":
            patch.setattr(jpeg_window, "_decode_window", BoundsChecked())
        decoder = WindowDecoder()
        record, window = as_record(variants()["4:2:0"]), np.array([0, 0, 8, 8])
        deadline = time.monotonic() + _COMPILE_SECONDS
        while decoder.decode(record, window) is None:
            assert time.monotonic() < deadline, "the kernel is not ready"
            time.sleep(0.1)
        yield decoder


def as_record(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8).copy()


def decoded_whole(content: bytes, *, strict: bool = True) -> np.ndarray:
    return simplejpeg.decode_jpeg(content, "RGB", strict=strict)


def some_windows(height: int, width: int, count: int, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """The whole image, its corners, and others at random."""
    windows = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (0, width - 1, height, 1)]
    random = np.random.default_rng(seed)
    for _ in range(count):
        top, left = int(random.integers(height)), int(random.integers(width))
        windows.append(
            (top, left, int(random.integers(1, height - top + 1)), int(random.integers(1, width - left + 1)))
        )
    return windows


def assert_same(decoder: WindowDecoder, content: bytes, windows: list[tuple[int, int, int, int]]) -> None:
    record, whole = as_record(content), decoded_whole(content)
    for top, left, height, width in windows:
        pixels = decoder.decode(record, np.array([top, left, height, width]))
        assert pixels is not None
        expected = whole[top : top + height, left : left + width].reshape(height, 3 * width)
        assert np.array_equal(pixels, expected), (top, left, height, width)


@pytest.mark.parametrize("name", variants())
def test_windows_of_every_kind_of_jpeg_are_those_of_libjpeg_or_left_to_it(decoder, name):
    content = variants()[name]
    if name.startswith(OF_OTHER_KINDS):
        assert decoder.decode(as_record(content), np.array([0, 0, 8, 8])) is None
    else:
        assert_same(decoder, content, some_windows(83, 130, 40))


SIZES = [(1, 1), (2, 5), (7, 9), (8, 8), (16, 16), (17, 33), (15, 64), (65, 31), (100, 6), (6, 100)]


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "grey"])
@pytest.mark.parametrize("height, width", SIZES)
def test_windows_at_the_edges_of_images_of_any_size_are_those_of_libjpeg(decoder, height, width, sampling):
    if sampling == "grey":
        content = pillow_jpeg(picture(height, width, 1), quality=80)
    else:
        import cv2

        factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
        content = opencv_jpeg(picture(height, width), factor, cv2.IMWRITE_JPEG_QUALITY, 90)
    if sampling in ("422", "420") and width <= 4:
        assert decoder.decode(as_record(content), np.array([0, 0, 1, 1])) is None
    else:
        assert_same(decoder, content, some_windows(height, width, 15))


@pytest.mark.parametrize("quality", [1, 2, 5, 10, 30, 60, 90, 97, 100])
@pytest.mark.parametrize("kind", ["noise", "black and white", "flat"])
def test_coefficients_of_any_size_come_out_as_libjpeg_makes_them(decoder, kind, quality):
    random = np.random.default_rng(quality)
    pixels = {
        "noise": random.integers(0, 256, (64, 80, 3)),
        "black and white": 255 * random.integers(0, 2, (64, 80, 1)) * np.ones(3, np.int64),
        "flat": np.full((64, 80, 3), 77),
    }[kind].astype(np.uint8)
    for subsampling in ("4:4:4", "4:2:0"):
        for optimize in (False, True):
            content = pillow_jpeg(pixels, quality=quality, subsampling=subsampling, optimize=optimize)
            assert_same(decoder, content, some_windows(64, 80, 5))


@pytest.mark.parametrize("kind", ["picture", "flat"])
def test_values_beyond_those_of_any_image_are_as_in_libjpeg(decoder, kind):
    """Quantisation of 255 on coefficients of a picture of quality 100: 16 bits are not enough on the way. What has no AC
    coefficients wraps, all else saturates."""
    pixels = {"picture": picture(64, 80), "flat": np.full((64, 80, 3), 77, np.uint8)}[kind]
    content = bytearray(pillow_jpeg(pixels, quality=100, subsampling="4:4:4"))
    for factor in (3, 40, 255):
        for place in (at for at in range(len(content)) if content[at : at + 2] == b"\xff\xdb"):
            content[place + 5 : place + 69] = bytes([factor]) * 64
        assert_same(decoder, bytes(content), some_windows(64, 80, 5))


def test_seekable_jpegs_have_the_same_windows(decoder):
    content = pillow_jpeg(picture(200, 150), quality=92)
    seekable = bytes(make_seekable(content).content)
    record, whole = as_record(seekable), decoded_whole(content)
    for top, left, height, width in some_windows(200, 150, 40):
        pixels = decoder.decode(record, np.array([top, left, height, width]))
        assert np.array_equal(pixels, whole[top : top + height, left : left + width].reshape(height, -1))


def test_what_does_not_lie_in_the_image_is_left_to_others(decoder):
    record = as_record(variants()["4:2:0"])
    for window in [
        (0, 0, 84, 10),
        (0, 0, 10, 131),
        (83, 0, 1, 1),
        (-1, 0, 5, 5),
        (0, -1, 5, 5),
        (0, 0, 0, 5),
        (1 << 40, 0, 1, 1),
    ]:
        assert decoder.decode(record, np.array(window)) is None
    for content in (b"", b"\xff", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xda\x00\x02\xff\xd9"):
        assert decoder.decode(as_record(content), np.array([0, 0, 1, 1])) is None


def test_colours_that_are_red_green_and_blue_by_their_names_are_left_to_libjpeg(decoder):
    """No JFIF, no Adobe: the identifiers of the components decide."""
    content = pillow_jpeg(picture(40, 50), quality=90)
    jfif = content.index(b"\xff\xe0")
    content = content[:jfif] + content[jfif + 18 :]
    assert_same(decoder, content, [(0, 0, 40, 50)])
    frame, scan = content.index(b"\xff\xc0") + 10, content.index(b"\xff\xda") + 5
    named = bytearray(content)
    for number, name in enumerate(b"RGB"):
        named[frame + 3 * number] = named[scan + 2 * number] = name
    assert decoder.decode(as_record(bytes(named)), np.array([0, 0, 40, 50])) is None


def test_tables_are_not_those_of_the_image_before(decoder):
    content = variants()["4:2:0"]
    assert_same(decoder, content, [(0, 0, 8, 8)])
    for marker in (b"\xff\xc4", b"\xff\xdb"):
        start = content.index(marker)
        length = int.from_bytes(content[start + 2 : start + 4])
        without = content[:start] + content[start + 2 + length :]
        assert decoder.decode(as_record(without), np.array([0, 0, 8, 8])) is None


def test_a_window_needs_no_data_below_it(decoder):
    """The proof that it saves work: what lies below the window is damaged, and nobody notices."""
    content = pillow_jpeg(picture(200, 150), quality=92)
    start = content.index(b"\xff\xda") + 14
    damaged = bytearray(content)
    middle = start + 2 * (len(content) - start) // 3
    damaged[middle:-2] = bytes(0x55 if byte == 0xFF else byte for byte in content[middle:-2][::-1])
    pixels = decoder.decode(as_record(bytes(damaged)), np.array([0, 0, 60, 150]))
    assert np.array_equal(pixels, decoded_whole(content)[:60].reshape(60, -1))
    pixels = decoder.decode(as_record(bytes(damaged)), np.array([0, 0, 200, 150]))
    assert pixels is None or not np.array_equal(pixels, decoded_whole(content).reshape(200, -1))


def test_of_damaged_files_windows_are_those_of_libjpeg_or_left_to_it(decoder):
    random = np.random.default_rng(5)
    sources = [variants(40, 50)[name] for name in ("4:4:4", "4:2:0 optimal tables", "restarts 4:2:0", "grey", "4:4:0")]
    outcomes = {"same": 0, "left": 0}
    for content, number in itertools.product(sources, range(600)):
        damaged = bytearray(content)
        if number % 5 == 0:
            del damaged[int(random.integers(20, len(damaged))) : -2 if number % 2 else None]
        else:
            for _ in range(int(random.integers(1, 4))):
                damaged[int(random.integers(20, len(damaged)))] = int(
                    random.integers(256)
                )  # JFIF's version is its own matter
        window = some_windows(40, 50, 1, number)[int(random.integers(5))]
        pixels = decoder.decode(as_record(bytes(damaged)), np.array(window))
        if pixels is None:
            outcomes["left"] += 1
            continue
        top, left, height, width = window
        whole = decoded_whole(bytes(damaged), strict=False)
        assert np.array_equal(pixels, whole[top : top + height, left : left + width].reshape(height, -1)), number
        outcomes["same"] += 1
    assert min(outcomes.values()) > 100


def test_nothing_is_kept_from_one_image_to_the_next(decoder):
    """After a file that ends in the middle of a block, and with other tables."""
    good, window = variants()["4:2:0 optimal tables"], np.array([3, 4, 70, 90])
    expected = decoded_whole(good)[3:73, 4:94].reshape(70, -1)
    other = bytearray(variants()["4:4:4"])
    start = other.index(b"\xff\xda") + 14
    for cut in range(start, start + 300, 7):
        decoder.decode(as_record(bytes(other[:cut]) + b"\xff\xd9"), window)
        assert np.array_equal(decoder.decode(as_record(good), window), expected)


def test_samples_are_kept_of_a_few_rows_only_however_high_a_window_is(decoder):
    height, width = 4000, 64
    record, own = as_record(pillow_jpeg(picture(height, width), quality=80)), WindowDecoder()
    pixels = own.decode(record, np.array([0, 0, height, width]))
    assert pixels is not None
    assert sum(array.nbytes for array in own._arrays()) < pixels.nbytes + record.nbytes + 200_000


def test_decoders_of_several_threads_work_in_cache_lines_of_their_own():
    decoders = [WindowDecoder() for _ in range(4)]
    for decoder in decoders:
        decoder.reserve(nbytes=1000, width=50, num_pixels=900)
    places = sorted((_address(array), array.nbytes) for decoder in decoders for array in decoder._arrays())
    for (place, nbytes), (following, _) in itertools.pairwise(places):
        assert (place + nbytes - 1) // 128 < following // 128


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
