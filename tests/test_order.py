"""The order of samples: every sample exactly once, equal steps, the same global batches for every world, any resume."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagein.loaders.order import RankBatch, argsort_words, epoch_order, num_steps, rank_batches, rank_slice

SAMPLES = st.integers(0, 1000)
WORLDS = st.integers(1, 8)
BATCH_SIZES = st.integers(1, 70)
TAILS = st.sampled_from(["share", "pad", "drop"])


def all_ranks(order, position, batch_size, world_size, tail, steps=None) -> list[list[RankBatch]]:
    """By rank, the batches from `position` on, the first `steps` of them."""
    return [
        list(rank_batches(order, position, batch_size, rank, world_size, tail))[:steps] for rank in range(world_size)
    ]


def valid_ids(ranks: list[list[RankBatch]]) -> list[int]:
    return [sample for batches in ranks for batch in batches for sample in batch.ids[: batch.num_valid].tolist()]


@given(samples=SAMPLES, seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**32 - 1))
def test_an_epoch_has_every_sample_once(samples, seed, epoch):
    assert sorted(epoch_order(samples, seed, epoch).tolist()) == list(range(samples))


def test_the_order_differs_by_epoch_and_seed_and_is_the_same_when_asked_again():
    orders = [epoch_order(100, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(100, 0, 0).tolist() == orders[0]
    assert epoch_order(5, 0, 3, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_the_order_never_changes_from_version_to_version():
    """A state written today must resume in a later release, with a later numpy."""
    assert epoch_order(12, seed=7, epoch=3).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [2, 5, 9, 7, 3, 0, 6, 8, 4, 1, 11, 10]


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 65_536, 65_537, 200_003, 5_000_000])
def test_the_order_is_that_of_a_stable_argsort_of_the_words(samples):
    key = np.array([7, 3], np.uint64)
    words = np.random.Philox(key=key).random_raw(samples)
    assert np.array_equal(epoch_order(samples, seed=7, epoch=3), np.argsort(words, kind="stable"))


@given(
    words=st.lists(st.builds(lambda high, low: high * 2**60 + low, st.integers(0, 15), st.integers(0, 70)), max_size=60)
)
def test_words_that_share_their_highest_bits_are_told_apart_by_the_others_and_equal_ones_by_their_ids(words):
    words = np.array(words, np.uint64)
    kept = words.copy()
    assert argsort_words(words, kept.__getitem__).tolist() == np.argsort(kept, kind="stable").tolist()


def test_each_place_of_the_order_is_equally_likely_for_a_sample():
    places = np.stack([np.argsort(epoch_order(8, seed, 0)) for seed in range(4000)])
    for sample in range(8):
        counts = np.bincount(places[:, sample], minlength=8)
        assert counts == pytest.approx(np.full(8, 500), abs=110)  # five standard deviations


@given(samples=SAMPLES, world_size=WORLDS)
def test_slices_tile_the_samples_and_differ_by_one_at_most(samples, world_size):
    slices = [rank_slice(samples, rank, world_size) for rank in range(world_size)]
    assert [sample for part in slices for sample in range(samples)[part]] == list(range(samples))
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=200)
@given(samples=SAMPLES, batch_size=BATCH_SIZES, world_size=WORLDS, tail=TAILS)
def test_all_ranks_together_see_every_sample_once_in_equally_many_steps(samples, batch_size, world_size, tail):
    order = epoch_order(samples, seed=1, epoch=0)
    ranks = all_ranks(order, 0, batch_size, world_size, tail)
    global_batch = batch_size * world_size
    steps = samples // global_batch + (samples % global_batch > 0 and tail != "drop")
    assert {len(batches) for batches in ranks} == {steps} == {num_steps(samples, global_batch, tail)}
    expected = samples - samples % global_batch if tail == "drop" else samples
    assert sorted(valid_ids(ranks)) == sorted(order[:expected].tolist())
    for batches in ranks:
        for batch in batches:
            assert batch.num_valid <= len(batch.ids) <= batch_size
            assert batch.num_valid == len(batch.ids) or tail == "pad"
            if tail in ("pad", "drop"):
                assert len(batch.ids) == batch_size
            assert set(batch.ids.tolist()) <= set(range(samples))


@given(samples=SAMPLES, share=st.integers(1, 8), tail=TAILS)
def test_global_batches_are_the_same_for_every_world(samples, share, tail):
    order = epoch_order(samples, seed=2, epoch=5)

    def global_batches(world_size: int) -> list[list[int]]:
        ranks = all_ranks(order, 0, 8 * share // world_size, world_size, tail)
        return [valid_ids([[batch] for batch in step]) for step in zip(*ranks, strict=True)]

    alone = global_batches(1)
    for world_size in (2, 4, 8):
        assert global_batches(world_size) == alone


@settings(max_examples=200)
@given(
    samples=SAMPLES, before=st.tuples(BATCH_SIZES, WORLDS), after=st.tuples(BATCH_SIZES, WORLDS), steps=st.integers(0, 30),
    tail=st.sampled_from(["share", "pad"]),
)  # fmt: skip
def test_a_resume_at_another_world_neither_repeats_nor_loses_a_sample(samples, before, after, steps, tail):
    order = epoch_order(samples, seed=3, epoch=1)
    first = valid_ids(all_ranks(order, 0, *before, tail, steps))
    position = min(steps * before[0] * before[1], samples)
    rest = all_ranks(order, position, *after, tail)
    assert sorted(first + valid_ids(rest)) == list(range(samples))
    assert {len(batches) for batches in rest} == {math.ceil((samples - position) / (after[0] * after[1]))}


def test_a_tail_of_fewer_samples_than_ranks_leaves_some_ranks_without():
    ranks = all_ranks(np.arange(9), 0, 2, 4, "share")
    assert [[batch.ids.tolist() for batch in batches] for batches in ranks] == [
        [[0, 1], [8]],
        [[2, 3], []],
        [[4, 5], []],
        [[6, 7], []],
    ]


def test_padding_comes_from_the_start_of_the_epoch():
    ranks = all_ranks(np.array([4, 2, 0, 1, 3]), 0, 2, 2, "pad")
    assert [[(batch.ids.tolist(), batch.num_valid) for batch in batches] for batches in ranks] == [
        [([4, 2], 2), ([3, 4], 1)],
        [([0, 1], 2), ([4, 2], 0)],
    ]
