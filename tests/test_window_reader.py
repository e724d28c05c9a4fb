"""Crop windows read from a data set: right pixels, only the rows needed, every byte checked."""

import itertools
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from jpegs import picture, pillow_jpeg, pixels, variants
from numpy.typing import NDArray

from stagein.formats import Dataset, convert, scan_imagefolder
from stagein.formats.errors import ChecksumError, SourceError, UsageError
from stagein.formats.jpeg.rows import rows_name
from stagein.formats.seekable_images import SeekableJpegs
from stagein.formats.sources.images import change_images


@pytest.fixture(scope="module")
def seekable_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two sizes in several shards; the last of them cannot be made seekable."""
    root = tmp_path_factory.mktemp("images")
    (root / "class").mkdir()
    for number, content in enumerate(variants().values()):
        (root / "class" / f"{number:02d}.jpg").write_bytes(content)
    for number in range(28, 40):
        (root / "class" / f"{number}.jpg").write_bytes(pillow_jpeg(picture(200, 260, seed=number), quality=90))
    (root / "class" / "99.jpg").write_bytes(pillow_jpeg(picture(64, 64)).replace(b"\xff\xc0", b"\xff\xc9"))
    source = change_images(scan_imagefolder(root), SeekableJpegs())
    convert(source, root / "train.st", shard_bytes=200 << 10, chunk_bytes=16 << 10)
    return root / "train.st"


def random_windows(sizes: NDArray[np.int32], seed: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    start = (sizes * generator.random(sizes.shape)).astype(np.int64)
    extent = 1 + ((sizes - start) * generator.random(sizes.shape)).astype(np.int64)
    return np.concatenate([start, np.minimum(extent, sizes - start)], axis=1)


def copy_of(path: Path, target: Path) -> Path:
    shutil.copytree(path, target, symlinks=True)
    for file in target.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o644)
    return target


def flip_byte(dataset: Dataset, record: int, place: int) -> None:
    """Change byte `place` of a record on disk."""
    shard = dataset.path / dataset.manifest.shards[int(dataset.index.shard[record])].file
    content = bytearray(shard.read_bytes())
    content[int(dataset.index.offset[record]) + place] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_windows_have_the_pixels_of_the_whole_images(seekable_path: Path, seed: int) -> None:
    with Dataset(seekable_path) as dataset:
        records = np.random.default_rng(seed).permutation(len(dataset))
        windows = random_windows(dataset.columns["hw"][records].astype(np.int32), seed)
        used_again = np.empty((2, 1 << 20), np.uint8)
        for part in np.array_split(np.arange(len(records)), 3):
            memory = itertools.cycle(used_again)
            result = dataset.read_windows(records[part], windows[part], lambda _, memory=memory: next(memory))
            assert np.shares_memory(result.content, used_again[1])
            for place, number in enumerate(part):
                whole = dataset.read_records([int(records[number])])[0].tobytes()
                if records[number] == len(dataset) - 1:
                    assert result[place].tobytes() == whole and not result.origin[place].any()
                    continue
                top, left, height, width = windows[number].tolist()
                y, x = (windows[number, :2] - result.origin[place]).tolist()
                found = pixels(result[place].tobytes())[y : y + height, x : x + width]
                assert np.array_equal(found, pixels(whole)[top : top + height, left : left + width])


def test_a_plain_data_set_gives_whole_images(jpeg_dataset: Dataset) -> None:
    assert not jpeg_dataset.is_seekable
    result = jpeg_dataset.read_windows([3, 1], [(5, 5, 9, 9), (0, 0, 3, 3)])
    for found, expected in zip(result, jpeg_dataset.read_records([3, 1]), strict=True):
        assert np.array_equal(found, expected)


def test_only_the_rows_of_the_window_are_read_and_what_is_read_is_checked(seekable_path: Path, tmp_path: Path) -> None:
    """A flipped byte is an error where it is read, and nobody notices it elsewhere."""
    with Dataset(copy_of(seekable_path, tmp_path / "copy.st")) as dataset:
        record = 30
        table = dataset.readers[rows_name("image")].read_records([record])[0].view(np.uint32).reshape(-1, 2)
        middle_row = int(table[1 + len(table) // 2, 0]) + 20
        top, middle, bottom = (0, 0, 30, 30), (90, 0, 30, 30), (170, 0, 30, 30)
        flip_byte(dataset, record, middle_row)
        dataset.read_windows([record, record], [top, bottom])
        with pytest.raises(ChecksumError, match=f"record {record} in .* is damaged"):
            dataset.read_windows([record], [middle])
        flip_byte(dataset, record, middle_row)
        dataset.read_windows([record], [middle])
        flip_byte(dataset, record, 30)  # in the header, which every window needs
        for window in (top, middle, bottom):
            with pytest.raises(ChecksumError, match=f"record {record} in"):
                dataset.read_windows([record], [window])


def overwrite(path: Path, place: int, content: bytes) -> None:
    """Change a file in place, so that those who have mapped it see the change."""
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


def test_a_row_table_damaged_after_it_was_opened_gives_an_error_or_the_right_pixels(
    seekable_path: Path, tmp_path: Path
) -> None:
    copy = copy_of(seekable_path, tmp_path / "copy.st")
    path = copy / rows_name("image") / "c" / "0" / "0"
    good = path.read_bytes()
    seen = set()
    with Dataset(copy) as dataset:
        records = range(8)
        whole = [pixels(content.tobytes()) for content in dataset.read_records(records)]
        windows = random_windows(dataset.columns["hw"].astype(np.int32), 0)
        dataset.read_windows([0], [windows[0]])
        for place in range(0, 400, 3):
            overwrite(path, place, bytes([good[place] ^ 0x41]))
            for record in records:
                try:
                    result = dataset.read_windows([record], [windows[record]])
                except (ChecksumError, SourceError) as error:
                    seen.add(type(error))
                    continue
                top, left, height, width = windows[record].tolist()
                y, x = (windows[record, :2] - result.origin[0]).tolist()
                found = pixels(result[0].tobytes())[y : y + height, x : x + width]
                assert np.array_equal(found, whole[record][top : top + height, left : left + width])
            overwrite(path, place, good[place : place + 1])
    assert seen == {ChecksumError, SourceError}


def test_a_damaged_row_table_is_found_when_it_is_opened(seekable_path: Path, tmp_path: Path) -> None:
    copy = copy_of(seekable_path, tmp_path / "copy.st")
    overwrite(copy / rows_name("image") / "c" / "0" / "0", 100, b"\xff")
    with Dataset(copy) as dataset, pytest.raises(ChecksumError, match="image_rows/c/0/0 is damaged"):
        dataset.read_windows([1], [(40, 0, 10, 10)])


def test_a_bad_shard_of_a_staged_copy_is_read_from_the_source(seekable_path: Path, tmp_path: Path) -> None:
    copy = copy_of(seekable_path, tmp_path / "copy.st")
    with Dataset(copy) as near:
        flip_byte(near, 5, 700)
    with Dataset(seekable_path, staged_path=copy) as dataset, pytest.warns(RuntimeWarning, match="from the source"):
        (found,) = dataset.read_windows([5], [(0, 0, 83, 130)])
        assert np.array_equal(pixels(found.tobytes()), pixels(dataset[5]["image"].tobytes()))


def test_a_bad_row_table_of_a_staged_copy_ends_in_an_error(seekable_path: Path, tmp_path: Path) -> None:
    copy = copy_of(seekable_path, tmp_path / "copy.st")
    path = copy / rows_name("image") / "c" / "0" / "0"
    table = np.frombuffer(path.read_bytes(), np.uint32).reshape(-1, 2).copy()
    table[2:, 1] ^= 1
    with Dataset(seekable_path, staged_path=copy) as dataset:
        dataset.read_windows([1], [(40, 0, 10, 10)])
        overwrite(path, 0, table.tobytes())
        with pytest.raises(ChecksumError, match="row table"):
            dataset.read_windows([1], [(40, 0, 10, 10)])


def test_threads_and_copies_read_the_same(seekable_path: Path) -> None:
    dataset = Dataset(seekable_path)
    records = np.arange(len(dataset))
    windows = random_windows(dataset.columns["hw"].astype(np.int32), 1)
    expected = [file.tobytes() for file in dataset.read_windows(records, windows)]
    copies = [dataset, dataset, pickle.loads(pickle.dumps(dataset))]
    with ThreadPoolExecutor(3) as pool:
        for result in pool.map(lambda each: each.read_windows(records, windows), copies):
            assert [file.tobytes() for file in result] == expected


def test_windows_must_be_as_many_as_records(seekable_path: Path) -> None:
    with Dataset(seekable_path) as dataset:
        assert len(dataset.read_windows([], np.empty((0, 4)))) == 0
        with pytest.raises(UsageError, match=r"windows of shape \(2, 4\)"):
            dataset.read_windows([1, 2], [(0, 0, 1, 1)])
