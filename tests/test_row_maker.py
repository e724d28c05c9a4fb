"""Rows of batches by one call of a kernel that reads, decodes and resizes: the same bits, and the same errors, as one by one."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from jpegs import picture, pillow_jpeg, variants
from PIL import Image

from stagein.formats import Dataset, convert, scan_imagefolder
from stagein.formats.errors import ChecksumError, SourceError
from stagein.formats.located import LocatedRecords
from stagein.formats.record_reader import PackedRecords
from stagein.formats.seekable_images import SeekableJpegs
from stagein.formats.sources.images import change_images
from stagein.loaders import RecordDataset, image_eval, image_train
from stagein.loaders.batches import BatchTask
from stagein.loaders.engine import EngineOptions, raise_first
from stagein.loaders.graphs import ImageGraph
from stagein.loaders.image_engine import ImageEngine
from stagein.loaders.order import RankBatch
from stagein.loaders.row_maker import RowMakers

CPU = EngineOptions(decode_threads=2, device=torch.device("cpu"), pin_memory=False, keep_between_epochs=False)
GRAPHS = {
    "train": image_train(48),
    "train, not antialiased, odd size": image_train(37, antialias=False),
    "eval": image_eval(56, resize=64),
}
_COMPILE_SECONDS = 100


@pytest.fixture(scope="module", autouse=True)
def kernels(photos: Path) -> None:
    """Wait until they are compiled."""
    makers, deadline = RowMakers(GRAPHS["eval"].output), time.monotonic() + _COMPILE_SECONDS
    with Dataset(photos / "plain.st") as plain, Dataset(photos / "seekable.st") as seekable:
        seekable.read_windows([0], [(0, 0, 1, 1)])
        plain.read_records([0])  # into memory
        while not makers.are_ready() or plain.locate([0]) is None:
            if not _says_what_is_in_memory(photos):
                pytest.skip("this file system does not say what is in memory, or this machine takes no machine code")
            assert time.monotonic() < deadline, "the kernels are not ready"
            time.sleep(0.1)


def _says_what_is_in_memory(folder: Path) -> bool:
    with (folder / "plain.st" / "manifest.json").open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) >= 0
        except OSError:
            return False


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of every sampling, grey, progressive, CMYK, and a PNG, of several sizes: not all are for the kernel."""
    root = tmp_path_factory.mktemp("photos")
    (root / "images" / "all").mkdir(parents=True)
    contents = [*variants().values(), *variants(200, 301).values()]
    contents += [pillow_jpeg(picture(*size, seed=1), quality=90) for size in ((83, 130), (500, 700), (30, 20))]
    for number, content in enumerate(contents):
        (root / "images" / "all" / f"{number:02d}.jpg").write_bytes(content)
    Image.fromarray(picture(70, 90)).save(root / "images" / "all" / "99.png")
    convert(scan_imagefolder(root / "images"), root / "plain.st")
    convert(change_images(scan_imagefolder(root / "images"), SeekableJpegs()), root / "seekable.st")
    return root


def tasks(count: int, batch_size: int = 7) -> Iterator[BatchTask]:
    for number, at in enumerate(range(0, count, batch_size)):
        ids = np.arange(at, min(at + batch_size, count))
        yield BatchTask(1, number, RankBatch(ids, len(ids)))


def an_engine(path: Path, graph: ImageGraph) -> ImageEngine:
    return ImageEngine(RecordDataset(path, staged=None), graph, 3, CPU, raise_first)


def images(engine: ImageEngine, count: int) -> list[torch.Tensor]:
    batches = engine.transform(engine.load(task) for task in tasks(count))
    return [batch["image"].clone() for _, batch in batches]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("kind", ["plain", "seekable"])
