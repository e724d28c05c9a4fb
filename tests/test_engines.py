"""The engines behind the fast path: the same numbers by each, bad rows named and replaced, memory reused only when free."""

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from jpegs import picture, pillow_jpeg, variants
from PIL import Image

from stagein.formats import Dataset, Writer, convert, scan_imagefolder
from stagein.formats.codecs import Codec
from stagein.formats.errors import ChecksumError
from stagein.formats.schema import Field, Schema
from stagein.formats.seekable_images import SeekableJpegs
from stagein.formats.sources.images import change_images
from stagein.loaders import DataLoader, RecordDataset, buffer_ring, image_eval, image_train
from stagein.loaders.batches import BatchTask
from stagein.loaders.buffer_ring import BufferRing
from stagein.loaders.dali_engine import DaliEngine
from stagein.loaders.dataset import decode_image
from stagein.loaders.engine import EngineOptions, raise_first
from stagein.loaders.fastpath import FastPath, ReadOptions
from stagein.loaders.image_decoder import ImageDecoder
from stagein.loaders.image_engine import ImageEngine
from stagein.loaders.order import RankBatch

RECORDS = 30
SHAPE = (3, 40, 50)


CPU = EngineOptions(decode_threads=2, device=torch.device("cpu"), pin_memory=False, keep_between_epochs=False)


def tasks_of(epoch: int, batches: Iterable[Sequence[int]]) -> Iterator[BatchTask]:
    """Batches of these samples, numbered from 0, without padding."""
    for number, ids in enumerate(batches):
        yield BatchTask(epoch, number, RankBatch(np.asarray(ids, dtype=np.int64), len(ids)))


def volume(record: int) -> np.ndarray:
    return np.random.default_rng(record).integers(-500, 500, SHAPE).astype(np.int16)


@pytest.fixture(scope="module", params=[None, "blosc-lz4", "lz4"])
def volumes(request, tmp_path_factory) -> Path:
    codec = request.param and Codec(name=request.param)
    path = tmp_path_factory.mktemp("volumes") / "volumes.st"
    schema = Schema(
        fields={
            "volume": Field(kind="tensor", dtype="int16", shape=SHAPE, codec=codec),
            "brain": Field(kind="tensor", dtype="bfloat16", shape=(4,)),
            "label": Field(kind="tensor", dtype="int64"),
        }
    )
    with Writer(path, schema, container="hdf5", shard_bytes=64 << 10) as writer:
        for record in range(RECORDS):
            writer.write({"volume": volume(record), "brain": np.full(4, record, np.float32), "label": record})
    return path


def damage(path: Path, record: int) -> Path:
    """Flip a bit of a record of the primary field."""
    dataset = Dataset(path)
    shard = path / dataset.manifest.shards[int(dataset.index.shard[record])].file
    shard.chmod(0o644)
    with shard.open("r+b") as file:
        file.seek(int(dataset.index.offset[record]) + 20)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    return path


# --- tensors without a graph ---


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tensors_are_those_that_torch_collates(volumes, num_workers):
    dataset = RecordDataset(volumes, staged=None)
    ours = DataLoader(dataset, 4, shuffle=True, num_workers=num_workers)
    assert "read straight into the batch" in ours.explain()
    by_sample = DataLoader(dataset, 4, shuffle=True, collate_fn=lambda samples: samples)
    assert "by the caller, because collate_fn takes samples" in by_sample.explain()
    seen = 0
    for batch, samples in zip(ours, by_sample, strict=True):
        assert list(batch) == ["volume", "brain", "label"]
        assert (batch["volume"].dtype, batch["brain"].dtype) == (torch.int16, torch.bfloat16)
        for row, sample in enumerate(samples):
            assert torch.equal(batch["volume"][row], torch.as_tensor(sample["volume"]))
            assert torch.equal(batch["brain"][row], sample["brain"])
            assert batch["label"][row] == sample["label"]
            seen += 1
    assert seen == RECORDS


def test_fields_are_chosen_and_empty_batches_have_the_right_shape(volumes):
    labels = DataLoader(RecordDataset(volumes, fields=["label"], staged=None), 8)
    assert next(iter(labels))["label"].tolist() == list(range(8))
    assert all(list(batch) == ["label"] for batch in labels)
    last = list(DataLoader(RecordDataset(volumes, staged=None), 7, distributed=(3, 4)))[-1]
    assert last["volume"].shape == (0, *SHAPE)


# --- the ring ---


def test_a_batch_that_is_kept_never_changes(volumes):
    kept = [
        (batch, batch["volume"].clone()) for batch in DataLoader(RecordDataset(volumes, staged=None), 4, shuffle=True)
    ]
    assert all(torch.equal(batch["volume"], copy) for batch, copy in kept)


