"""Windows and flips planned on the host: pure functions of seed, epoch and sample, distributed as they should be."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagein.formats.errors import UsageError
from stagein.formats.native_code import NativeKernel
from stagein.loaders import image_train, philox
from stagein.loaders.augment import CROP_ATTEMPTS, centre_crops, random_flips, random_resized_crops, train_uniforms
from stagein.loaders.philox import philox4x32, sample_uniforms

SIZES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20).map(
    lambda sizes: np.array(sizes, dtype=np.int32)
)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == words


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**33),
    ids=st.lists(st.integers(0, 2**63 - 1), max_size=6),
    blocks=st.integers(0, 12),
)
def test_numbers_are_the_same_while_their_kernel_is_compiled(seed, epoch, ids, blocks):
    drawn = []
    for is_awaited in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NativeKernel, "is_awaited", lambda *arguments, is_awaited=is_awaited: is_awaited)
            patch.setattr(philox._fill_uniforms, "_code", {} if is_awaited else philox._fill_uniforms._code)
            drawn.append(sample_uniforms(seed, epoch, np.array(ids, np.int64), blocks))
    assert drawn[0].shape == (len(ids), blocks, 4)
    np.testing.assert_array_equal(*drawn)


def test_a_sample_has_the_same_numbers_in_every_batch():
    ids = np.array([5, 2**40 + 3, 0, 17])
    together = sample_uniforms(9, 4, ids, 3)
    for row, sample in enumerate(ids):
        np.testing.assert_array_equal(sample_uniforms(9, 4, np.array([sample]), 3)[0], together[row])


def test_seed_epoch_and_sample_each_change_the_numbers():
    base = sample_uniforms(1, 1, np.array([1]), 2).tobytes()
    others = [
        sample_uniforms(*changed, 2).tobytes()
        for changed in ((2, 1, np.array([1])), (1 + 2**40, 1, np.array([1])), (1, 2, np.array([1])), (1, 1, np.array([1 + 2**35])))
    ]  # fmt: skip
    assert len({base, *others}) == 5


def test_numbers_are_uniform():
    numbers = sample_uniforms(0, 0, np.arange(5000), 4).ravel()
    assert numbers.min() >= 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=16, range=(0, 1))
    assert counts == pytest.approx(np.full(16, 5000), abs=350)  # five standard deviations


@given(sizes=SIZES, seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_windows_lie_within_their_images(sizes, seed, epoch):
    windows = random_resized_crops(train_uniforms(seed, epoch, np.arange(len(sizes))), sizes)
    assert windows.start.dtype == windows.extent.dtype == np.int32
    assert (windows.extent >= 1).all()
    assert (windows.start >= 0).all()
    assert (windows.start + windows.extent <= sizes).all()


@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_windows_are_those_of_the_rule_written_down_for_one_image(sizes, seed):
    uniforms = train_uniforms(seed, 0, np.arange(len(sizes)))
    windows = random_resized_crops(uniforms, sizes, area=(0.2, 0.9), ratio=(0.5, 1.5))
    found = np.concatenate([windows.start, windows.extent], axis=1).tolist()
    expected = [
        one_window(draws, *size, (0.2, 0.9), (0.5, 1.5)) for draws, size in zip(uniforms, sizes.tolist(), strict=True)
    ]
    assert found == expected


def one_window(draws, height, width, area, ratio) -> list[int]:
    """torchvision's RandomResizedCrop.get_params, with its random numbers given: [y, x, height, width]."""
    for area_draw, ratio_draw, y_draw, x_draw in draws[:CROP_ATTEMPTS]:
        target_area = height * width * (area[0] + area_draw * (area[1] - area[0]))
        aspect = math.exp(math.log(ratio[0]) + ratio_draw * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(target_area * aspect)), round(math.sqrt(target_area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(y_draw * (height - h + 1)), int(x_draw * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_areas_ratios_and_places_are_spread_as_asked():
    sizes = np.full((4000, 2), (600, 800), dtype=np.int32)
    windows = random_resized_crops(train_uniforms(0, 0, np.arange(4000)), sizes, area=(0.1, 0.5), ratio=(3 / 4, 4 / 3))
    height, width = windows.extent.T
    area, ratio = height * width / (600 * 800), width / height
    assert 0.099 < area.min() < 0.12 and 0.48 < area.max() < 0.501
    assert area.mean() == pytest.approx(0.3, abs=0.01)
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.02)
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    relative_y = windows.start[:, 0] / (600 - height)
    assert relative_y.mean() == pytest.approx(0.5, abs=0.03)


def test_flips_come_as_often_as_asked():
    uniforms = train_uniforms(3, 0, np.arange(4000))
    assert random_flips(uniforms, 0.5).mean() == pytest.approx(0.5, abs=0.04)
    assert random_flips(uniforms, 0.1).mean() == pytest.approx(0.1, abs=0.025)
    assert random_flips(uniforms, 0.0).sum() == 0
    assert random_flips(uniforms, 1.0).sum() == 4000


@given(sizes=SIZES, size=st.integers(1, 300), border=st.integers(0, 100))
def test_centre_windows_hold_their_region_and_stay_in_the_image(sizes, size, border):
    crops = centre_crops(sizes, size, size + border)
    assert (crops.windows.start >= 0).all()
    assert (crops.windows.start + crops.windows.extent <= sizes).all()
    assert (crops.region_start >= -1e-3).all()
    assert (crops.region_end <= crops.windows.extent + 1e-3 * sizes).all()


def test_the_centre_region_is_that_of_resize_and_centre_crop():
    crops = centre_crops(np.array([[375, 500]], dtype=np.int32), size=224, resize=256)
    # torchvision resizes to 256 x 341 and keeps rows 16 … 239, columns 58 … 281 (58.5 rounds to even)
    start = crops.windows.start + crops.region_start
    end = crops.windows.start + crops.region_end
    np.testing.assert_allclose(start, [[16 * 375 / 256, 58 * 500 / 341]], rtol=1e-6)
    np.testing.assert_allclose(end, [[240 * 375 / 256, 282 * 500 / 341]], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"area": (1.0, 0.5)}, "area=.* is not the smallest and the largest share"),
        ({"area": (-1, 1)}, "area"),
        ({"area": (0.1, 2)}, "area"),
        ({"area": (0, 0)}, "area"),
        ({"area": (math.nan, 1)}, "area"),
        ({"ratio": (4 / 3, 3 / 4)}, "ratio=.* is not the smallest and the largest ratio"),
        ({"ratio": (0, 1)}, "ratio"),
        ({"flip": 1.5}, "flip=1.5 is not a probability"),
        ({"size": 0}, "size=0 is no number of pixels"),
    ],
)
def test_what_nothing_can_be_drawn_from_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        image_train(**arguments)
