"""Every type through every way of loading records: bit by bit what torch's DataLoader makes of the same samples, or refused by name."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from stagein import formats
from stagein.formats.errors import UsageError
from stagein.loaders import DataLoader, PerSample, RecordDataset

RECORDS, BATCH_SIZE = 5, 2
INTEGERS = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
UNKNOWN_TO_DALI = ["complex64", "complex128", "bfloat16"]
NATIVE = [*INTEGERS, "float16", "float32", "float64", *UNKNOWN_TO_DALI]
BIG_ENDIAN = [">i2", ">u8", ">f4", ">f8", ">c8"]
Sample = dict[str, Any]


def value(dtype: str, seed: int, shape: tuple[int, ...]) -> Any:
    """All bit patterns are as likely, NaNs and infinities too; bfloat16, which numpy does not have, is a tensor."""
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)[()]
    stored = np.dtype("int16" if dtype == "bfloat16" else dtype)
    array = np.frombuffer(random.bytes(int(np.prod(shape)) * stored.itemsize), stored).reshape(shape).copy()
    return torch.from_numpy(array).view(torch.bfloat16) if dtype == "bfloat16" else array[()]


def tensors(dtype: str, seed: int) -> Sample:
    """Large ones of every codec, the first of which is the primary field; small ones; and one without elements."""
    large = {name: value(dtype, seed, (60, 70)) for name in ("plain", "blosc", "lz4", "zstd")}
    return {**large, "small": value(dtype, seed, (3,)), "one": value(dtype, seed, ()), "none": value(dtype, 0, (0, 3))}


CODECS = {"plain": None, "blosc": "blosc-lz4", "lz4": "lz4", "zstd": "zstd"}


def ragged(dtype: str, seed: int) -> Sample:
    """Arrays that differ in length, from none on: in shards, and small ones."""
    return {
        "large": value(dtype, seed, (1500 * seed, 2)), "few": value(dtype, seed, (seed,)), "one": value(dtype, seed, ()),
    }  # fmt: skip


def file_and_text(_: str, seed: int) -> Sample:
    return {"file": np.frombuffer(b"fLaC" + bytes(seed), np.uint8), "text": "é" * seed, "label": np.int64(seed)}


KINDS: list[tuple[Callable[[str, int], Sample], str]] = [
    *((kind, dtype) for dtype in [*NATIVE, *BIG_ENDIAN] for kind in (tensors, ragged)),
    (file_and_text, "uint8"),
]


def in_memory(sample: Sample) -> Sample:
    """A sample as a data set of torch's would have it: in the byte order of this machine, which torch asks for."""
    return {
        name: value.astype(value.dtype.newbyteorder("=")) if isinstance(value, np.ndarray | np.generic) else value
        for name, value in sample.items()
    }


def as_tensors(sample: Sample) -> Sample:
    # torch takes no numpy scalar of uint64 above 2**63, but an array of one element.
    is_number = {name: isinstance(value, np.ndarray | np.generic) for name, value in sample.items()}
    return {name: torch.from_numpy(np.array(each)) if is_number[name] else each for name, each in sample.items()}


def collated(samples: list[Sample]) -> Sample:
    """What the README promises: torch's own batch, a list where samples differ in shape by nature."""
    listed = {"large", "few", "file", "text"}
    return {
        name: [each[name] for each in samples] if name in listed else default_collate([each[name] for each in samples])
        for name in samples[0]
    }


WAYS: dict[str, dict[str, Any]] = {
    "batches": {},
    "torch's collate": {"collate_fn": default_collate},
    "a function's samples": {"collate_fn": list},
    "no batches": {"batch_size": None},
    "samples to a function": {"batch_size": None, "collate_fn": dict},
    "per sample": {"transform": PerSample(dict)},
    "a graph": {"transform": dict, "device": "cpu"},
    "samples after a graph": {"transform": dict, "device": "cpu", "collate_fn": list},
    "processes": {"multiprocessing_context": "fork"},
}


