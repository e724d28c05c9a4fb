"""LZ4 shards for a GPU: compressed blocks as the GPU takes them, and the same numbers as decoded on the CPU."""

from pathlib import Path

import lz4.block
import numpy as np
import pytest
import torch

from stagein.formats import Field, Schema, Writer
from stagein.formats.codecs import Codec, CodecName, lz4_block_bytes
from stagein.formats.errors import ChecksumError
from stagein.formats.lz4_blocks import find_lz4_blocks
from stagein.loaders import DataLoader, Graph, RecordDataset, volume_train
from stagein.loaders.batches import BatchReader, BatchTask
from stagein.loaders.dali_pipeline import define_pipeline
from stagein.loaders.engine import raise_first
from stagein.loaders.inflate import as_tensors, inflating, why_not_inflated, why_unfit
from stagein.loaders.order import RankBatch

dali = pytest.importorskip("nvidia.dali")
RECORDS = 6
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SHAPES = {
    "one block": ((5, 7, 3), "int16"),
    "several blocks": ((4, 30, 41, 23), "float32"),
    "blocks that cut elements": ((21, 1_009), "float64"),
    "no divisor": ((67_121,), "uint8"),
    "bool": ((9, 9), "bool"),
    "float16": ((1000, 99), "float16"),
}


