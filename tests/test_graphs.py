"""The ready graphs give the pixels that PIL and numpy give for the same windows; one record is decoded at a time."""

import gc
import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from stagein.formats import convert, scan_imagefolder
from stagein.formats.errors import UsageError
from stagein.loaders import DataLoader, RecordDataset, image_eval, image_train
from stagein.loaders.augment import random_flips, random_resized_crops, train_uniforms
from stagein.loaders.graphs import IMAGENET_MEAN, IMAGENET_STD

pytest.importorskip("nvidia.dali")
SIZES = [(64, 64), (120, 80), (90, 301), (257, 255), (33, 200), (400, 300)]
MEAN_TOLERANCE, LARGEST_TOLERANCE = 0.5, 8.0
"""In grey levels of 255: decoders differ by rounding, more where the colour of neighbouring pixels is interpolated."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> RecordDataset:
    """Smooth colour pictures of many shapes: JPEG with and without subsampled colour, grey, EXIF-rotated, PNG."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "images" / "all").mkdir(parents=True)
    for number, (height, width) in enumerate(SIZES):
        image = Image.fromarray(smooth_picture(height, width, number))
        image.save(root / "images" / "all" / f"{number}.jpg", quality=95, subsampling=number % 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees when shown
    Image.fromarray(smooth_picture(100, 150, 10)).save(root / "images" / "all" / "rotated.jpg", quality=95, exif=exif)
    Image.fromarray(smooth_picture(70, 50, 11)).convert("L").save(root / "images" / "all" / "grey.jpg", quality=95)
    Image.fromarray(smooth_picture(70, 90, 12)).save(root / "images" / "all" / "picture.png")
    convert(scan_imagefolder(root / "images"), root / "pictures.st")
    return RecordDataset(root / "pictures.st", staged=None)


def smooth_picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 40
    waves = [np.sin(random.uniform(0.3, 1.5) * x + random.uniform(0.3, 1.5) * y + channel) for channel in range(3)]
    return np.stack([127.5 + 120 * wave for wave in waves], axis=-1).astype(np.uint8)


def original(pictures: RecordDataset, sample: int) -> Image.Image:
    (stored,) = pictures.records.read_records([sample])
    return Image.open(io.BytesIO(stored.tobytes())).convert("RGB")


def loaded(pictures: RecordDataset, **arguments) -> list[NDArray[np.float32]]:
    """The images of an unshuffled epoch, by sample."""
    batches = DataLoader(pictures, 4, device="cpu", **arguments)
    return [image.numpy() for batch in batches for image in batch["image"]]


def in_grey_levels(image: NDArray[np.float32]) -> NDArray[np.float64]:
    """Undo the normalisation: height x width x channel, 0 … 255."""
    return (image.transpose(1, 2, 0).astype(np.float64) * IMAGENET_STD + IMAGENET_MEAN) * 255


def assert_alike(image: NDArray[np.float32], expected: Image.Image) -> None:
    difference = np.abs(in_grey_levels(image) - np.asarray(expected, dtype=np.float64))
    assert difference.mean() < MEAN_TOLERANCE
    assert difference.max() < LARGEST_TOLERANCE


def test_train_images_are_pils_crops_resized_and_mirrored(pictures):
    for epoch in range(3):
        loader_seed = 10 + epoch
        images = loaded(pictures, transform=image_train(48), seed=loader_seed)
        uniforms = train_uniforms(loader_seed, 0, np.arange(len(pictures)))
        windows = random_resized_crops(uniforms, pictures.records.columns["hw"])
        flips = random_flips(uniforms)
        assert 0 < flips.sum() < len(pictures)
        for sample, image in enumerate(images):
            (y, x), (height, width) = windows.start[sample].tolist(), windows.extent[sample].tolist()
            expected = (
                original(pictures, sample)
                .crop((x, y, x + width, y + height))
                .resize((48, 48), Image.Resampling.BILINEAR)
            )
            if flips[sample]:
                expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            assert_alike(image, expected)


def test_eval_images_are_pils_resize_and_centre_crop(pictures):
    images = loaded(pictures, transform=image_eval(56, resize=64))
    for sample, image in enumerate(images):
        picture = original(pictures, sample)
        short = min(picture.size)
        width, height = (64 * extent // short for extent in picture.size)
        left, top = round((width - 56) / 2), round((height - 56) / 2)
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        assert_alike(image, resized.crop((left, top, left + 56, top + 56)))


def test_the_edge_of_the_centre_is_smoothed_over_the_pixels_beyond_it(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    (tmp_path / "images" / "all").mkdir(parents=True)
    Image.fromarray(noise).save(tmp_path / "images" / "all" / "noise.png")
    convert(scan_imagefolder(tmp_path / "images"), tmp_path / "noise.st")
    (image,) = loaded(RecordDataset(tmp_path / "noise.st", staged=None), transform=image_eval(40, resize=60))
    resized = Image.fromarray(noise).resize((80, 60), Image.Resampling.BILINEAR)
    difference = np.abs(in_grey_levels(image) - np.asarray(resized.crop((20, 10, 60, 50)), dtype=np.float64))
    assert difference.max() < 2


def test_mean_and_std_are_those_of_values_from_0_to_1(pictures):
    plain = loaded(pictures, transform=image_eval(32, resize=32, mean=(0, 0, 0), std=(1, 1, 1)))
    shifted = loaded(pictures, transform=image_eval(32, resize=32, mean=(0.5, 0, 0), std=(1, 1, 0.25)))
    assert 0 <= min(image.min() for image in plain) < 0.1
    assert 0.9 < max(image.max() for image in plain) <= 1
    for before, after in zip(plain, shifted, strict=True):
        np.testing.assert_allclose(
            after, (before - np.array([[[0.5]], [[0]], [[0]]])) / np.array([[[1]], [[1]], [[0.25]]]), atol=1e-5
        )


def test_without_antialias_the_pixels_differ(pictures):
    smooth, sharp = (loaded(pictures, transform=image_train(16, antialias=antialias)) for antialias in (True, False))
    assert np.abs(smooth[5] - sharp[5]).max() > 0.01


def test_a_centre_larger_than_the_resized_image_is_refused():
    with pytest.raises(UsageError, match="centre of 224 pixels of images resized to 200"):
        image_eval(224, resize=200)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": (8, 8)}, r"size=\(8, 8\) is no number of pixels"),
        ({"size": "8"}, "size='8' is no number of pixels"),
        ({"size": 8.5}, "size=8.5 is no number of pixels"),
        ({"mean": (0, 0)}, r"mean=\(0, 0\) is not one number for each"),
        ({"mean": 0.5}, "mean=0.5 is not one number for each"),
        ({"mean": "abc"}, "mean='abc' is neither a number nor several"),
        ({"std": (0, 1, 1)}, r"std=\(0, 1, 1\) divides"),
        ({"std": (float("nan"), 1, 1)}, "divides"),
    ],
)
def test_numbers_that_no_image_can_be_made_with_are_refused(arguments, sentence):
    for graph in (image_train, image_eval):
        with pytest.raises(UsageError, match=sentence):
            graph(**arguments)
    with pytest.raises(UsageError, match="resize='8' is no number"):
        image_eval(8, resize="8")


def test_a_field_that_is_no_size_of_images_is_refused_by_its_name(pictures):
    with pytest.raises(UsageError, match="'label' is not the size of each image"):
        loaded(pictures, transform=image_train(size_column="label"))


@pytest.mark.parametrize(
    ("built", "said"),
    [(None, "NoneType"), ([1], "list"), ({"x": 3}, r"\{'x': 'int'\}")],
    ids=["None", "list", "no node"],
)
def test_a_function_that_returns_no_nodes_is_refused(pictures, built, said):
    with pytest.raises(UsageError, match=rf"returns a dict of nodes by the name of their field, not {said}"):
        loaded(pictures, transform=lambda nodes: built)


def test_what_makes_a_graph_is_no_graph(pictures):
    with pytest.raises(UsageError, match=r"call it, transform=image_train\(…\)"):
        DataLoader(pictures, 3, device="cpu", transform=image_train)


@pytest.mark.parametrize("on_error", ["raise", "replace"])
def test_a_graph_that_fails_for_another_reason_than_its_data_is_at_fault_itself(pictures, on_error):
    def too_large(nodes):
        from nvidia.dali import fn

        return {"image": fn.crop(fn.decoders.image(nodes["image"]), crop=[9000, 9000])}

    loader = DataLoader(pictures, 3, device="cpu", transform=too_large, on_error=on_error)
    with pytest.raises(
        UsageError, match=r"epoch 0, batch 0: the graph fails on record 0 in .*, in fn\.crop: Slice can't be"
    ):
        list(loader)
    assert loader.stats().bad_records == 0


def test_a_data_set_without_image_sizes_is_refused_by_the_field_name(pictures):
    with pytest.raises(UsageError, match=r"no field 'size_of_image': it has label, hw"):
        loaded(pictures, transform=image_train(size_column="size_of_image"))


def test_a_data_set_without_the_field_of_images_is_refused_by_its_name(pictures):
    with pytest.raises(UsageError, match=r"there is no field 'picture' with images: DALI was given image, .* field="):
        loaded(pictures, transform=image_train(field="picture"))


def test_a_plain_function_of_nodes_is_a_graph(pictures):
    from nvidia.dali import fn

    def thumbnails(nodes):
        image = fn.resize(fn.decoders.image(nodes["image"]), size=(8, 8))
        return {"thumbnail": image, "label_plus_one": nodes["label"] + 1}

    batch = next(iter(DataLoader(pictures, 3, device="cpu", transform=thumbnails)))
    assert batch["thumbnail"].shape == (3, 8, 8, 3)
    assert batch["thumbnail"].dtype == torch.uint8
    assert batch["label_plus_one"].tolist() == [1, 1, 1]


def test_fields_that_pass_through_own_their_memory(tmp_path):
    """Records are fed to DALI without a copy; what a graph hands on unchanged must not live in memory that is reused."""
    content = io.BytesIO()
    Image.fromarray(smooth_picture(32, 32, 0)).save(content, "jpeg")
    for number in range(24):
        (tmp_path / "images" / f"{number:02d}").mkdir(parents=True)
        (tmp_path / "images" / f"{number:02d}" / "same.jpg").write_bytes(content.getvalue())
    convert(scan_imagefolder(tmp_path / "images"), tmp_path / "same.st")
    loader = DataLoader(
        RecordDataset(tmp_path / "same.st", staged=None), 4, device="cpu", num_workers=2, transform=dict
    )
    for epoch in range(20):
        batches = list(loader)
        gc.collect()
        assert [label for batch in batches for label in batch["label"].tolist()] == list(range(24)), epoch
        assert all(record.numpy().tobytes() == content.getvalue() for batch in batches for record in batch["image"]), (
            epoch
        )


def test_fields_that_differ_in_shape_are_refused_by_name(pictures):
    def decode_only(nodes):
        from nvidia.dali import fn

        return {"picture": fn.decoders.image(nodes["image"])}

    with pytest.raises(UsageError, match="the rows of 'picture' differ in shape"):
        next(iter(DataLoader(pictures, 3, device="cpu", transform=decode_only)))
