"""on_error="replace": another record in place of a bad one, a line in the quarantine file, a budget, and the same pixels for
every world, on every path."""

import json
import pickle
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from stagein import formats
from stagein.formats import convert, scan_imagefolder
from stagein.formats.errors import ChecksumError, SourceError, UsageError
from stagein.formats.seekable_images import SeekableJpegs
from stagein.formats.sources.images import change_images
from stagein.loaders import DataLoader, PerSample, RecordDataset, image_train

pytest.importorskip("nvidia.dali")
UNREADABLE = [20, 21, 84]  # a neighbour is bad too, and the last one: its substitute is 0
UNDECODABLE = [9, 50]
BAD = sorted(UNREADABLE + UNDECODABLE)
SUBSTITUTES = {9: 10, 20: 22, 21: 22, 50: 51, 84: 0}


@pytest.fixture(scope="module")
def damaged(jpeg_folder, tmp_path_factory) -> RecordDataset:
    """85 images, label = number; some cannot be read, some cannot be decoded."""
    root = tmp_path_factory.mktemp("damaged")
    for number, image in enumerate(sorted(jpeg_folder.rglob("*.jpg"))):
        folder = root / "images" / f"{number:03d}"
        folder.mkdir(parents=True)
        content = bytearray(image.read_bytes())
        if number in UNDECODABLE:
            content[content.index(b"\xff\xc0") + 9] = 17  # components: header and end still look whole
        (folder / "image.jpg").write_bytes(content)
    convert(scan_imagefolder(root / "images"), root / "d.st", shard_bytes=64 << 10, chunk_bytes=16 << 10)
    dataset = RecordDataset(root / "d.st", staged=None)
    for record in UNREADABLE:
        flip_a_bit(dataset, record)
    return RecordDataset(root / "d.st", staged=None)


def flip_a_bit(dataset: RecordDataset, record: int, share: float | None = None) -> None:
    """In the header, or in the data behind this share of a record."""
    records = dataset.records
    place = 60 if share is None else int(share * records.index.nbytes[record])
    path = records.path / records.manifest.shards[int(records.index.shard[record])].file
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(int(records.index.offset[record]) + place)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))


PATHS = {
    "graph": {"transform": image_train(16), "device": "cpu"},
    "graph, samples": {"transform": image_train(16), "device": "cpu", "collate_fn": torch.utils.data.default_collate},
    "samples": {"transform": PerSample(lambda image: torch.from_numpy(image[:16, :16].copy()), "image")},
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*takes its place")
        yield


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("path", PATHS)
def test_bad_records_are_replaced_steps_stay_and_each_is_listed_once(damaged, path, num_workers, tmp_path):
    listed = tmp_path / "below" / "bad.jsonl"
    loader = DataLoader(
        damaged, 8, num_workers=num_workers, on_error="replace", quarantine=listed, shuffle=True, **PATHS[path]
    )
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["label"]) for batch in batches] == [8] * 10 + [5]
        expected = [SUBSTITUTES.get(record, record) for record in range(85)]
        assert sorted(label for batch in batches for label in batch["label"].tolist()) == sorted(expected)
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(line["record"] for line in lines) == BAD
    by_record = {line["record"]: line for line in lines}
    assert set(by_record[20]) == {"dataset", "record", "shard", "node", "reason"}
    assert "is damaged" in by_record[20]["reason"]
    assert "cannot be decoded" in by_record[9]["reason"]
    assert (damaged.records.path / by_record[9]["shard"]).is_file()
    assert loader.stats().bad_records == len(BAD)


def rows(batches) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    for batch in batches:
        for label, image in zip(batch["label"].tolist(), batch["image"], strict=True):
            found.setdefault(label, []).append(image.numpy().tobytes())
    return {label: sorted(images) for label, images in found.items()}


def test_the_same_substitutes_with_the_same_pixels_at_every_world_and_after_a_resume(damaged):
    def load(world_size: int, state=None, steps=None):
        batches = []
        for rank in range(world_size):
            loader = DataLoader(
                damaged,
                4,
                shuffle=True,
                num_workers=1,
                distributed=(rank, world_size),
                on_error="replace",
                **PATHS["graph"],
            )
            if state is not None:
                loader.load_state_dict(state)
            iterator = iter(loader)
            batches += [next(iterator) for _ in range(steps)] if steps else list(iterator)
            last = loader.state_dict()
        return batches, last

    whole, _ = load(1)
    assert rows(load(4)[0]) == rows(whole)
    first, state = load(2, steps=5)
    assert rows(first + load(3, state)[0]) == rows(whole)


