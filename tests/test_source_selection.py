"""Limit, shuffle and split: which records, in which order, and that none is lost or doubled."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lookalikes import assert_same_bits, read_source, write_cosmoflow_npy, write_deepcam_hdf5

from stagein.formats import Dataset, convert, scan_imagefolder
from stagein.formats.errors import UsageError
from stagein.formats.sources.hdf5 import scan_hdf5
from stagein.formats.sources.npy import scan_npy
from stagein.formats.sources.selection import SelectedRecords, permutation, select, split


def numbers_of(source: object) -> list[int]:
    assert isinstance(source, SelectedRecords)
    return source.numbers.tolist()


def test_the_order_of_a_seed_never_changes() -> None:
    assert permutation(10, 7).tolist() == [6, 3, 4, 9, 0, 2, 8, 7, 5, 1]
    assert permutation(0, 7).tolist() == []


def test_shuffled_and_limited_records_are_those_of_the_source(tmp_path: Path) -> None:
    write_cosmoflow_npy(tmp_path / "x")
    source = scan_npy(tmp_path / "x")
    everything = read_source(source)
    assert select(source) is source
    shuffled = select(source, shuffle_seed=3)
    assert numbers_of(shuffled) == permutation(7, 3).tolist()
    assert numbers_of(select(source, shuffle_seed=3, limit=4)) == permutation(7, 3).tolist()[:4]
    assert numbers_of(select(source, limit=100)) == list(range(7))
    for number, record in zip(numbers_of(shuffled), read_source(shuffled), strict=True):
        assert_same_bits(record, everything[number])
    identities = {
        repr(each.identity())
        for each in (source, shuffled, select(source, shuffle_seed=4), select(source, limit=4), select(source, limit=5))
    }
    assert len(identities) == 5


def test_a_shuffled_data_set_has_every_image_once_with_its_label(jpeg_folder: Path, tmp_path: Path) -> None:
    source = scan_imagefolder(jpeg_folder)
    convert(select(source, shuffle_seed=1), tmp_path / "x.st", shard_bytes=64 << 10, workers=2)
    dataset = Dataset(tmp_path / "x.st")
    files = sorted(jpeg_folder.glob("*/*.jpg"))
    for number, record in zip(permutation(85, 1).tolist(), dataset, strict=True):
        assert record["image"].tobytes() == files[number].read_bytes()
        assert record["label"] == number // 17


@given(st.integers(2, 400), st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 9))
def test_splits_are_disjoint_and_complete(count: int, weights: list[int], seed: int) -> None:
    class Counted(SelectedRecords):
        nbytes = np.zeros(count, np.int64)
        name = "counted"

    shares = {f"part{number}": Fraction(weight, sum(weights)) for number, weight in enumerate(weights)}
    whole = Counted(None, np.arange(count))
    try:
        parts = split(whole, shares, seed)
    except UsageError as error:
        assert "too few for a split" in str(error)
        return
    assert list(parts) == list(shares)
    dealt = [number for part in parts.values() for number in numbers_of(part)]
    assert sorted(dealt) == list(range(count))
    for name, part in parts.items():
        assert numbers_of(part) == sorted(numbers_of(part))
        assert abs(len(numbers_of(part)) - shares[name] * count) <= 1
    assert {name: numbers_of(part) for name, part in split(whole, shares, seed).items()} == {
        name: numbers_of(part) for name, part in parts.items()
    }


def test_a_split_of_shuffled_records_keeps_their_order(tmp_path: Path) -> None:
    write_deepcam_hdf5(tmp_path / "x")
    source = scan_hdf5(tmp_path / "x", fields={"label": "climate/labels_0"})
    everything = read_source(source)
    shuffled = select(source, shuffle_seed=5)
    for part in split(shuffled, {"a": Fraction(1, 2), "b": Fraction(1, 2)}, seed=5).values():
        for place, record in zip(numbers_of(part), read_source(part), strict=True):
            assert_same_bits(record, everything[numbers_of(shuffled)[place]])


@pytest.mark.parametrize("shares", [("0.9", "0.2"), ("0.5",), ("1.5", "-0.5")])
def test_shares_that_do_not_add_up_are_refused(jpeg_folder: Path, shares: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="positive shares that add up to 1"):
        split(scan_imagefolder(jpeg_folder), {str(number): Fraction(text) for number, text in enumerate(shares)})
