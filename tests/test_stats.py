"""What `stats()` says by phase: only the phases there are, all bytes, and seconds that fit into the time there was."""

import time
from pathlib import Path

import numpy as np
import pytest

from stagein.formats import Field, Schema, Writer
from stagein.formats.codecs import Codec, CodecName
from stagein.loaders import DataLoader, PerSample, RecordDataset, image_train
from stagein.loaders.stats import LoaderStats

RECORDS = 24
SHAPE = (8, 64, 64)
RECORD_BYTES = 4 * 8 * 64 * 64


def tensors(path: Path, codec: CodecName | None) -> RecordDataset:
    field = Field(kind="tensor", dtype="float32", shape=SHAPE, codec=codec and Codec(name=codec))
    with Writer(path, Schema(fields={"volume": field}), container="hdf5") as writer:
        for record in range(RECORDS):
            writer.write({"volume": np.random.default_rng(record).integers(0, 30, SHAPE).astype(np.float32)})
    return RecordDataset(path, staged=None)


def stats_of(*arguments, **options) -> tuple[LoaderStats, float]:
    """Of an epoch, and the seconds that it took, times the threads that worked."""
    loader = DataLoader(*arguments, **options)
    started = time.perf_counter()
    batches = sum(1 for _ in loader)
    threads = max(1, options.get("num_workers", 0)) + options.get("decode_threads", 0)
    stats = loader.stats()
    assert stats.batches == batches
    assert 0 < stats.wait_s == stats.read_wait_s + stats.graph_wait_s
    return stats, threads * (time.perf_counter() - started)


def phases(stats: LoaderStats) -> set[str]:
    """Those that took time."""
    return {phase for phase in ("read", "decompress", "decode", "transform", "copy") if getattr(stats, f"{phase}_s")}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("codec", [None, "blosc-lz4", "lz4", "zstd"])
@pytest.mark.parametrize("graph", [False, True])
def test_tensors(codec, num_workers, graph, tmp_path):
    if graph:
        pytest.importorskip("nvidia.dali")
    dataset = tensors(tmp_path / "t.st", codec)
    options = {"transform": lambda nodes: nodes} if graph else {}
    stats, seconds = stats_of(dataset, 4, device="cpu", num_workers=num_workers, **options)
    stored = int(dataset.records.index.nbytes.sum())
    assert stats.bytes_read == stored
    assert stats.bytes_decompressed == (RECORDS * RECORD_BYTES if codec else 0)
    assert phases(stats) == ({"read", "decompress"} if codec else {"read"})
    assert stats.read_s + stats.decompress_s < seconds


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_by_our_threads(jpeg_dataset_path, num_workers):
    dataset = RecordDataset(jpeg_dataset_path, staged=None)
    graph = image_train(32)
    stats, seconds = stats_of(dataset, 8, device="cpu", num_workers=num_workers, transform=graph, decode_threads=2)
    assert phases(stats) == {"read", "decode", "transform"}
    assert stats.bytes_read == dataset.records.index.nbytes.sum()
    assert stats.bytes_transformed == len(dataset) * 3 * 32 * 32 * 4
    assert 0 < stats.bytes_decoded <= len(dataset) * 48 * 72 * 3
    assert stats.read_s + stats.decode_s + stats.transform_s < seconds


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_one_by_one(jpeg_dataset_path, num_workers):
    dataset = RecordDataset(jpeg_dataset_path, fields=["image"], staged=None)

    def slow(sample):
        time.sleep(0.002)
        return sample

    stats, seconds = stats_of(dataset, 5, num_workers=num_workers, transform=PerSample(slow))
    assert phases(stats) == {"read", "decode", "transform"}
    assert stats.bytes_read == dataset.records.index.nbytes.sum()
    assert stats.bytes_decoded == stats.bytes_transformed == len(dataset) * 48 * 72 * 3
    assert len(dataset) * 0.002 < stats.transform_s < seconds


def test_any_other_data_set_is_read_and_collated():
    stats, seconds = stats_of([np.full(1000, number, np.int16) for number in range(12)], 4)
    assert phases(stats) == {"read", "transform"}
    assert stats.bytes_transformed == 12 * 2000
    assert stats.read_s + stats.transform_s < seconds