@pytest.mark.parametrize(
    "keep",
    [
        lambda tensor: tensor[1:, 0],
        lambda tensor: tensor.numpy()[2],
        lambda tensor: np.asarray(tensor.numpy()).view(np.uint8)[3:],
        lambda tensor: torch.utils.dlpack.from_dlpack(tensor)[0],
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: memoryview(tensor.numpy()),
    ],
)
def test_memory_comes_back_when_the_last_view_is_gone(keep):
    ring = BufferRing(max_idle=2)

    def address() -> int:
        return ring.take((4, 100), np.int16).ctypes.data

    array = ring.take((4, 100), np.int16)
    first = array.ctypes.data
    held = keep(torch.from_numpy(array))
    del array
    gc.collect()
    assert address() != first
    others = [ring.take((4, 100), np.int16) for _ in range(3)]
    assert first not in [other.ctypes.data for other in others]
    del held
    gc.collect()
    assert first in [ring.take((4, 100), np.int16).ctypes.data for _ in range(1)] + [address()]


def test_memory_that_is_too_small_is_replaced_and_idle_memory_is_bounded():
    ring = BufferRing(max_idle=2)
    arrays = [ring.take((10,), np.int64) for _ in range(5)]
    del arrays
    gc.collect()
    large = ring.take((1000,), np.int64)
    large[:] = 7
    assert ring.take((1000,), np.float32).shape == (1000,)
    assert (large == 7).all()
    assert ring._idle.qsize() <= 2


def test_memory_that_is_about_to_come_back_is_waited_for_until_that_was_once_in_vain(monkeypatch):
    monkeypatch.setattr(buffer_ring, "_PATIENCE_SECONDS", 60)
    ring = BufferRing(max_idle=4, num_enough=2)
    arrays = [ring.take((100,), np.int64) for _ in range(2)]
    addresses = {array.ctypes.data for array in arrays}
    giving_back = threading.Timer(0.1, arrays.clear)
    giving_back.start()
    again = ring.take((100,), np.int64)
    assert again.ctypes.data in addresses
    giving_back.join()
    held = [again, ring.take((100,), np.int64)]
    monkeypatch.setattr(buffer_ring, "_PATIENCE_SECONDS", 0.01)
    held.append(ring.take((100,), np.int64))
    monkeypatch.setattr(buffer_ring, "_PATIENCE_SECONDS", 1e6)
    held.append(ring.take((100,), np.int64))
    assert len({array.ctypes.data for array in held}) == 4


# --- rows that fail ---


class Substitutes:
    """What a policy does: puts the next record in place of a bad one, and notes what it was told."""

    def __init__(self) -> None:
        self.failures = []

    def __call__(self, task, ids, failures):
        self.failures += [(task.number, failure.row, str(failure.error)) for failure in failures]
        ids = ids.copy()
        for failure in failures:
            ids[failure.row] = (ids[failure.row] + 1) % RECORDS
        return ids


def deliver(path: FastPath, batches) -> Iterator:
    return (batch for _, batch in path.run(tasks_of(0, batches)))


@pytest.mark.parametrize("num_readers", [0, 2])
def test_rows_of_tensors_that_fail_are_named_and_replaced(volumes, tmp_path, num_readers):
    path = tmp_path / "copy.st"
    shutil.copytree(volumes, path, symlinks=True)
    damage(damage(path, 5), 6)
    dataset = RecordDataset(path, staged=None)
    with pytest.raises(ChecksumError, match=r"^epoch 0, batch 1: record 5 in .* is damaged"):
        list(DataLoader(dataset, 4, num_workers=num_readers))
    policy = Substitutes()
    fast_path = FastPath(dataset, None, 0, ReadOptions(num_readers, 2, 0), CPU, policy)
    batches = list(deliver(fast_path, [range(4), range(4, 8)]))
    assert [batch["label"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 7, 7, 7]]
    assert np.array_equal(batches[1]["volume"][1].numpy(), volume(7))
    assert [(number, row) for number, row, _ in policy.failures] == [(1, 1), (1, 2), (1, 1)]
    assert all("record 5" in text or "record 6" in text for *_, text in policy.failures)


# --- images without a GPU ---


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """JPEGs of every sampling, grey, progressive, CMYK, and a PNG, of several sizes."""
    root = tmp_path_factory.mktemp("photos")
    (root / "images" / "all").mkdir(parents=True)
    for number, content in enumerate([*variants().values(), *variants(200, 301).values()]):
        (root / "images" / "all" / f"{number:02d}.jpg").write_bytes(content)
    for number, size in enumerate([(83, 130), (400, 300), (500, 700)], start=90):
        content = pillow_jpeg(picture(*size, seed=number), quality=90)
        (root / "images" / "all" / f"{number}.jpg").write_bytes(content)
    Image.fromarray(picture(70, 90)).save(root / "images" / "all" / "99.png")
    convert(scan_imagefolder(root / "images"), root / "plain.st")
    convert(change_images(scan_imagefolder(root / "images"), SeekableJpegs()), root / "seekable.st")
    with Dataset(root / "seekable.st") as dataset:
        dataset.read_windows([0], [(0, 0, 1, 1)])  # waits until there are kernels for that
    return root


