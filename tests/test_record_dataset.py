"""RecordDataset and DataLoader: fields that differ from record to record, and a staged copy whose shards turn out to be bad."""

import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from stagein import formats
from stagein.formats.errors import ChecksumError, SourceError, UsageError
from stagein.loaders import DataLoader, RecordDataset, image_train

RECORDS = 7


def write(path: Path, make_record, **arguments) -> RecordDataset:
    with formats.Writer(path, **arguments) as writer:
        for number in range(RECORDS):
            writer.write(make_record(number))
    return RecordDataset(path, staged=None)


# --- fields that differ from record to record ---


def ragged_record(number: int) -> dict:
    return {
        "boxes": np.arange(number * 4, dtype=np.float32).reshape(number, 4),
        "tokens": np.arange(1500 * number, dtype=np.int32),
        "caption": "é" * number,
        "sound": b"fLaC" + bytes(number),
        "label": np.int64(number),
    }


def test_a_collate_function_pads_ragged_fields(tmp_path):
    dataset = write(tmp_path / "d.st", ragged_record)

    def pad(samples):
        return torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(sample["boxes"]) for sample in samples], batch_first=True
        )

    assert [tuple(batch.shape) for batch in DataLoader(dataset, 3, collate_fn=pad)] == [(3, 2, 4), (3, 5, 4), (1, 6, 4)]


def test_a_rank_without_samples_gets_empty_lists_too(tmp_path):
    dataset = write(tmp_path / "d.st", ragged_record)
    last = list(DataLoader(dataset, 3, distributed=(1, 2)))[-1]
    assert (last["boxes"], last["caption"], last["label"].shape) == ([], [], (0,))


def test_images_of_different_sizes_need_a_transform_or_a_collate_function(tmp_path):
    import simplejpeg

    def record(number: int) -> dict:
        return {"image": simplejpeg.encode_jpeg(np.zeros((16, 16 + number, 3), np.uint8))}

    dataset = write(tmp_path / "d.st", record)
    with pytest.raises(UsageError, match=r"'image' differ in shape, .* let a transform resize or pad them"):
        list(DataLoader(dataset, 4))
    sizes = [size for batch in DataLoader(dataset, 4, collate_fn=lambda samples: [s["image"].shape[1] for s in samples]) for size in batch]  # fmt: skip
    assert sizes == list(range(16, 23))


# --- a bad staged copy ---


@pytest.fixture
def staged(jpeg_dataset_path, tmp_path) -> Path:
    copy = tmp_path / "copy.st"
    shutil.copytree(jpeg_dataset_path, copy, symlinks=True)
    return copy


def pixels(dataset: RecordDataset, **arguments) -> list[bytes]:
    return [image.numpy().tobytes() for batch in DataLoader(dataset, 8, **arguments) for image in batch["image"]]


def shard_of(dataset: RecordDataset, record: int) -> str:
    return dataset.records.manifest.shards[int(dataset.records.index.shard[record])].file


def flip_a_bit(path: Path, offset: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def damage(copy: Path, record: int, how: str) -> None:
    dataset = RecordDataset(copy, staged=None)
    shard = copy / shard_of(dataset, record)
    if how == "flipped":
        flip_a_bit(shard, int(dataset.records.index.offset[record]) + 100)
    elif how == "missing":
        shard.unlink()
    elif how == "cut off":
        shard.chmod(0o644)
        os.truncate(shard, int(dataset.records.index.offset[record]) + 10)
    elif how == "no file":
        shard.unlink()
        shard.mkdir()  # it opens, and reading it fails


def wait_for_kernels(dataset: RecordDataset) -> None:
    """Until records are read and decoded by kernels."""
    reader, until = dataset.records.readers["image"], time.monotonic() + 100
    while True:
        list(DataLoader(dataset, 8, transform=image_train(16), device="cpu"))
        if reader.locate([0]) is not None:
            return
        assert time.monotonic() < until
        time.sleep(0.1)


def test_kernels_are_told_where_records_are_in_the_source_if_a_shard_of_the_copy_is_missing(jpeg_dataset_path, staged):
    of_source = RecordDataset(jpeg_dataset_path, staged=None)
    wait_for_kernels(of_source)
    damage(staged, 41, "missing")
    dataset = RecordDataset(jpeg_dataset_path, staged=staged)
    runs = []
    for each in (of_source, dataset):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loader = DataLoader(each, 8, transform=image_train(16), device="cpu", on_error="replace")
            runs.append([batch["image"].numpy().tobytes() for batch in loader])
        assert loader.stats().bad_records == 0
    assert runs[0] == runs[1] and len(caught) == 1
    assert list(dataset.records.left_shards) == [staged / shard_of(dataset, 41)]


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("how", ["flipped", "missing", "cut off", "no file"])
def test_a_bad_shard_of_the_copy_is_read_from_the_source_with_one_warning(jpeg_dataset_path, staged, how, num_workers):
    expected = pixels(RecordDataset(jpeg_dataset_path, staged=None))
    damage(staged, 41, how)
    dataset = RecordDataset(jpeg_dataset_path, staged=staged)
    shard = shard_of(dataset, 41)
    with pytest.warns(RuntimeWarning, match=f"{shard}.*It is read from the source from now on") as caught:
        assert pixels(dataset, num_workers=num_workers) == expected
    assert len(caught) == 1
    assert pixels(dataset, num_workers=num_workers) == expected  # filterwarnings: a second warning would be an error
    assert list(dataset.records.left_shards) == [staged / shard]
    loader = DataLoader(dataset, 8)
    assert "1 of its shards turned out to be bad" in loader.explain()


def test_other_shards_of_the_copy_are_still_read_there(jpeg_dataset_path, staged, tmp_path):
    source = tmp_path / "source.st"
    shutil.copytree(jpeg_dataset_path, source, symlinks=True)
    expected = pixels(RecordDataset(source, staged=None))
    damage(staged, 41, "flipped")
    dataset = RecordDataset(source, staged=staged)
    for shard in dataset.records.manifest.shards:
        if shard.file != shard_of(dataset, 41):
            (source / shard.file).unlink()
    with pytest.warns(RuntimeWarning, match="from now on"):
        assert pixels(dataset) == expected


def test_where_the_source_is_bad_as_well_its_error_is_raised(jpeg_dataset_path, staged, tmp_path):
    source = tmp_path / "source.st"
    shutil.copytree(jpeg_dataset_path, source, symlinks=True)
    damage(staged, 41, "missing")
    damage(source, 41, "flipped")
    dataset = RecordDataset(source, staged=staged)
    with pytest.warns(RuntimeWarning), pytest.raises(ChecksumError, match=rf"record 41 in {source}"):
        pixels(dataset)


def test_without_a_copy_the_source_is_read_and_its_errors_are_raised(staged):
    damage(staged, 41, "missing")
    with pytest.raises(SourceError, match="it is missing"):
        pixels(RecordDataset(staged, staged=None))
