"""Options that change images, choose records or deal them out, over every source of images that has files of many records."""

import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mpi import run_ranks
from pictures import jpeg, png
from test_convert_ranks import tree
from test_source_tfrecord import bytes_list, example, int64_list, write
from test_source_webdataset import write_tar

from stagein.formats import Dataset, verify
from stagein.formats.seekable_images import SeekableJpegs
from stagein.formats.sources.selection import permutation
from stagein.loaders.shrink import ShrinkImages

COUNT = 23
Run = Callable[..., tuple[int, str, str]]


def image(number: int) -> bytes:
    return png(number, 40, 70) if number == 5 else jpeg(number, 40 + number, 70)


def label(number: int) -> int:
    return number % 7


def tfrecord(root: Path, suffix: str = "") -> list[str]:
    for first, stop in ((0, 10), (10, COUNT)):
        examples = [
            example({"image/encoded": bytes_list(image(n)), "image/class/label": int64_list(1 + label(n))})
            for n in range(first, stop)
        ]
        write(root / f"ä {first:02d}.tfrecord{suffix}", examples)
    return []


def gzip_tfrecord(root: Path) -> list[str]:
    return tfrecord(root, ".gz")


def webdataset(root: Path) -> list[str]:
    for first, stop in ((0, 10), (10, COUNT)):
        members = {}
        for n in range(first, stop):
            members[f"{n:03d}.{'png' if n == 5 else 'jpg'}"] = image(n)
            members[f"{n:03d}.cls"] = str(label(n)).encode()
        write_tar(root / f"ä {first:02d}.tar", members)
    return []


def parquet(root: Path) -> list[str]:
    images = pa.array(
        [{"bytes": image(n), "path": None} for n in range(COUNT)],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    table = pa.table({"image": images, "label": [label(n) for n in range(COUNT)]})
    pq.write_table(table, root / "ä.parquet", row_group_size=4)
    return []


def lmdb_database(root: Path) -> list[str]:
    with lmdb.open(str(root), map_size=1 << 24) as environment, environment.begin(write=True) as put:
        for n in range(COUNT):
            put.put(f"image-{n:03d}".encode(), image(n))
            put.put(f"label-{n:03d}".encode(), str(label(n)).encode())
    return ["--field", "image=image-*", "--field", "label=label-*"]


SOURCES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "TFRecord": ("tfrecord", tfrecord),
    "gzip TFRecord": ("tfrecord", gzip_tfrecord),
    "WebDataset": ("webdataset", webdataset),
    "Parquet": ("parquet", parquet),
    "LMDB": ("lmdb", lmdb_database),
}
SHRUNK = ShrinkImages(32, 80)
OPTIONS: dict[str, tuple[list[str], Callable[[bytes], bytes]]] = {
    "seekable": (["--seekable-jpeg"], lambda content: changed(SeekableJpegs(), content)),
    "shrunk": (["--image-max-side", "32", "--image-quality", "80"], lambda content: changed(SHRUNK, content)),
    "shrunk and seekable": (
        ["--image-max-side", "32", "--image-quality", "80", "--seekable-jpeg"],
        lambda content: changed(SeekableJpegs(), changed(SHRUNK, content)),
    ),
    "as they are, Zarr": (["--format", "zarr"], lambda content: content),
    "as they are, HDF5": (["--format", "hdf5"], lambda content: content),
}


def changed(change: Any, content: bytes) -> bytes:
    return bytes(change.apply(memoryview(content), "image").content)


def assert_records(target: Path, numbers: list[int], change: Callable[[bytes], bytes]) -> None:
    """These images, changed, with their sizes and labels, in this order."""
    dataset = Dataset(target)
    assert len(dataset) == len(numbers)
    for number, record in zip(numbers, dataset, strict=True):
        content = change(image(number))
        assert record["image"].tobytes() == content, number
        assert record["hw"].tolist() == list(cv2.imdecode(np.frombuffer(content, np.uint8), 1).shape[:2])
        assert record["label"] == label(number)
    assert not verify(target).problems


def split_numbers(chosen: list[int], seed: int) -> dict[str, list[int]]:
    """How --split a=0.6,b=0.4 deals the chosen records out, each part in the order they have."""
    cut = round(Fraction("0.6") * len(chosen))
    order = permutation(len(chosen), seed)
    return {name: [chosen[n] for n in sorted(part)] for name, part in (("a", order[:cut]), ("b", order[cut:]))}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("source", SOURCES)
def test_changed_images_of_chosen_records(
    tmp_path: Path,
    stagein: Run,
    source: str,
    options: str,
) -> None:
    kind, make = SOURCES[source]
    arguments, change = OPTIONS[options]
    (tmp_path / "in").mkdir()
    command = ("convert", kind, tmp_path / "in", *make(tmp_path / "in"), *arguments)
    small = ("--shard-bytes", "9kB", "--workers", "1")
    assert stagein(*command, tmp_path / "x.st", *small, "--limit", "17")[0] == 0
    assert_records(tmp_path / "x.st", list(range(17)), change)
    shuffled = ("--shuffle-seed", "5", "--limit", "19", "--split", "a=0.6,b=0.4")
    assert stagein(*command, tmp_path / "{split} ü.st", *small, *shuffled)[0] == 0
    for name, numbers in split_numbers(permutation(COUNT, 5)[:19].tolist(), 5).items():
        assert_records(tmp_path / f"{name} ü.st", numbers, change)


@pytest.mark.mpi
@pytest.mark.parametrize("source", [source for source in SOURCES if source != "TFRecord"])
def test_ranks_make_the_same_bytes(tmp_path: Path, stagein: Run, source: str) -> None:
    kind, make = SOURCES[source]
    (tmp_path / "in").mkdir()
    arguments, _ = OPTIONS["shrunk and seekable"]
    shuffled = ("--shuffle-seed", "5", "--limit", "19", "--split", "a=0.6,b=0.4", "--shard-bytes", "2kB")
    command = ("convert", kind, tmp_path / "in", *make(tmp_path / "in"), *arguments, *shuffled, "--workers", "1")
    ranks = run_ranks(2, sys.executable, "-m", "stagein.tools.cli", *command, tmp_path / "ranks {split}.st")
    assert ranks.returncode == 0, ranks.stderr
    assert stagein(*command, tmp_path / "one {split}.st")[0] == 0
    for name in ("a", "b"):
        assert Dataset(tmp_path / f"one {name}.st").manifest.num_shards > 3
        assert tree(tmp_path / f"ranks {name}.st") == tree(tmp_path / f"one {name}.st")


@pytest.mark.parametrize("source", SOURCES)
def test_a_shuffle_that_reads_all_for_every_shard_is_warned_of(
    tmp_path: Path,
    stagein: Run,
    source: str,
) -> None:
    kind, make = SOURCES[source]
    (tmp_path / "in").mkdir()
    command = ("convert", kind, tmp_path / "in", *make(tmp_path / "in"), tmp_path / "x.st", "--dry-run", "--json")
    is_costly = source in ("gzip TFRecord", "Parquet")
    for options, warned in (
        ((), False),
        (("--shuffle-seed", "1"), False),
        (("--shuffle-seed", "1", "--shard-bytes", "9kB"), is_costly),
    ):
        code, stdout, stderr = stagein(*command, *options)
        assert code == 0
        shards = json.loads(stdout)["shards"]
        assert (f"each of {shards} shards takes reading all of it" in " ".join(stderr.split())) == warned
