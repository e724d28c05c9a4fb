"""Crops, flips and normalised values of volumes, and their masks, are those of plain numpy, for the same numbers of Philox."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stagein.formats import Field, Schema, Writer
from stagein.formats.codecs import Codec
from stagein.formats.errors import SourceError, UsageError
from stagein.loaders import DataLoader, RecordDataset, volume_eval, volume_train
from stagein.loaders.augment import random_axis_flips, random_starts, volume_uniforms

pytest.importorskip("nvidia.dali")
RECORDS = 8
MEAN, STD = (3.0, -20.0), (40.0, 7.5)


def volume(record: int, shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
    return np.random.default_rng(record).integers(-90, 90, shape).astype(dtype)


def written(path: Path, shape: tuple[int, ...], dtype: str, codec: str | None = None) -> RecordDataset:
    field = Field(kind="tensor", dtype=dtype, shape=shape, codec=codec and Codec(name=codec))
    schema = Schema(fields={"volume": field, "label": Field(kind="tensor", dtype="int64")}, primary="volume")
    with Writer(path, schema, container="hdf5", shard_bytes=64 << 10) as writer:
        for record in range(RECORDS):
            writer.write({"volume": volume(record, shape, dtype), "label": record})
    return RecordDataset(path, staged=None)


def cropped(values: NDArray[np.generic], start, crop, flips, channels: str | None) -> NDArray[np.generic]:
    """A window of a volume, or a mask, reversed along some axes, by numpy."""
    first = 1 if channels == "first" else 0
    window = [slice(None)] * values.ndim
    for axis, (begin, extent) in enumerate(zip(start, crop, strict=True)):
        window[first + axis] = slice(begin, begin + extent)
    return np.flip(values[tuple(window)], [first + axis for axis, flip in enumerate(flips) if flip])


def seen(values: NDArray[np.generic], start, crop, flips, channels: str) -> NDArray[np.float32]:
    """What a volume looks like: cropped, flipped, normalised, by numpy."""
    shape = [1] * values.ndim
    shape[0 if channels == "first" else -1] = 2
    window = cropped(values, start, crop, flips, channels)
    return (window.astype(np.float32) - np.reshape(MEAN, shape)) / np.reshape(STD, shape)


@pytest.mark.parametrize(
    ("shape", "crop", "channels", "dtype", "codec"),
    [
        ((2, 12, 14, 16), (5, 14, 9), "first", "float32", None),
        ((12, 14, 16, 2), (5, 13, 9), "last", "int16", "lz4"),
        ((2, 40, 50), (20, 31), "first", "float64", "blosc-lz4"),
        ((40, 50, 2), (20, 31), "last", "float16", "zstd"),
        ((2, 40, 50), (40, 50), "first", "int64", None),
    ],
)
def test_training_volumes_are_numpys_crops_flipped_and_normalised(tmp_path, shape, crop, channels, dtype, codec):
    dataset = written(tmp_path / "v.st", shape, dtype, codec)
    graph = volume_train(crop, mean=MEAN, std=STD, channels=channels)
    spatial = shape[1:] if channels == "first" else shape[:-1]
    loader = DataLoader(dataset, 3, device="cpu", seed=4, num_workers=2, transform=graph)
    for epoch in range(2):
        uniforms = volume_uniforms(4, epoch, np.arange(RECORDS))
        starts, flips = random_starts(uniforms, spatial, crop), random_axis_flips(uniforms, [0.5] * len(crop))
        assert all(0 < column.sum() < RECORDS for column in flips.T) or epoch
        row = 0
        for batch in loader:
            assert batch["volume"].dtype == torch.float32
            for image, label in zip(batch["volume"], batch["label"].tolist(), strict=True):
                assert label == row
                expected = seen(volume(row, shape, dtype), starts[row], crop, flips[row], channels)
                np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)
                row += 1
        assert row == RECORDS


@pytest.mark.parametrize("channels", ["first", "last"])
def test_volumes_that_differ_in_shape_are_cropped_to_one(tmp_path, channels):
    extents = [(12 + record, 20 - record, 16) for record in range(RECORDS)]
    shapes = [(2, *each) if channels == "first" else (*each, 2) for each in extents]
    records = [
        {"volume": volume(number, shape, "int16"), "mask": np.zeros(shape, np.uint8)}
        for number, shape in enumerate(shapes)
    ]
    with Writer(tmp_path / "v.st", shard_bytes=64 << 10) as writer:
        for record in records:
            writer.write(record)
    dataset, crop = RecordDataset(tmp_path / "v.st", staged=None), (9, 13, 16)
    train = DataLoader(
        dataset, 3, device="cpu", seed=4, transform=volume_train(crop, mean=MEAN, std=STD, channels=channels)
    )
    uniforms = volume_uniforms(4, 0, np.arange(RECORDS))
    starts = np.concatenate([random_starts(uniforms[row : row + 1], each, crop) for row, each in enumerate(extents)])
    centres, unflipped = np.subtract(extents, crop) // 2, np.zeros((RECORDS, 3), int)
    middle = DataLoader(dataset, 3, device="cpu", transform=volume_eval(crop, mean=MEAN, std=STD, channels=channels))
    for loader, begins, flips in (
        (train, starts, random_axis_flips(uniforms, [0.5] * 3)),
        (middle, centres, unflipped),
    ):
        row = 0
        for batch in loader:
            assert batch.keys() == {"volume", "mask"}
            assert [tuple(mask.shape) for mask in batch["mask"]] == shapes[row : row + len(batch["mask"])]
            for image in batch["volume"]:
                expected = seen(records[row]["volume"], begins[row], crop, flips[row], channels)
                np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)
                row += 1
        assert row == RECORDS
    too_large = volume_train((14, 9, 9), mean=MEAN, std=STD, channels=channels)
    with pytest.raises(UsageError, match="a crop of 14 x 9 x 9 does not lie in 'volume' of record 0, of"):
        next(iter(DataLoader(dataset, 3, device="cpu", transform=too_large)))


def with_masks(path: Path, shapes, mask_shapes, dtype: str = "uint8") -> RecordDataset:
    """Volumes of float32, of these shapes, with masks of class numbers."""
    with Writer(path, shard_bytes=64 << 10) as writer:
        for number, (shape, mask_shape) in enumerate(zip(shapes, mask_shapes, strict=True)):
            mask = np.random.default_rng(50 + number).integers(0, 2, mask_shape).astype(dtype)
            writer.write({"volume": volume(number, shape, "float32"), "mask": mask})
    return RecordDataset(path, staged=None)


ALIKE, OF_ANY_DEPTH, OF_ANY_SHAPE = (
    [(12, 14, 16)] * RECORDS,
    [(12 + record % 3, 14, 16) for record in range(RECORDS)],
    [(12 + record % 3, 14 + record % 2, 16) for record in range(RECORDS)],
)


@pytest.mark.parametrize(
    ("extents", "channels", "mask_channels", "dtype"),
    [
        (ALIKE, "first", "first", "uint8"),
        (ALIKE, "last", None, "float32"),
        (ALIKE, None, None, "bool"),
        ([(40, 50)] * RECORDS, "last", None, "int64"),
        ([(40, 50)] * RECORDS, None, None, "uint16"),
        (OF_ANY_DEPTH, "last", "last", "int16"),
        (OF_ANY_DEPTH, None, None, "uint8"),
        (OF_ANY_DEPTH, "first", None, "int8"),
        (OF_ANY_SHAPE, "first", "first", "uint8"),
        (OF_ANY_SHAPE, "last", None, "int32"),
        (OF_ANY_SHAPE, None, None, "bool"),
    ],
)
@pytest.mark.parametrize("is_random", [True, False])
def test_masks_have_the_window_and_the_reversals_of_their_volumes(
    tmp_path, extents, channels, mask_channels, dtype, is_random
):
    shapes, mask_shapes = (
        [{"first": (number, *each), "last": (*each, number), None: each}[of] for each in extents]
        for of, number in ((channels, 2), (mask_channels, 1))
    )
    dataset, crop = with_masks(tmp_path / "v.st", shapes, mask_shapes, dtype), (9, 13, 7)[: len(extents[0])]
    chosen = {"mean": MEAN, "std": STD} if channels else {"mean": MEAN[:1], "std": STD[:1]}
    graph = (volume_train if is_random else volume_eval)(crop, **chosen, channels=channels, mask="mask")
    uniforms = volume_uniforms(4, 0, np.arange(RECORDS))
    starts, flips = random_starts(uniforms, extents, crop), random_axis_flips(uniforms, [0.5] * len(crop))
    if not is_random:
        starts, flips = np.subtract(extents, crop) // 2, np.zeros_like(flips)
    row = 0
    for batch in DataLoader(dataset, 3, device="cpu", seed=4, num_workers=2, transform=graph):
        assert batch.keys() == {"volume", "mask"}
        assert batch["mask"].dtype == getattr(torch, "uint8" if dtype == "bool" else dtype)
        for image, mask in zip(batch["volume"], batch["mask"], strict=True):
            whole = dataset[row]
            window = cropped(whole["volume"], starts[row], crop, flips[row], channels)
            if channels:
                window = seen(whole["volume"], starts[row], crop, flips[row], channels)
            else:
                window = (window - np.float32(MEAN[0])) / np.float32(STD[0])
            np.testing.assert_allclose(image, window, rtol=1e-5, atol=1e-5)
            assert np.array_equal(mask, cropped(whole["mask"], starts[row], crop, flips[row], mask_channels))
            row += 1
    assert row == RECORDS


def test_a_mask_of_another_size_than_its_volume_is_a_bad_record(tmp_path):
    shapes = [(1, *each) for each in OF_ANY_SHAPE]
    odd = (1, *reversed(OF_ANY_SHAPE[5]))
    dataset = with_masks(tmp_path / "v.st", shapes, [*shapes[:5], odd, *shapes[6:]])
    graph = volume_train((4, 5, 6), mean=[0], std=[1], mask="mask")
    with pytest.raises(SourceError, match="'mask' of record 5 is 16 x 15 x 14, but 'volume' is 14 x 15 x 16"):
        list(DataLoader(dataset, 4, device="cpu", transform=graph))
    with pytest.warns(RuntimeWarning, match="'mask' of record 5"):
        batches = list(DataLoader(dataset, 4, device="cpu", transform=graph, on_error="replace"))
    assert [len(batch["mask"]) for batch in batches] == [4, 4]


def test_what_is_no_mask_is_refused(tmp_path):
    schema = Schema(
        fields={
            "volume": Field(kind="tensor", dtype="float32", shape=(1, 9, 9, 9)),
            "flat": Field(kind="tensor", dtype="uint8", shape=(9, 9)),
            "phase": Field(kind="tensor", dtype="complex64", shape=(9, 9, 9)),
            "mask": Field(kind="tensor", dtype="uint8", shape=(1, 9, 9, 9)),
            "half": Field(kind="tensor", dtype="float16", shape=(9, 9, 9)),
        },
        primary="volume",
    )
    with Writer(tmp_path / "v.st", schema) as writer:
        for _ in range(2):
            writer.write({name: np.zeros(field.shape, field.dtype) for name, field in schema.fields.items()})

    def load(mask: str, field: str = "volume", fields: list[str] | None = None) -> None:
        dataset = RecordDataset(tmp_path / "v.st", staged=None, fields=fields)
        graph = volume_train((4, 4, 4), mean=[0], std=[1], field=field, mask=mask)
        next(iter(DataLoader(dataset, 2, device="cpu", transform=graph)))

    with pytest.raises(UsageError, match="'flat' of 9 x 9 is no mask of 'volume': it has other axes"):
        load("flat")
    with pytest.raises(UsageError, match="takes tensors of whole or real numbers, and 'phase' is"):
        load("phase")
    with pytest.raises(UsageError, match="the mask 'half' is float16"):
        load("half")
    with pytest.raises(UsageError, match="needs the field 'seen'"):
        load("seen")
    with pytest.raises(UsageError, match="needs the field 'mask': name it in the data set's fields="):
        load("mask", fields=["volume"])
    with pytest.raises(UsageError, match="the mask 'volume' is the primary field"):
        load("volume", field="mask")
    with pytest.raises(UsageError, match="'volume' cannot be the volume and its mask"):
        load("volume")


def test_volumes_of_any_number_of_channels_are_refused(tmp_path):
    with Writer(tmp_path / "v.st") as writer:
        for number in range(3):
            writer.write({"volume": np.zeros((number + 1, 9, 9 + number), np.float32)})
    dataset = RecordDataset(tmp_path / "v.st", staged=None)
    for crop, sentence in (
        ((4, 4), "'volume' has any number of channels"),
        ((4, 4, 4), "in 'volume' of ? x 9 x ? with"),
    ):
        graph = volume_train(crop, mean=MEAN, std=STD)
        with pytest.raises(UsageError, match=re.escape(sentence)):
            next(iter(DataLoader(dataset, 2, device="cpu", transform=graph)))


def test_crops_reach_both_ends_and_every_place_between():
    starts = random_starts(volume_uniforms(0, 0, np.arange(2000)), (12, 9), (8, 9))
    assert np.unique(starts[:, 0], return_counts=True)[1].min() > 300
    assert np.unique(starts[:, 0]).tolist() == [0, 1, 2, 3, 4]
    assert not starts[:, 1].any()


def test_flips_along_each_axis_have_their_own_probability():
    flips = random_axis_flips(volume_uniforms(0, 0, np.arange(2000)), (0, 0.3, 1))
    assert flips[:, 0].sum() == 0 and 500 < flips[:, 1].sum() < 700 and flips[:, 2].all()


def test_evaluation_volumes_are_the_centre(tmp_path):
    dataset = written(tmp_path / "v.st", (2, 12, 14, 16), "int16")
    (batch,) = DataLoader(dataset, RECORDS, device="cpu", transform=volume_eval((5, 14, 9), mean=MEAN, std=STD))
    for row, image in enumerate(batch["volume"]):
        expected = seen(volume(row, (2, 12, 14, 16), "int16"), (3, 0, 3), (5, 14, 9), (0, 0, 0), "first")
        np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)


def test_volumes_do_not_depend_on_the_number_of_ranks(tmp_path):
    dataset = written(tmp_path / "v.st", (2, 12, 14, 16), "int16")
    graph = volume_train((4, 5, 6), mean=MEAN, std=STD)

    def epoch(rank: int, world: int) -> list[bytes]:
        loader = DataLoader(dataset, 8 // world, shuffle=True, device="cpu", transform=graph, distributed=(rank, world))
        return [image.numpy().tobytes() for batch in loader for image in batch["volume"]]

    assert sorted(epoch(0, 1)) == sorted(epoch(0, 2) + epoch(1, 2))


def test_what_does_not_fit_is_refused(tmp_path):
    dataset = written(tmp_path / "v.st", (2, 12, 14, 16), "int16")

    def load(*crop: int, field: str = "volume", mean=MEAN) -> None:
        graph = volume_train(crop, mean=mean, std=mean and [1.0] * len(mean), field=field)
        next(iter(DataLoader(dataset, 2, device="cpu", transform=graph)))

    with pytest.raises(UsageError, match="crop of 4 x 15 x 6 does not lie in 'volume' of 2 x 12 x 14 x 16"):
        load(4, 15, 6)
    with pytest.raises(UsageError, match="crop of 4 x 5 does not lie"):
        load(4, 5)
    with pytest.raises(UsageError, match="2 channels, mean and std are given for 1"):
        load(4, 5, 6, mean=(1.0,))
    with pytest.raises(UsageError, match="needs the field 'scan'"):
        load(4, 5, 6, field="scan")
    with pytest.raises(UsageError, match="above 0"):
        volume_train((4, 5, 6), mean=(0,), std=(0,))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"crop": 8}, "crop=8 is no window"),
        ({"crop": (8.0, 8)}, r"crop=\(8.0, 8\) is no window"),
        ({"crop": (8,)}, "crop=8 is no window of two or three extents"),
        ({"mean": None}, "mean=None is neither a number nor several"),
        ({"std": "one"}, "std='one' is neither a number nor several"),
        ({"std": float("nan")}, "std=nan divides"),
        ({"mean": (0, 0)}, "mean is given for 2 channels, std for 1"),
    ],
)
def test_numbers_that_no_volume_can_be_made_with_are_refused(arguments, sentence):
    for graph in (volume_train, volume_eval):
        with pytest.raises(UsageError, match=sentence):
            graph(**{"crop": (4, 5, 6), "mean": 0, "std": 1, **arguments})
    with pytest.raises(UsageError, match="flip is given for 1 axes, crop for 3"):
        volume_train((4, 5, 6), mean=0, std=1, flip=(0.5,))
    with pytest.raises(UsageError, match="flip='often' is neither"):
        volume_train((4, 5, 6), mean=0, std=1, flip="often")


def test_one_number_stands_for_one_channel():
    for graph in (volume_train, volume_eval):
        assert graph((4, 5), mean=1, std=2) == graph([4, 5], mean=(1.0,), std=[2.0])
    assert volume_train((4, 5), mean=1, std=2, flip=1) == volume_train((4, 5), mean=1, std=2, flip=(1.0, 1.0))