def by_torch(samples: list[Sample], way: str) -> list[Any]:
    kept_as_it_is = way in ("a function's samples", "samples to a function")
    arguments = {"batch_size": BATCH_SIZE, "collate_fn": collated} | {
        name: value for name, value in WAYS[way].items() if name in ("batch_size", "collate_fn") and value is not default_collate
    }  # fmt: skip
    if arguments["batch_size"] is None and not kept_as_it_is:
        arguments["collate_fn"] = None
    return list(torch.utils.data.DataLoader(samples if kept_as_it_is else list(map(as_tensors, samples)), **arguments))


def bits(batch: Any) -> Any:
    """A batch, or a sample, with types and bytes in place of numbers."""
    if isinstance(batch, dict):
        return {name: bits(value) for name, value in batch.items()}
    if isinstance(batch, list):
        return [bits(value) for value in batch]
    if isinstance(batch, torch.Tensor):
        content = batch.contiguous().reshape(-1).view(torch.uint8).numpy() if batch.numel() else np.empty(0)
        return ("tensor", str(batch.dtype), tuple(batch.shape), content.tobytes())
    if isinstance(batch, np.ndarray | np.generic):
        return (type(batch), batch.dtype.str, batch.shape, batch.tobytes())
    return batch


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0].__name__} {kind[1]}")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    """A data set, and the samples in it as torch would have them in memory."""
    kind, dtype = request.param
    samples = [kind(dtype, number) for number in range(RECORDS)]
    path = tmp_path_factory.mktemp("types") / "d.st"
    with formats.Writer(path, container="hdf5", codec=CODECS if kind is tensors else None) as writer:
        for sample in samples:
            writer.write({**sample, "file": sample["file"].tobytes()} if "file" in sample else sample)
    return path, list(map(in_memory, samples))


def refused_by_dali(way: str, samples: list[Sample]) -> bool:
    primary = next(iter(samples[0].values()))
    return "graph" in way and str(primary.dtype).removeprefix("torch.") in UNKNOWN_TO_DALI


@pytest.mark.parametrize(
    ("way", "num_workers"), [(way, number) for way in WAYS for number in (0, 2) if number or way != "processes"]
)
def test_what_torch_makes_of_the_same_samples(written, way, num_workers):
    path, samples = written
    if "graph" in way and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("no DALI")
    arguments = {"batch_size": BATCH_SIZE, "num_workers": num_workers, **WAYS[way]}
    dataset = RecordDataset(path, staged=None)
    if refused_by_dali(way, samples):
        with pytest.raises(UsageError, match=rf"^DALI has no type for {dataset.records.schema.primary_field.dtype}, "):
            DataLoader(dataset, **arguments)
    else:
        assert list(map(bits, DataLoader(dataset, **arguments))) == list(map(bits, by_torch(samples, way)))


@pytest.mark.parametrize("dtype", ["bool", "uint16", "complex64", "bfloat16"])
def test_fields_of_one_kind_are_delivered_without_the_others(dtype, tmp_path):
    samples = [{**ragged(dtype, number), **tensors(dtype, number)} for number in range(RECORDS)]
    with formats.Writer(tmp_path / "d.st") as writer:
        for sample in samples:
            writer.write(sample)
    for kind in (ragged, tensors):
        fields = list(kind(dtype, 1))
        loader = DataLoader(RecordDataset(tmp_path / "d.st", fields=fields, staged=None), BATCH_SIZE)
        expected = by_torch([{name: sample[name] for name in fields} for sample in samples], "batches")
        assert list(map(bits, loader)) == list(map(bits, expected))


def test_text_is_nothing_for_a_graph(tmp_path):
    pytest.importorskip("nvidia.dali")
    with formats.Writer(tmp_path / "d.st") as writer:
        writer.write({"text": "words", "label": 1})
    with pytest.raises(UsageError, match=r"^DALI has no type for text, so that no graph takes 'text'"):
        DataLoader(RecordDataset(tmp_path / "d.st", staged=None), transform=dict, device="cpu")