def test_damage_outside_of_a_window_changes_nothing_whatever_was_seen_of_it_before(jpeg_folder, tmp_path):
    convert(change_images(scan_imagefolder(jpeg_folder), SeekableJpegs()), tmp_path / "s.st")
    dataset = RecordDataset(tmp_path / "s.st", staged=None)
    until = time.monotonic() + 100
    while dataset.records.windows_are_awaited():
        list(DataLoader(dataset, 8, **PATHS["graph"]))
        assert time.monotonic() < until
        time.sleep(0.1)
    for record in range(0, 85, 3):
        flip_a_bit(dataset, record, share=0.9)

    def make() -> DataLoader:
        return DataLoader(dataset, 8, shuffle=True, on_error="replace", **PATHS["graph"])

    whole = make()
    epochs = [rows(whole) for _ in range(3)]
    for number, epoch in enumerate(epochs):
        of_this = make()
        of_this.set_epoch(number)
        assert rows(of_this) == epoch
    assert 0 < of_this.stats().bad_records < whole.stats().bad_records


def test_a_loader_can_be_sent_to_another_process(damaged):
    loader = pickle.loads(pickle.dumps(DataLoader(damaged, 8, on_error="replace", **PATHS["graph"])))
    assert len(list(loader)) == 11


def test_one_more_than_the_budget_is_an_error_that_names_it(damaged):
    loader = DataLoader(damaged, 8, on_error="replace", error_budget=len(BAD) - 1, **PATHS["graph"])
    with pytest.raises(
        (ChecksumError, SourceError), match="It is bad record number 5, error_budget=4 lets no more pass"
    ):
        list(loader)
    assert len(list(DataLoader(damaged, 8, on_error="replace", error_budget=len(BAD), **PATHS["graph"]))) == 11


def test_every_replacement_is_a_warning_with_both_records(damaged):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(DataLoader(damaged, 8, on_error="replace", **PATHS["graph"]))
    said = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    assert len(said) == len(BAD)
    assert any("record 9 in" in text and text.endswith("Record 10 takes its place") for text in said)


def test_tensors_without_a_graph_are_replaced_too(tmp_path):
    with formats.Writer(tmp_path / "t.st") as writer:
        for number in range(10):
            writer.write(
                {"x": np.full(3000, number, np.float32), "y": np.full(2000, number, np.int64), "n": np.int64(number)}
            )
    flip_a_bit(RecordDataset(tmp_path / "t.st", staged=None), 3)
    dataset = RecordDataset(tmp_path / "t.st", staged=None)
    (batch,) = DataLoader(dataset, 10, on_error="replace")
    assert batch["n"].tolist() == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]
    assert batch["x"][:, 0].tolist() == batch["y"][:, 7].tolist() == batch["n"].tolist()
    with pytest.raises(ChecksumError, match="epoch 0, batch 0: record 3 in "):
        list(DataLoader(dataset, 10))


def test_a_data_set_of_bad_records_only_is_an_error(tmp_path):
    with formats.Writer(tmp_path / "t.st") as writer:
        for number in range(3):
            writer.write({"x": np.full(3000, number, np.float32)})
    for record in range(3):
        flip_a_bit(RecordDataset(tmp_path / "t.st", staged=None), record)
    with pytest.raises(ChecksumError, match="lets no more pass"):
        list(DataLoader(RecordDataset(tmp_path / "t.st", staged=None), 2, on_error="replace"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"on_error": "skip"}, "on_error='skip' is not known"),
        ({"quarantine": "bad.jsonl"}, "give on_error='replace'"),
        ({"on_error": "replace", "error_budget": -1}, "error_budget=-1"),
        (
            {"on_error": "replace", "num_workers": 1, "multiprocessing_context": "spawn"},
            "on_error='replace' is honoured in threads",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(damaged, arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        DataLoader(damaged, **arguments)


def test_other_data_sets_have_no_records_to_replace():
    with pytest.raises(UsageError, match="on_error='replace' needs a RecordDataset"):
        DataLoader([1, 2], on_error="replace")


def test_a_copy_is_read_from_the_source_before_anything_is_replaced(damaged, jpeg_dataset_path, tmp_path):
    staged = Path(shutil.copytree(jpeg_dataset_path, tmp_path / "copy.st", symlinks=True))
    flip_a_bit(RecordDataset(staged, staged=None), 41)
    loader = DataLoader(RecordDataset(jpeg_dataset_path, staged=staged), 8, on_error="replace", **PATHS["graph"])
    with pytest.warns(RuntimeWarning, match="from the source from now on"):
        assert len(list(loader)) == 11
    assert (loader.stats().bad_records, loader.stats().left_shards) == (0, 1)
