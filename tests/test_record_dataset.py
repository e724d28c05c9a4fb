"""Values of every type through RecordDataset and DataLoader, and a staged copy whose shards turn out to be bad."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from stagein import formats
from stagein.formats.codecs import Codec
from stagein.formats.errors import ChecksumError, SourceError, UsageError
from stagein.loaders import DataLoader, RecordDataset

RECORDS = 7
DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
]


def write(path: Path, make_record, **arguments) -> RecordDataset:
    with formats.Writer(path, **arguments) as writer:
        for number in range(RECORDS):
            writer.write(make_record(number))
    return RecordDataset(path, staged=None)


def values(dtype: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """All bit patterns are as likely: NaNs and infinities too."""
    random = np.random.default_rng(number)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    return np.frombuffer(random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def bits(value) -> bytes:
    array = value.contiguous().view(torch.uint8).numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return array.tobytes()


def tensor_bits(tensor: torch.Tensor) -> bytes:
    return (tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor).numpy().tobytes()


# --- types ---


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("codec", [None, Codec(name="blosc-lz4")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_arrives_bit_by_bit(dtype, codec, num_workers, tmp_path):
    dataset = write(
        tmp_path / "d.st",
        lambda number: {
            "large": values(dtype, number, (40, 40)), "small": values(dtype, number, (3,)), "one": values(dtype, number, ()),
        },
        codec={"large": codec},
    )  # fmt: skip
    (batch,) = DataLoader(dataset, RECORDS, num_workers=num_workers)
    for name, shape in (("large", (40, 40)), ("small", (3,)), ("one", ())):
        assert batch[name].dtype == getattr(torch, dtype)
        assert batch[name].shape == (RECORDS, *shape)
        assert tensor_bits(batch[name]) == b"".join(values(dtype, n, shape).tobytes() for n in range(RECORDS))


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "bfloat16"])
def test_what_dali_has_no_type_for_is_refused_by_a_graph(dtype, tmp_path):
    pytest.importorskip("nvidia.dali")
    with formats.Writer(
        tmp_path / "x.st", formats.Schema(fields={"x": formats.Field(kind="tensor", dtype=dtype, shape=(3000,))})
    ) as writer:
        writer.write({"x": np.ones(3000, np.float32 if dtype == "bfloat16" else dtype)})
    with pytest.raises(UsageError, match=f"DALI has no type for {dtype}, so that no graph takes 'x'"):
        DataLoader(RecordDataset(tmp_path / "x.st", staged=None), transform=lambda nodes: nodes, device="cpu")


def test_big_endian_numbers_keep_their_value(tmp_path):
    dataset = write(tmp_path / "d.st", lambda number: {"x": np.arange(number, number + 2000, dtype=">f4")})
    (batch,) = DataLoader(dataset, RECORDS)
    assert torch.equal(
        batch["x"], torch.stack([torch.arange(n, n + 2000, dtype=torch.float32) for n in range(RECORDS)])
    )


@pytest.mark.parametrize("shape", [(3000,), (4,), ()])
def test_bfloat16_is_bfloat16(shape, tmp_path):
    def value(number: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)

    schema = formats.Schema(fields={"x": formats.Field(kind="tensor", dtype="bfloat16", shape=shape)})
    dataset = write(tmp_path / "d.st", lambda number: {"x": value(number)}, schema=schema)
    (batch,) = DataLoader(dataset, RECORDS)
    assert batch["x"].dtype == torch.bfloat16
    assert torch.equal(batch["x"], torch.stack([value(number) for number in range(RECORDS)]))
    assert dataset[2]["x"].dtype == torch.bfloat16


def ragged_record(number: int) -> dict:
    return {
        "boxes": np.arange(number * 4, dtype=np.float32).reshape(number, 4),
        "tokens": np.arange(1500 * number, dtype=np.int32),
        "caption": "é" * number,
        "sound": b"fLaC" + bytes(number),
        "label": np.int64(number),
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ragged_fields_text_and_bytes_come_as_lists(num_workers, tmp_path):
    dataset = write(tmp_path / "d.st", ragged_record)
    batches = list(DataLoader(dataset, 3, num_workers=num_workers))
    assert [len(batch["boxes"]) for batch in batches] == [3, 3, 1]
    for first, batch in zip((0, 3, 6), batches, strict=True):
        for row in range(len(batch["label"])):
            expected = ragged_record(first + row)
            assert batch["caption"][row] == expected["caption"]
            assert bits(batch["sound"][row]) == expected["sound"]
            for name in ("boxes", "tokens"):
                assert batch[name][row].dtype == torch.from_numpy(expected[name]).dtype
                assert np.array_equal(batch[name][row].numpy(), expected[name])
                assert batch[name][row].shape == expected[name].shape
    assert batches[0]["label"].tolist() == [0, 1, 2]


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


def test_fields_of_tensors_of_no_elements(tmp_path):
    dataset = write(tmp_path / "d.st", lambda number: {"empty": np.zeros((0, 3), np.float32), "x": np.ones(2000)})
    (batch,) = DataLoader(dataset, RECORDS)
    assert batch["empty"].shape == (RECORDS, 0, 3)


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