def by_engine(engine: type, path: Path, graph, batch_size: int = 5, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    dataset = RecordDataset(path, staged=None)
    tasks = tasks_of(1, [range(at, min(at + batch_size, len(dataset))) for at in range(0, len(dataset), batch_size)])
    made = engine(dataset, graph, seed, CPU, raise_first)
    return [batch for _, batch in made.transform(made.load(task) for task in tasks)]


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """In dB, of values of which 1 is the largest."""
    return float(-10 * torch.log10(torch.mean((one - other) ** 2)))


GRAPHS = {
    "train": image_train(48, mean=(0, 0, 0), std=(1, 1, 1)),
    "train, not antialiased": image_train(48, mean=(0, 0, 0), std=(1, 1, 1), antialias=False),
    "eval": image_eval(56, resize=64, mean=(0, 0, 0), std=(1, 1, 1)),
    "eval, enlarged": image_eval(224, mean=(0, 0, 0), std=(1, 1, 1)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_threads_and_dali_make_the_same_images(photos, name):
    """At least 40 dB: DALI rounds each image to 8 bits before it normalises, and decodes CMYK its own way."""
    pytest.importorskip("nvidia.dali")
    ours, theirs = (by_engine(engine, photos / "plain.st", GRAPHS[name]) for engine in (ImageEngine, DaliEngine))
    for mine, dalis in zip(ours, theirs, strict=True):
        assert torch.equal(mine["label"], dalis["label"])
        assert all(psnr(one, other) > 40 for one, other in zip(mine["image"], dalis["image"], strict=True))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("engine", [ImageEngine, DaliEngine])
def test_seekable_shards_give_the_same_bits(photos, engine, name):
    if engine is DaliEngine:
        pytest.importorskip("nvidia.dali")
    plain, cut = (by_engine(engine, photos / f"{kind}.st", GRAPHS[name]) for kind in ("plain", "seekable"))
    for whole, part in zip(plain, cut, strict=True):
        assert torch.equal(whole["image"], part["image"])


@pytest.mark.parametrize("kind", ["plain", "seekable"])
def test_training_on_images_takes_no_compiler_into_memory(photos, kind):
    script = (
        "import sys; from stagein.loaders import DataLoader, RecordDataset, image_train\n"
        "loader = DataLoader(RecordDataset(sys.argv[1], staged=None), 4, transform=image_train(32), device='cpu')\n"
        "print(len(next(iter(loader))['image']), sorted({'numba', 'llvmlite'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(photos / f"{kind}.st")]
    assert subprocess.check_output(command, text=True, timeout=100).strip() == "4 []"


def test_seekable_images_are_read_whole_to_the_same_bits_while_kernels_are_compiled(photos, tmp_path):
    script = (
        "import hashlib, sys; from stagein.loaders import DataLoader, RecordDataset, image_train\n"
        "transform = image_train(48, area=(0.1, 0.3))\n"
        "loader = DataLoader(RecordDataset(sys.argv[1], staged=None), 8, transform=transform, device='cpu')\n"
        "images = next(iter(loader))['image']\n"
        "print(hashlib.sha256(images.numpy()).hexdigest(), loader.stats().bytes_read)"
    )
    command, found = [sys.executable, "-c", script, str(photos / "seekable.st")], []
    for settings in ({}, {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}):
        output = subprocess.check_output(command, env={**os.environ, **settings}, text=True, timeout=100)
        found.append(output.split())
    assert found[0][0] == found[1][0]
    assert int(found[0][1]) < 0.8 * int(found[1][1])


def test_what_a_first_batch_waits_for_is_compiled_from_when_the_loader_is_made(photos, tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from stagein.loaders import DataLoader, RecordDataset, image_train\n"
        "dataset = RecordDataset(sys.argv[1], staged=None)\n"
        "loader = DataLoader(dataset, 8, transform=image_train(48), device='cpu')\n"
        "while not list(Path(sys.argv[2]).glob('resize-*.o')): time.sleep(0.01)\n"
    )
    command = [sys.executable, "-c", script, str(photos / "plain.st"), str(tmp_path)]
    subprocess.run(command, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}, check=True, timeout=100)


def test_of_seekable_shards_less_is_read(photos):
    graph = image_train(48, area=(0.1, 0.3))
    read = []
    for kind in ("plain", "seekable"):
        loader = DataLoader(RecordDataset(photos / f"{kind}.st", staged=None), 5, transform=graph, device="cpu")
        list(loader)
        read.append(loader.stats().bytes_read)
    assert read[1] < 0.8 * read[0]


def test_rows_below_a_window_are_not_decoded_and_those_in_it_are_the_same():
    decoder = ImageDecoder()
    for name, content in variants(200, 301).items():
        record = np.frombuffer(content, np.uint8).copy()
        whole = decoder.decode_rows(record, 10**6).copy()
        for bottom in (1, 7, 8, 17, 90, 199, 200):
            decoder._memory[:] = 99  # what an image before it left there
            part = decoder.decode_rows(record, bottom)
            assert bottom <= len(part) <= len(whole), name
            assert np.array_equal(part[:bottom], whole[:bottom]), (name, bottom)
            assert record.tobytes() == content
    plain = np.frombuffer(variants(200, 301)["4:2:0"], np.uint8).copy()
    assert len(decoder.decode_rows(plain, 50)) < 100


def test_a_damaged_image_is_what_it_is_when_decoded_whole():
    """libjpeg says nothing of wrong codes; OpenCV shows what it can, as Pillow does, and so do we."""
    content = bytearray(variants(200, 301)["4:2:0"])
    start = content.index(b"\xff\xda") + 400
    content[start : start + 60] = b"\xff\x00" * 30  # no Huffman code has so many ones
    record = np.frombuffer(bytes(content), np.uint8).copy()
    whole = decode_image(record)
    assert whole is not None
    assert np.array_equal(ImageDecoder().decode_rows(record, 150)[:150], whole.reshape(len(whole), -1)[:150])


def test_a_kept_batch_of_images_never_changes_and_no_thread_is_left(photos):
    loader = DataLoader(
        RecordDataset(photos / "plain.st", staged=None), 4, transform=image_train(32), device="cpu", num_workers=1
    )
    kept = [(batch["image"], batch["image"].clone()) for _ in range(3) for batch in loader]
    assert all(torch.equal(image, copy) for image, copy in kept)
    batches = iter(loader)
    next(batches)
    assert any(thread.name.startswith("stagein-decoder") for thread in threading.enumerate())
    del batches
    gc.collect()
    assert not any(thread.name.startswith("stagein") for thread in threading.enumerate())


def test_batches_that_are_let_go_of_lie_in_two_places_of_memory(photos, monkeypatch):
    monkeypatch.setattr(buffer_ring, "_PATIENCE_SECONDS", 60)
    dataset = RecordDataset(photos / "plain.st", staged=None)
    loader = DataLoader(dataset, 2, transform=image_train(64), device="cpu", num_workers=1, decode_threads=3)
    places = set()
    for _ in range(2):
        for batch in loader:  # the last one is let go of when the next one is there
            places.add(batch["image"].data_ptr())
    assert len(places) <= 2


@pytest.mark.parametrize("engine", [ImageEngine, DaliEngine])
def test_images_that_cannot_be_decoded_are_named_and_replaced(photos, tmp_path, engine):
    if engine is DaliEngine:
        pytest.importorskip("nvidia.dali")
    (tmp_path / "images" / "all").mkdir(parents=True)
    for number in range(8):
        content = bytearray(pillow_jpeg(picture(60, 80, seed=number), quality=90))
        if number in (2, 5):
            content[content.index(b"\xff\xc0") + 9] = 17  # components: header and end still look whole
        (tmp_path / "images" / "all" / f"{number}.jpg").write_bytes(content)
    convert(scan_imagefolder(tmp_path / "images"), tmp_path / "images.st")
    dataset, policy = RecordDataset(tmp_path / "images.st", staged=None), Substitutes()
    made = engine(dataset, image_train(16), 0, CPU, policy)
    batches = [
        batch["image"] for _, batch in made.transform(made.load(task) for task in tasks_of(0, [range(4), range(4, 8)]))
    ]
    assert [(number, row) for number, row, _ in policy.failures] == [(0, 2), (1, 1)]
    assert "record 2 in" in policy.failures[0][2] and "cannot be decoded" in policy.failures[0][2]
    clean = engine(dataset, image_train(16), 0, CPU, raise_first)
    whole = [b["image"] for _, b in clean.transform(clean.load(t) for t in tasks_of(0, [[0, 1, 3, 3], [4, 6, 6, 7]]))]
    assert all(torch.equal(one, other) for one, other in zip(batches, whole, strict=True))


def test_an_error_of_reading_comes_after_the_batches_before_it(photos):
    made = ImageEngine(RecordDataset(photos / "plain.st", staged=None), image_train(16), 0, CPU, raise_first)

    def failing():
        yield made.load(next(tasks_of(0, [[0, 1]])))
        raise LookupError("no more")

    batches = made.transform(failing())
    assert next(batches)[1]["image"].shape == (2, 3, 16, 16)
    with pytest.raises(LookupError):
        next(batches)
