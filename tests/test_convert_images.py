"""Images changed while they are packed: made seekable, shrunk, and what is kept as it is and counted."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from jpegs import picture, pillow_jpeg, pixels, variants
from PIL import Image

from stagein.formats import Dataset, convert, scan_imagefolder, verify
from stagein.formats.checksums import crc32c
from stagein.formats.errors import UsageError
from stagein.formats.jpeg.rows import rows_name
from stagein.formats.manifest import Manifest
from stagein.formats.seekable_images import KEPT, MADE_SEEKABLE, SeekableJpegs
from stagein.formats.sources.images import BYTES_AFTER, BYTES_BEFORE, change_images
from stagein.formats.sources.npy import scan_npy
from stagein.loaders import RecordDataset
from stagein.loaders.shrink import ShrinkImages

ARITHMETIC = "arithmetic, lossless or hierarchical coding (SOF9)"


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of JPEG, one that cannot be handled, and a PNG, in two class folders."""
    root = tmp_path_factory.mktemp("mixed")
    for number, content in enumerate(variants().values()):
        path = root / f"class{number % 2}" / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (root / "class0" / "arithmetic.jpg").write_bytes(variants()["4:2:0"].replace(b"\xff\xc0", b"\xff\xc9"))
    png = io.BytesIO()
    Image.fromarray(picture(40, 50)).save(png, "PNG")
    (root / "class1" / "image.png").write_bytes(png.getvalue())
    return root


