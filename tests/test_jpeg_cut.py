"""Crop before decode: a window cut out by bytes has, decoded, the pixels that it has in the whole image."""

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from jpegs import opencv_pixels, picture, pillow_jpeg, pixels, variants
from numpy.typing import NDArray

from stagein.formats.errors import ChecksumError
from stagein.formats.jpeg.cut import CutJpegs, cut_windows
from stagein.formats.jpeg.cut_kernels import needed_rows
from stagein.formats.jpeg.header import read_frame
from stagein.formats.jpeg.pieces import SeekableJpeg
from stagein.formats.jpeg.restart import make_seekable

HEIGHT, WIDTH = 83, 130
SEEKABLE = {name: make_seekable(content) for name, content in variants(HEIGHT, WIDTH).items()}


def cut(image: SeekableJpeg, windows: list[tuple[int, int, int, int]]) -> CutJpegs:
    """Cut windows out of one image, from no more than the pieces that the plan names."""
    rows = len(image.piece_ends) - 1
    planned = [needed_rows(top, height, image.mcu_height, rows) for top, _, height, _ in windows]
    header = image.content[: image.piece_ends[0]]
    parts, starts = [], []
    for first, stop in planned:
        starts.append(sum(map(len, parts)))
        parts += [header, image.content[image.piece_ends[first] : image.piece_ends[stop]]]
    start = np.array(starts, np.int64)
    rows_stop = np.append(start[1:], sum(map(len, parts)))
    first_row, stop_row = np.array(planned).T
    places = start, start + len(header), rows_stop, first_row, stop_row - first_row
    return cut_windows(np.concatenate(parts), *places, np.array(windows, np.int64))


def window_of(
    decoded: NDArray[np.uint8], window: tuple[int, int, int, int], origin: NDArray[np.int64]
) -> NDArray[np.uint8]:
    top, left = window[0] - int(origin[0]), window[1] - int(origin[1])
    found = decoded[top : top + window[2], left : left + window[3]]
    assert found.shape[:2] == window[2:]
    return found


def assert_ends_within(decoded: NDArray[np.uint8], origin: NDArray[np.int64], height: int, width: int) -> None:
    """A cut has no pixels that its image has not, though MCUs at the edges do."""
    assert origin[0] + decoded.shape[0] <= height and origin[1] + decoded.shape[1] <= width


def assert_windows_are_those_of_the_whole(name: str, windows: list[tuple[int, int, int, int]]) -> None:
    whole = SEEKABLE[name].content.tobytes()
    decoders = [pixels, opencv_pixels]
    if "CMYK" not in name and "YCCK" not in name:
        decoders.append(lambda content: simplejpeg.decode_jpeg(content))
    result = cut(SEEKABLE[name], windows)
    for number in range(len(windows)):
        assert_ends_within(pixels(result[number].tobytes()), result.origin[number], HEIGHT, WIDTH)
    for decode in decoders:
        expected = decode(whole)
        for number, window in enumerate(windows):
            top, left, height, width = window
            assert np.array_equal(
                window_of(decode(result[number].tobytes()), window, result.origin[number]),
                expected[top : top + height, left : left + width],
            ), (name, window)


@pytest.mark.parametrize("name", SEEKABLE)
def test_pixels_of_a_window_are_those_of_the_whole_image(name: str) -> None:
    corners = [(0, 0, 1, 1), (0, WIDTH - 1, 1, 1), (HEIGHT - 1, 0, 1, 1), (HEIGHT - 1, WIDTH - 1, 1, 1)]
    edges = [(0, 0, HEIGHT, WIDTH), (0, 0, HEIGHT, 1), (HEIGHT - 1, 0, 1, WIDTH), (16, 16, 16, 16), (31, 47, 1, 1)]
    generator = np.random.default_rng(5)
    windows = corners + edges
    for _ in range(12):
        top, left = int(generator.integers(HEIGHT)), int(generator.integers(WIDTH))
        windows.append(
            (top, left, int(generator.integers(1, HEIGHT - top + 1)), int(generator.integers(1, WIDTH - left + 1)))
        )
    assert_windows_are_those_of_the_whole(name, windows)