def test_rows_are_the_same_to_the_bit_with_the_kernel_and_without(photos, kind, name, monkeypatch):
    engine, count = an_engine(photos / f"{kind}.st", GRAPHS[name]), len(Dataset(photos / f"{kind}.st"))
    first = engine.load(next(tasks(count))).inputs["image"]
    assert isinstance(first, LocatedRecords if kind == "plain" else PackedRecords)
    epochs = [images(engine, count) for _ in range(2)]  # the second in the memory of the first
    monkeypatch.setattr(RowMakers, "are_ready", lambda makers: False)
    slow = images(an_engine(photos / f"{kind}.st", GRAPHS[name]), count)
    assert sum(map(len, slow)) == count
    for by_kernel in epochs:
        assert all(torch.equal(one, other) for one, other in zip(by_kernel, slow, strict=True))


def test_what_was_done_is_counted_alike(photos, monkeypatch):
    def totals() -> Sequence[int]:
        engine = an_engine(photos / "plain.st", GRAPHS["train"])
        done = [batch.times for batch, _ in engine.transform(engine.load(task) for task in tasks(30))]
        assert all(times.decode_s > 0 and times.transform_s > 0 and times.read_s > 0 for times in done)
        return [sum(times.bytes_read for times in done), sum(times.bytes_transformed for times in done)]

    by_kernel = totals()
    monkeypatch.setattr(RowMakers, "are_ready", lambda makers: False)
    assert by_kernel == totals()


@pytest.fixture
def changing(photos: Path, tmp_path: Path) -> Path:
    """A data set whose shard may be changed."""
    convert(scan_imagefolder(photos / "images"), tmp_path / "changing.st")
    (tmp_path / "changing.st" / Dataset(tmp_path / "changing.st").manifest.shards[0].file).chmod(0o644)
    return tmp_path / "changing.st"


def _change(path: Path, record: int, *, cut: bool) -> None:
    dataset = Dataset(path)
    shard, at = path / dataset.manifest.shards[0].file, int(dataset.index.offset[record]) + 20
    if cut:
        os.truncate(shard, at)
        return
    with shard.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize(("cut", "error", "words"), [(False, ChecksumError, "damaged"), (True, SourceError, "cut off")])
def test_a_record_that_changes_before_the_kernel_reads_it_is_named(changing, cut, error, words):
    engine = an_engine(changing, GRAPHS["train"])
    task = next(tasks(5))
    batch = engine.load(task)
    assert isinstance(batch.inputs["image"], LocatedRecords)
    _change(changing, 3, cut=cut)
    with pytest.raises(error, match=rf"^epoch 1, batch 0: record 3 in .* is {words}"):
        list(engine.transform(iter([batch])))


def test_a_bad_record_that_the_kernel_finds_is_replaced(changing):
    asked = []

    def replace_first(task, ids, failures):
        asked.extend(failures)
        return np.where(np.isin(np.arange(len(ids)), [failure.row for failure in failures]), 0, ids)

    engine = ImageEngine(RecordDataset(changing, staged=None), GRAPHS["eval"], 3, CPU, replace_first)
    good = images(engine, 5)[0]
    batch = engine.load(next(tasks(5)))
    _change(changing, 3, cut=False)
    ((host, made),) = engine.transform(iter([batch]))
    assert [failure.row for failure in asked] == [3]
    assert host.ids.tolist() == [0, 1, 2, 0, 4]
    assert torch.equal(made["image"], good[[0, 1, 2, 0, 4]])


@pytest.mark.parametrize("is_mapped", [True, False])
def test_records_that_are_not_in_memory_are_read_ahead(changing, is_mapped):
    dataset = Dataset(changing)
    (changing / dataset.manifest.shards[0].file).chmod(0o444 if is_mapped else 0o644)
    assert len(dataset.read_records([0, 1])) == 2
    assert dataset.locate([0, 1]) is not None
    shard, engine = changing / dataset.manifest.shards[0].file, an_engine(changing, GRAPHS["eval"])
    _evict_until(shard, lambda: dataset.locate([0, 1]) is None)
    _evict_until(shard, lambda: isinstance(engine.load(next(tasks(5))).inputs["image"], PackedRecords))


def _evict_until(shard: Path, is_so: Callable[[], bool]) -> None:
    """Pages that were lately added may stay at first, and what was asked for ahead may be there again."""
    until = time.monotonic() + 60
    with shard.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while not is_so():
            assert time.monotonic() < until
            time.sleep(0.1)  # what is on its way cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