def volume(record: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.random.default_rng(record).integers(0, 9, shape).astype("float32" if dtype == "bfloat16" else dtype)


def written(path: Path, shape: tuple[int, ...], dtype: str, codec: CodecName = "lz4") -> RecordDataset:
    field = Field(kind="tensor", dtype=dtype, shape=shape, codec=Codec(name=codec))
    schema = Schema(fields={"volume": field, "label": Field(kind="tensor", dtype="int64")}, primary="volume")
    with Writer(path, schema, container="hdf5", shard_bytes=1 << 20) as writer:
        for record in range(RECORDS):
            writer.write({"volume": volume(record, shape, dtype), "label": record})
    return RecordDataset(path, staged=None)


@pytest.fixture(scope="module", params=SHAPES)
def dataset(request, tmp_path_factory) -> RecordDataset:
    return written(tmp_path_factory.mktemp("lz4") / "volumes.st", *SHAPES[request.param])


def read_for_gpu(dataset: RecordDataset, ids: list[int]):
    reader = BatchReader(dataset, inflating(None, dataset), 0, raise_first, read_for_empty=True)
    return reader.read(BatchTask(0, 0, RankBatch(np.array(ids, np.int64), len(ids))))


def test_blocks_reach_the_gpu_compressed_and_inflate_to_the_record(dataset):
    field, ids = dataset.records.schema.primary_field, [3, 0, 5]
    batch = read_for_gpu(dataset, ids)
    assert batch.times.bytes_read == dataset.records.index.nbytes[ids].sum() < 3 * field.record_bytes
    assert list(batch.ready) == ["label"] and batch.ready["label"].tolist() == ids
    block_bytes = lz4_block_bytes(field.record_bytes)
    stored, offsets, sizes = batch.inputs.values()
    assert offsets.shape == sizes.shape == (3, field.record_bytes // block_bytes)
    for row, record in enumerate(ids):
        blocks = [
            lz4.block.decompress(stored[row][start : start + nbytes].tobytes(), uncompressed_size=block_bytes)
            for start, nbytes in zip(offsets[row], sizes[row], strict=True)
        ]
        assert {len(block) for block in blocks} == {block_bytes}
        content = np.frombuffer(b"".join(blocks), field.array_dtype).reshape(field.fixed_shape)
        assert np.array_equal(content, volume(record, field.fixed_shape, field.dtype))


def test_inflated_blocks_are_read_as_what_they_are(dataset):
    """The same operator as behind `decoders.inflate`, on the CPU."""
    field = dataset.records.schema.primary_field
    block_bytes = lz4_block_bytes(field.record_bytes)
    records = [volume(record, field.fixed_shape, field.dtype) for record in range(RECORDS)]
    blocks = [record.reshape(-1).view(np.uint8).reshape(-1, block_bytes) for record in records]
    pipeline = dali.Pipeline(batch_size=RECORDS, num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(as_tensors(dali.fn.external_source(lambda: blocks), field))
    pipeline.build()
    (output,) = pipeline.run()
    assert np.array_equal(np.asarray(output.as_tensor()), np.stack(records))


def normalised(nodes):
    return {"volume": dali.fn.cast(nodes["volume"], dtype=dali.types.FLOAT) / 3, "label": nodes["label"]}


GRAPHS = {
    "as stored": None,
    "volume": volume_train((3, 20, 10), mean=[1.0] * 4, std=[2.0] * 4, field="volume"),
    "a function": normalised,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_is_put_together_without_a_gpu(name, tmp_path):
    dataset = written(tmp_path / "volumes.st", *SHAPES["several blocks"])
    loader = DataLoader(dataset, 2, transform=GRAPHS[name], device="cpu", num_workers=1)
    inner: Graph | None = loader._translation.graph
    graph = inflating(inner, dataset)
    reader = BatchReader(dataset, graph, 0, raise_first, read_for_empty=True)
    inputs = reader.read(BatchTask(0, 0, RankBatch(np.arange(2), 2))).inputs
    pipeline, outputs = define_pipeline(graph, lambda: tuple(inputs.values()), tuple(inputs), 2, CUDA, 1)
    assert "volume" in outputs
    assert all(node.device == "gpu" for node in pipeline._graph_out)
    assert any("Inflate" in operator for operator in _operators(pipeline))


def _operators(pipeline) -> list[str]:
    """The names of all operators that the outputs of a pipeline depend on."""
    seen, waiting = [], [node.source for node in pipeline._graph_out]
    while waiting:
        operator = waiting.pop()
        if operator is not None and operator.name not in seen:
            seen.append(operator.name)
            waiting += [node.source for node in operator.inputs]
    return seen


def test_what_the_gpu_cannot_inflate_is_decoded_on_the_cpu_and_says_why(tmp_path):
    lz4_set = written(tmp_path / "lz4.st", (5, 7), "int16")
    assert why_not_inflated(lz4_set, CUDA) is None
    assert why_not_inflated(lz4_set, CPU) == "batches are delivered on cpu"
    said = DataLoader(lz4_set, device="cpu").explain()
    assert "decompression: lz4 on the CPU, because batches are delivered on cpu" in said
    zstd = written(tmp_path / "zstd.st", (5, 7), "int16", "zstd")
    assert why_not_inflated(zstd, CUDA) == "no GPU decoder takes zstd, only lz4"
    for dtype in ("complex64", "bfloat16"):
        without_type = written(tmp_path / f"{dtype}.st", (5, 7), dtype)
        assert why_not_inflated(without_type, CUDA) == f"DALI has no type for {dtype}"
    field = lz4_set.records.schema.primary_field
    assert why_unfit(field, "foreign") == "files of others have LZ4 blocks of any size"
    prime = field.model_copy(update={"shape": (7, 4_793_491)})  # its largest block is all of it
    assert why_unfit(prime, "hdf5") == "records of 67108874 bytes are no blocks of at most 16777216 bytes"
    labels = RecordDataset(tmp_path / "lz4.st", fields=["label"], staged=None)
    assert why_not_inflated(labels, CUDA) == "there is nothing to decompress"


@pytest.mark.parametrize("change", ["raw", "cut", "longer", "other blocks", "other size"])
def test_a_record_in_other_blocks_is_named(change):
    content = np.arange(200_000, dtype=np.uint32).view(np.uint8)
    good = np.frombuffer(Codec(name="lz4").encode(content.data, 4), np.uint8)
    bad = good.copy()
    if change == "raw":
        bad[12:16] = np.frombuffer(lz4_block_bytes(len(content)).to_bytes(4, "big"), np.uint8)
    elif change == "cut":
        bad = bad[:-1]
    elif change == "longer":
        bad = np.append(bad, np.uint8(0))
    elif change == "other blocks":
        bad[11] ^= 1
    else:
        bad[7] ^= 4
    assert len(find_lz4_blocks([good], len(content), str).offset) == 1
    with pytest.raises(ChecksumError, match="record of row 1 is not in LZ4 blocks"):
        find_lz4_blocks([good, bad, good], len(content), lambda row: f"record of row {row}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_gpu_inflates_to_the_same_numbers(name, num_workers, tmp_path):
    dataset = written(tmp_path / "volumes.st", *SHAPES["several blocks"])
    loaders = [
        DataLoader(dataset, 4, shuffle=True, transform=GRAPHS[name], device=device, num_workers=num_workers)
        for device in ("cpu", "cuda")
    ]
    assert "decompression: lz4 on the GPU" in loaders[1].explain()
    assert "device: batches are made on cuda:0 by DALI, 1 ahead" in loaders[1].explain()
    for ours, theirs in zip(*loaders, strict=True):
        assert theirs["volume"].is_cuda
        assert torch.equal(ours["label"], theirs["label"].cpu())
        torch.testing.assert_close(ours["volume"], theirs["volume"].cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_the_gpu_inflates_every_type_bit_by_bit(dataset):
    batches = [list(DataLoader(dataset, 4, device=device)) for device in ("cpu", "cuda")]
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours["volume"], theirs["volume"].cpu())