@pytest.fixture(scope="module")
def seekable_path(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("seekable") / "train.st"
    source = change_images(scan_imagefolder(mixed_folder), SeekableJpegs())
    converted = convert(source, target, shard_bytes=64 << 10, chunk_bytes=16 << 10)
    assert converted.counts[MADE_SEEKABLE] == len(variants())
    assert converted.counts[f"{KEPT}{ARITHMETIC}"] == converted.counts[f"{KEPT}no JPEG"] == 1
    files = [path for path in mixed_folder.rglob("*") if path.is_file()]
    assert converted.counts[BYTES_BEFORE] == sum(path.stat().st_size for path in files)
    assert converted.counts[BYTES_AFTER] == sum(len(image) for image in Dataset(target).read_records(range(len(files))))
    return target


def test_records_hold_the_same_pixels_and_what_cannot_be_handled_as_it_was(
    mixed_folder: Path, seekable_path: Path
) -> None:
    files = sorted(path for path in mixed_folder.rglob("*") if path.is_file())
    with Dataset(seekable_path) as dataset:
        assert len(dataset) == len(files)
        for path, record in zip(files, dataset, strict=True):
            assert set(record) == {"image", "label", "hw"}
            content = record["image"].tobytes()
            if path.name in ("arithmetic.jpg", "image.png"):
                assert content == path.read_bytes()
            else:
                assert np.array_equal(pixels(content), pixels(path.read_bytes()))
                assert tuple(record["hw"]) == pixels(content).shape[:2]
    assert not verify(seekable_path).problems


def test_the_row_table_is_there_for_hdf5_and_zarr(seekable_path: Path) -> None:
    dataset, name = Dataset(seekable_path), rows_name("image")
    reader = dataset.readers[name]
    tables = [table.view(np.uint32).reshape(-1, 2) for table in reader.read_records(range(len(dataset)))]
    assert sum(len(table) == 0 for table in tables) == 2
    for table, image in zip(tables, dataset.read_records(range(len(dataset))), strict=True):
        if len(table):
            assert table[0, 1] == 0 and table[0, 0] in (8, 16, 32)
            assert table[-1, 0] == len(image)
            for end, expected in table[1:].tolist():
                assert crc32c(image[:end]) == expected
    array = zarr.open_group(seekable_path, mode="r")[name]
    assert isinstance(array, zarr.Array)
    assert np.array_equal(np.asarray(array[:]), np.concatenate(tables))
    with h5py.File(seekable_path / "shards" / "00000.h5") as file:
        first = Manifest.load(seekable_path).shards[0].records
        assert np.array_equal(file[f"{name}/data"][...], np.concatenate(tables[:first]))


def test_verify_finds_a_damaged_row_table(seekable_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.st"
    subprocess.run(["cp", "-r", seekable_path, copy], check=True)
    path = copy / rows_name("image") / "c" / "0" / "0"
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    assert any(rows_name("image") in problem.file and problem.damage for problem in verify(copy).problems)


def test_any_number_of_workers_gives_the_same_data_set(mixed_folder: Path, seekable_path: Path, tmp_path: Path) -> None:
    source = change_images(scan_imagefolder(mixed_folder), SeekableJpegs())
    again = convert(source, tmp_path / "again.st", shard_bytes=64 << 10, chunk_bytes=16 << 10, workers=2)
    assert again.manifest.id == Manifest.load(seekable_path).id


def test_a_plain_data_set_of_the_same_images_is_another(
    mixed_folder: Path, seekable_path: Path, tmp_path: Path
) -> None:
    plain = convert(scan_imagefolder(mixed_folder), tmp_path / "plain.st")
    assert rows_name("image") not in plain.manifest.record_schema.fields
    assert plain.manifest.source != Manifest.load(seekable_path).source
    assert plain.counts == {}


def test_what_would_grow_much_is_kept_as_it_is() -> None:
    """A strip of one colour, one MCU wide: a restart marker a row costs more than its pixels."""
    flat = pillow_jpeg(np.full((60_000, 8, 3), 99, np.uint8))
    kept = SeekableJpegs().apply(memoryview(flat), "image")
    assert kept.outcome == f"{KEPT}it would grow by more than an eighth"
    assert bytes(kept.content) == flat and len(kept.values[rows_name("image")]) == 0  # type: ignore[arg-type]


def test_loader_does_not_show_the_row_table(seekable_path: Path) -> None:
    assert RecordDataset(seekable_path).fields == ("image", "label", "hw")


def test_images_are_shrunk_by_area_and_their_size_column_follows(tmp_path: Path) -> None:
    root = tmp_path / "images"
    sizes = {"wide": (200, 400), "high": (300, 150), "small": (60, 90), "odd": (101, 333)}
    for name, size in sizes.items():
        (root / name).mkdir(parents=True)
        (root / name / "a.jpg").write_bytes(pillow_jpeg(picture(*size), quality=98, subsampling="4:4:4"))
    change = ShrinkImages(max_side=100, quality=98)
    converted = convert(change_images(scan_imagefolder(root), change), tmp_path / "small.st")
    assert converted.counts["images shrunk"] == 4
    with Dataset(tmp_path / "small.st") as dataset:
        by_name = dict(zip(sorted(sizes), dataset, strict=True))
    assert {name: tuple(record["hw"]) for name, record in by_name.items()} == {
        "wide": (50, 100),
        "high": (100, 50),
        "small": (60, 90),
        "odd": (30, 100),
    }
    for name, record in by_name.items():
        shrunk = pixels(record["image"].tobytes())
        assert shrunk.shape[:2] == tuple(record["hw"])
        original = Image.fromarray(pixels((root / name / "a.jpg").read_bytes()))
        by_area, by_picking = (
            np.asarray(original.resize(shrunk.shape[1::-1], filtering)).astype(float)
            for filtering in (Image.Resampling.BOX, Image.Resampling.NEAREST)
        )
        assert np.abs(shrunk - by_area).mean() < 2.5
        assert name == "small" or np.abs(shrunk - by_area).mean() < 0.3 * np.abs(shrunk - by_picking).mean()


def test_shrinking_handles_grey_png_cmyk_and_low_quality(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.fromarray(picture(90, 120)).save(png, "PNG")
    images = {
        "grey": pillow_jpeg(picture(90, 120, 1), quality=90),
        "png": png.getvalue(),
        "cmyk": pillow_jpeg(picture(90, 120, 4), "CMYK"),
        "coarse": pillow_jpeg(picture(90, 120), quality=3),
        "truncated": pillow_jpeg(picture(90, 120))[:2000],
    }
    results = {name: ShrinkImages(40, 95).apply(memoryview(content), "image") for name, content in images.items()}
    assert {name: result.outcome.removeprefix("images ") for name, result in results.items()} == {
        "grey": "shrunk",
        "png": "shrunk",
        "cmyk": "not shrunk: colours are CMYK",
        "coarse": "shrunk",
        "truncated": "not shrunk: damaged JPEG",
    }
    for name in ("grey", "png", "coarse"):
        assert results[name].size == pixels(bytes(results[name].content)).shape[:2] == (30, 40)
        assert len(results[name].content) <= len(images[name])
    assert pixels(bytes(results["grey"].content)).ndim == 2


def test_quality_alone_keeps_the_size_and_takes_what_is_smaller(tmp_path: Path) -> None:
    change = ShrinkImages(quality=50)
    fine, coarse = (pillow_jpeg(picture(64, 64), quality=quality) for quality in (95, 20))
    smaller = change.apply(memoryview(fine), "image")
    assert len(smaller.content) < len(fine) and smaller.size == (64, 64)
    assert bytes(change.apply(memoryview(coarse), "image").content) == coarse
    untouched = ShrinkImages(max_side=64).apply(memoryview(fine), "image")
    assert bytes(untouched.content) == fine and untouched.outcome == "images not shrunk: small enough"


def test_sources_without_images_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2000), np.float32))
    with pytest.raises(UsageError, match="no field of JPEG or PNG images"):
        change_images(scan_npy(tmp_path / "a.npy"), SeekableJpegs())


def _command(folder: Path, target: Path) -> list[str]:
    options = ["--seekable-jpeg", "--image-max-side", "96", "--shard-bytes", "100kB", "--workers", "2", "--json"]
    return [sys.executable, "-m", "stagein.tools.cli", "convert", "imagefolder", str(folder), str(target), *options]


def test_killed_on_the_command_line_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for number in range(60):
        (folder / f"{number}.jpg").write_bytes(pillow_jpeg(picture(130, 140, seed=number), quality=90))
    whole = subprocess.run(_command(folder.parent, tmp_path / "whole.st"), check=True, capture_output=True, text=True)
    report = json.loads(whole.stdout)
    assert report["counts"][MADE_SEEKABLE] == report["counts"]["images shrunk"] == 60

    killed = subprocess.Popen(_command(folder.parent, tmp_path / "killed.st"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed.st.part").glob("journal/*.npz")) and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    resumed = subprocess.run(
        _command(folder.parent, tmp_path / "killed.st"), check=True, capture_output=True, text=True
    )
    again = json.loads(resumed.stdout)
    assert again["id"] == report["id"] and again["reused_shards"] > 0
    assert again["counts"] == report["counts"]
