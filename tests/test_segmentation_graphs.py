"""Image and mask are seen through the same window: numbers as Pillow and numpy give them, on any world size."""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from stagein.formats import Field, Schema, Writer
from stagein.formats.errors import SourceError, UsageError
from stagein.loaders import DataLoader, RecordDataset, segmentation_eval, segmentation_train
from stagein.loaders.augment import random_flips, random_resized_crops, train_uniforms
from stagein.loaders.graphs import IMAGENET_MEAN, IMAGENET_STD
from stagein.loaders.label_png import grey_labels

pytest.importorskip("nvidia.dali")
SIZES = [(64, 64), (120, 80), (90, 151), (127, 125), (53, 100), (100, 75), (81, 64)]
IMAGE = Field(kind="encoded", shape=(None, None, 3), encoding="jpeg")
PNG_MASK = Field(kind="encoded", shape=(None, None), encoding="png")
HW = Field(kind="tensor", dtype="int32", shape=(2,))


def picture(height: int, width: int, seed: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width] / 40
    waves = [127.5 + 120 * np.sin((1 + seed / 9) * x + (2 - seed / 9) * y + channel) for channel in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def labels(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Every pixel another number: whatever mixes or moves them shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def saved(image: Image.Image, form: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def mask_file(numbers: NDArray[np.uint8], with_palette: bool) -> bytes:
    image = Image.fromarray(numbers)
    if with_palette:
        image = Image.frombytes("P", image.size, numbers.tobytes())
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return saved(image, "png", **({"transparency": 3} if with_palette else {}))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> RecordDataset:
    """Images of many shapes, and masks as grey PNGs and as PNGs with a palette."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.st"
    with Writer(path, Schema(fields={"image": IMAGE, "mask": PNG_MASK, "hw": HW}, primary="image")) as writer:
        for number, (height, width) in enumerate(SIZES):
            image = saved(picture(height, width, number), "jpeg", quality=95)
            mask = mask_file(labels(height, width, number), with_palette=bool(number % 2))
            writer.write({"image": image, "mask": mask, "hw": [height, width]})
    return RecordDataset(path, staged=None)


def original(pairs: RecordDataset, sample: int) -> Image.Image:
    (stored,) = pairs.records.read_records([sample])
    return Image.open(io.BytesIO(stored.tobytes()))


def assert_alike(image: torch.Tensor, expected: Image.Image) -> None:
    grey = (image.numpy().transpose(1, 2, 0).astype(np.float64) * IMAGENET_STD + IMAGENET_MEAN) * 255
    assert np.abs(grey - np.asarray(expected, np.float64)).mean() < 0.5


def assert_nearest(mask: torch.Tensor, numbers: NDArray[np.generic], top_left, bottom_right, mirrored=False) -> None:
    """Each number is the one at the middle of its part of a region of `numbers`.

    DALI works in float32: a middle on the border of two pixels may fall to either, for the whole row or column.
    """
    size = len(mask)
    steps = (np.arange(size) + 0.5) / size
    middles = [start + steps * (end - start) for start, end in zip(top_left, bottom_right, strict=True)]
    below, above = ([np.floor(each + shift).astype(int) for each in middles] for shift in (-1e-4, 1e-4))
    found = mask.numpy()[:, ::-1] if mirrored else mask.numpy()
    fits = np.zeros((2, size, size), np.bool_)
    for number, rows in enumerate((below[0], above[0])):
        fits[number] = np.any([found == numbers[np.ix_(rows, columns)] for columns in (below[1], above[1])], axis=0)
    assert fits.all(axis=2).any(axis=0).all()


def test_training_pairs_are_the_same_window_and_flip_of_both(pairs):
    seen_flips = set()
    for seed in range(3):
        (batch,) = DataLoader(pairs, 7, device="cpu", seed=seed, transform=segmentation_train(48))
        assert (batch["mask"].dtype, batch["mask"].shape) == (torch.uint8, (7, 48, 48))
        assert set(batch) == {"image", "mask"}
        uniforms = train_uniforms(seed, 0, np.arange(7))
        windows = random_resized_crops(uniforms, np.array(SIZES, np.int32), (0.25, 1.0))
        flips = random_flips(uniforms)
        seen_flips |= set(flips.tolist())
        for sample in range(7):
            (y, x), (height, width) = windows.start[sample].tolist(), windows.extent[sample].tolist()
            box = (x, y, x + width, y + height)
            image = original(pairs, sample).crop(box).resize((48, 48), Image.Resampling.BILINEAR)
            if flips[sample]:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            assert_alike(batch["image"][sample], image)
            numbers = labels(*SIZES[sample], sample)
            assert_nearest(batch["mask"][sample], numbers, (y, x), (y + height, x + width), bool(flips[sample]))
    assert seen_flips == {0, 1}


def test_evaluation_pairs_are_the_same_centre_of_both(pairs):
    (batch,) = DataLoader(pairs, 7, device="cpu", transform=segmentation_eval(48, resize=60))
    for sample, (height, width) in enumerate(SIZES):
        resized = [60 * extent // min(height, width) for extent in (height, width)]
        offset = [round((extent - 48) / 2) for extent in resized]
        box = (offset[1], offset[0], offset[1] + 48, offset[0] + 48)
        picture = original(pairs, sample).resize((resized[1], resized[0]), Image.Resampling.BILINEAR)
        assert_alike(batch["image"][sample], picture.crop(box))
        scales = np.divide((height, width), resized)
        start, end = offset * scales, np.add(offset, 48) * scales
        assert_nearest(batch["mask"][sample], labels(height, width, sample), start, end)


def test_pairs_do_not_depend_on_the_number_of_ranks(pairs):
    def epoch(rank: int, world: int) -> list[bytes]:
        loader = DataLoader(
            pairs, 7 // world, shuffle=True, device="cpu", transform=segmentation_train(16), distributed=(rank, world)
        )
        return [mask.numpy().tobytes() for batch in loader for mask in batch["mask"]]

    assert sorted(epoch(0, 1)) == sorted(epoch(0, 3) + epoch(1, 3) + epoch(2, 3))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16"])
def test_masks_that_are_tensors_keep_their_type(tmp_path, dtype):
    mask_field = Field(kind="tensor", dtype=dtype, shape=(64, 80))
    with Writer(tmp_path / "t.st", Schema(fields={"image": IMAGE, "mask": mask_field, "hw": HW})) as writer:
        for number in range(3):
            image = saved(picture(64, 80, number), "jpeg")
            writer.write({"image": image, "mask": labels(64, 80, number).astype(dtype), "hw": [64, 80]})
    dataset = RecordDataset(tmp_path / "t.st", staged=None)
    (batch,) = DataLoader(dataset, 3, device="cpu", seed=5, transform=segmentation_train(32))
    assert str(batch["mask"].dtype) == f"torch.{dtype}"
    uniforms = train_uniforms(5, 0, np.arange(3))
    windows, flips = (
        random_resized_crops(uniforms, np.array([(64, 80)] * 3, np.int32), (0.25, 1.0)),
        random_flips(uniforms),
    )
    for sample in range(3):
        (y, x), (height, width) = windows.start[sample].tolist(), windows.extent[sample].tolist()
        numbers = labels(64, 80, sample)
        assert_nearest(batch["mask"][sample], numbers, (y, x), (y + height, x + width), bool(flips[sample]))


def test_a_mask_of_another_size_is_a_bad_record_by_number(tmp_path):
    with Writer(tmp_path / "t.st", Schema(fields={"image": IMAGE, "mask": PNG_MASK, "hw": HW})) as writer:
        for number, mask_height in enumerate((64, 64, 65, 64)):
            mask = mask_file(labels(mask_height, 64, number), with_palette=False)
            writer.write({"image": saved(picture(64, 64, number), "jpeg"), "mask": mask, "hw": [64, 64]})
    dataset = RecordDataset(tmp_path / "t.st", staged=None)
    with pytest.raises(SourceError, match="mask of record 2 has 65 x 64 pixels, its image 64 x 64"):
        list(DataLoader(dataset, 4, device="cpu", transform=segmentation_train(32)))
    with pytest.warns(RuntimeWarning, match="Record 3 takes its place"):
        (batch,) = DataLoader(dataset, 4, device="cpu", transform=segmentation_train(32), on_error="replace")
    assert batch["mask"].shape == (4, 32, 32)


def test_what_is_no_mask_is_refused_by_name(pairs):
    with pytest.raises(UsageError, match="needs the field 'truth'"):
        next(iter(DataLoader(pairs, 2, device="cpu", transform=segmentation_train(mask="truth"))))
    with pytest.raises(UsageError, match=r"'hw' is int32 .*, no mask"):
        next(iter(DataLoader(pairs, 2, device="cpu", transform=segmentation_train(mask="hw"))))


@pytest.mark.parametrize(
    ("mode", "form", "why"),
    [("RGB", "png", "of colours"), ("1", "png", "1 bits a pixel"), ("L", "jpeg", "no PNG")],
)
def test_files_that_do_not_hold_numbers_are_refused(mode, form, why):
    content = saved(Image.new(mode, (8, 8)), form)
    with pytest.raises(ValueError, match=why):
        grey_labels(np.frombuffer(content, np.uint8))


def test_a_palette_goes_and_the_numbers_stay():
    numbers = labels(33, 41, 1)
    file, size = grey_labels(np.frombuffer(mask_file(numbers, with_palette=True), np.uint8))
    image = Image.open(io.BytesIO(file.tobytes()))
    assert (image.mode, size) == ("L", (33, 41))
    np.testing.assert_array_equal(np.asarray(image), numbers)