@settings(max_examples=60)
@given(st.data())
def test_any_size_and_window(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    options = {"subsampling": data.draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]))}
    image = make_seekable(pillow_jpeg(picture(height, width), quality=96, **options))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    window = (top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    result = cut(image, [window])
    expected = pixels(image.content.tobytes())[top : top + window[2], left : left + window[3]]
    assert np.array_equal(window_of(pixels(result[0].tobytes()), window, result.origin[0]), expected)


def test_dali_decodes_cut_windows_to_the_same_pixels() -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    names = [name for name in SEEKABLE if "CMYK" not in name and "YCCK" not in name]
    window = (19, 37, 30, 41)
    files = [SEEKABLE[name].content for name in names]
    results = [cut(SEEKABLE[name], [window]) for name in names]

    @pipeline_def(batch_size=2 * len(names), num_threads=2, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator, unused-ignore]
    def decode() -> object:
        encoded = fn.external_source(source=lambda: files + [result[0] for result in results], batch=True)
        return fn.decoders.image(encoded, adjust_orientation=False)

    pipeline = decode()
    pipeline.build()
    (decoded,) = pipeline.run()
    images = [np.array(decoded.at(number)) for number in range(2 * len(names))]
    for number, name in enumerate(names):
        expected = images[number][19 : 19 + 30, 37 : 37 + 41]
        found = window_of(images[len(names) + number], window, results[number].origin[0])
        assert np.array_equal(found, expected), name


def test_a_cut_is_small_and_has_no_metadata() -> None:
    image = SEEKABLE["metadata"]
    result = cut(image, [(40, 60, 8, 8)])
    content = result[0].tobytes()
    assert b"Exif" not in content and b"profile" not in content and b"JFIF" in content
    assert b"Adobe" in cut(SEEKABLE["CMYK"], [(0, 0, 8, 8)])[0].tobytes()
    assert read_frame(content).height < HEIGHT
    big = make_seekable(pillow_jpeg(picture(375, 500), quality=90))
    assert len(cut(big, [(100, 100, 100, 100)])[0]) < 0.2 * len(big.content)


@pytest.mark.parametrize(
    ("top", "height", "of_16", "of_8"),
    [
        (0, 83, (0, 6), (0, 11)),
        (20, 8, (1, 2), (2, 4)),
        (16, 16, (0, 3), (2, 4)),
        (20, 11, (1, 3), (2, 4)),
        (82, 1, (4, 6), (10, 11)),
        (200, 1, (5, 6), (10, 11)),
    ],
)
def test_plan_names_the_rows_of_a_window_and_its_margin(
    top: int, height: int, of_16: tuple[int, int], of_8: tuple[int, int]
) -> None:
    assert needed_rows(top, height, 16, 6) == of_16
    assert needed_rows(top, height, 8, 11) == of_8


def test_a_file_without_rows_comes_whole() -> None:
    content = np.frombuffer(variants()["progressive 4:2:0"], np.uint8)
    place = np.array([0]), np.array([0]), np.array([len(content)])
    result = cut_windows(content, *place, np.array([0]), np.array([0]), np.array([(10, 10, 5, 5)]))
    assert np.array_equal(result[0], content) and result.origin.tolist() == [[0, 0]]


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(SEEKABLE)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
    keep=st.floats(0, 1),
    header_only=st.booleans(),
)
def test_damaged_pieces_are_refused_or_cut_within_bounds(
    name: str, flips: list[tuple[float, int]], keep: float, header_only: bool
) -> None:
    """Checksums keep damage away; without them nothing worse than a wrong image comes out."""
    image = SEEKABLE[name]
    content = image.content.copy()
    header_bytes = int(image.piece_ends[0])
    for place, flip in flips:
        content[int(place * (header_bytes if header_only else len(content)))] ^= flip
    content = content[: max(header_bytes, int(keep * len(content)))]
    place = np.array([0]), np.array([header_bytes]), np.array([len(content)])
    rows = np.array([len(image.piece_ends) - 1])
    try:
        result = cut_windows(content, *place, np.array([0]), rows, np.array([(10, 10, 50, 50)]))
    except ChecksumError:
        return
    assert len(result[0]) <= len(content)


def test_places_beyond_the_source_are_refused() -> None:
    content = SEEKABLE["4:2:0"].content
    header_bytes = int(SEEKABLE["4:2:0"].piece_ends[0])
    for places in [(0, header_bytes, len(content) + 1), (-1, header_bytes, len(content)), (9, 8, len(content))]:
        numbers = [np.array([place]) for place in places]
        with pytest.raises(ChecksumError, match="no seekable JPEG"):
            cut_windows(
                content, *numbers, np.array([0]), np.array([6]), np.array([(0, 0, 9, 9)]), np.empty(10**6, np.uint8)
            )
