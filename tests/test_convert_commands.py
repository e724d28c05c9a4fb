"""`stagein convert KIND`: look-alikes of published data sets packed by the command, and compared record by record.

Each has a prime number of good records, names with spaces and letters beyond ASCII, a NaN where it holds floats, one truncated
file and one empty one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lookalikes import (
    cosmoflow_names,
    cosmoflow_samples,
    write_cosmoflow_npy,
    write_deepcam_hdf5,
    write_deepcam_npy,
    write_deepcam_single,
)
from mpi import descendants
from pictures import jpeg, png
from test_source_tfrecord import bytes_list, example, float_list, write
from test_source_webdataset import write_tar

from stagein.formats import Dataset
from stagein.formats.errors import ExitCode
from stagein.formats.publish import PART_SUFFIX
from stagein.formats.sources.selection import permutation

Rows = list[dict[str, Any]]
COUNT = 13


def spoil(good: Path, *, prefix: str = "") -> None:
    """A truncated copy and an empty file beside a good file, both before it in the order of names."""
    content = good.read_bytes()
    for name, cut in (
        (f"{prefix}0 cut{good.suffix}", content[: len(content) // 2]),
        (f"{prefix}0 empty{good.suffix}", b""),
    ):
        (good.parent / name).write_bytes(cut)


def deepcam_hdf5(root: Path) -> Rows:
    rows = write_deepcam_hdf5(root)
    spoil(next(root.iterdir()), prefix="data-")
    return rows


def deepcam_npy(root: Path) -> Rows:
    rows = write_deepcam_npy(root)
    data, label = next(root.glob("data-*")), next(root.glob("label-*"))
    spoil(data, prefix="data-")
    spoil(label, prefix="label-")
    return rows


def cosmoflow_npy(root: Path) -> Rows:
    rows = write_cosmoflow_npy(root)
    for suffix in ("data", "label"):
        content = next(root.glob(f"*_{suffix}.npy")).read_bytes()
        (root / f"0 cut_{suffix}.npy").write_bytes(content[:-5])
        (root / f"0 empty_{suffix}.npy").write_bytes(b"")
    return rows


def cosmoflow_tfrecord(root: Path) -> Rows:
    root.mkdir()
    rows = [{"x": sample["data"], "y": sample["label"].copy()} for sample in cosmoflow_samples()]
    rows[1]["y"][2] = np.nan
    for name, row in zip(cosmoflow_names(), rows, strict=True):
        payload = example({"x": bytes_list(row["x"].tobytes()), "y": float_list(*row["y"].tolist())})
        path = write(root / f"{name}.tfrecord.gz", [payload])
        path.rename(path.with_suffix(""))  # MLPerf's are gzip without saying so
    spoil(root / f"{cosmoflow_names()[0]}.tfrecord")
    return rows


def imagefolder(root: Path) -> Rows:
    rows = []
    for label, name in enumerate(["n01 größe", "n02"]):
        (root / name).mkdir(parents=True)
        for number in range(COUNT):
            content = png(number) if number == 5 else jpeg(number, 8 + label)
            (root / name / f"bild {number:02d} ñ.JPEG").write_bytes(content)
            rows.append({"image": content, "label": label})
    spoil(root / "n02" / "bild 00 ñ.JPEG")
    return rows


def webdataset(root: Path) -> Rows:
    root.mkdir()
    rows: Rows = [
        {"image": jpeg(n), "label": n % 3, "txt": f"größe {n}", "json": float("nan") if n == 4 else n / 2}
        for n in range(COUNT)
    ]
    for start, name in ((0, "train-0 ä.tar"), (7, "train-1.tar")):
        members = {}
        for n, row in enumerate(rows[start : start + 7], start):
            members |= {f"ö {n}.jpg": row["image"], f"ö {n}.cls": str(row["label"]).encode()}
            members |= {f"ö {n}.txt": row["txt"].encode(), f"ö {n}.json": json.dumps(row["json"]).encode()}
        write_tar(root / name, members)
    content = (root / "train-1.tar").read_bytes()
    (root / "train-2 cut.tar").write_bytes(content[:700])
    (root / "train-3 empty.tar").write_bytes(b"")
    return rows


def parquet(root: Path) -> Rows:
    root.mkdir()
    rows: Rows = [
        {"image": jpeg(n), "label": n % 3, "boxes": np.full((n % 3, 4), np.nan if n == 5 else n, np.float32)}
        for n in range(COUNT)
    ]
    boxes = pa.array([row["boxes"].tolist() for row in rows], pa.list_(pa.list_(pa.float32(), 4)))
    images = pa.array(
        [{"bytes": row["image"], "path": "ä"} for row in rows], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({"image": images, "label": [row["label"] for row in rows], "boxes": boxes})
    pq.write_table(table, root / "train 0 é.parquet", row_group_size=4)
    spoil(root / "train 0 é.parquet")
    return rows


def lmdb_images(root: Path) -> Rows:
    root.mkdir()
    with (
        lmdb.open(str(root / "dätä 0.lmdb"), subdir=False, map_size=1 << 24) as environment,
        environment.begin(write=True) as put,
    ):
        for n in range(COUNT):
            put.put(str(n).encode(), jpeg(n))
        put.put(b"length", b"13")
        put.put(b"99", jpeg(99)[:-30])
        put.put(b"98", b"")
    (root / "dätä 0.lmdb-lock").unlink()
    return [{"image": jpeg(n)} for n in range(COUNT)]


COSMOFLOW_FIELDS = ["--field", "x=x:int16:12x12x12x4", "--field", "y=y:float32:4"]
SETS: dict[str, tuple[str, Callable[[Path], Rows], list[str]]] = {
    "DeepCAM, HDF5": ("hdf5", deepcam_hdf5, []),
    "DeepCAM, npy": ("npy", deepcam_npy, []),
    "CosmoFlow, npy": ("npy", cosmoflow_npy, []),
    "CosmoFlow, TFRecord": ("tfrecord", cosmoflow_tfrecord, COSMOFLOW_FIELDS),
    "ImageFolder": ("imagefolder", imagefolder, []),
    "WebDataset": ("webdataset", webdataset, []),
    "Parquet": ("parquet", parquet, []),
    "LMDB": ("lmdb", lmdb_images, []),
}


@pytest.mark.parametrize("name", SETS)
def test_look_alikes_come_back_record_by_record(
    name: str, tmp_path: Path, stagein: Callable[..., tuple[int, str, str]]
) -> None:
    kind, make, options = SETS[name]
    rows = make(tmp_path / "in put ü")
    target = tmp_path / "x.st"
    command = ("convert", kind, tmp_path / "in put ü", target, *options, "--shard-bytes", "40kB", "--workers", "2")
    code, _, stderr = stagein(*command)
    assert code == 3, stderr
    assert not target.exists()
    code, _, stderr = stagein(*command, "--skip-bad")
    assert code == 0, stderr
    assert len((target / "skipped.tsv").read_text().splitlines()) == 2
    assert_rows(Dataset(target), rows)
    assert stagein("verify", target)[0] == 0
    code, stdout, _ = stagein("info", target)
    assert code == 0
    assert f"made from {kind}" in stdout


def assert_rows(dataset: Dataset, rows: Rows) -> None:
    assert len(dataset) == len(rows)
    for record, row in zip(dataset, rows, strict=True):
        for field, expected in row.items():
            found = record[field]
            if isinstance(expected, bytes):
                assert found.tobytes() == expected
            elif isinstance(expected, np.ndarray):
                assert found.tobytes() == expected.tobytes()
                assert found.dtype == expected.dtype
                assert found.shape == expected.shape
            else:
                assert found == expected or (found != found and expected != expected), field


def test_deepcam_in_one_file(tmp_path: Path, stagein: Callable[..., tuple[int, str, str]]) -> None:
    rows = write_deepcam_single(tmp_path / "träin.h5", chunks=(3, 5, 7, 4), compression="gzip")
    assert stagein("convert", "hdf5", tmp_path / "träin.h5", tmp_path / "x.st", "--shard-bytes", "99kB")[0] == 0
    assert_rows(Dataset(tmp_path / "x.st"), rows)


def test_a_limit_that_leaves_nothing_is_refused(
    tmp_path: Path, jpeg_folder: Path, stagein: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, stderr = stagein("convert", "imagefolder", jpeg_folder, tmp_path / "x.st", "--limit", "0")
    assert code == ExitCode.USAGE
    assert "Invalid value for '--limit'" in stderr
    assert not list(tmp_path.glob("x.st*"))


def test_limit_and_shuffle(tmp_path: Path, jpeg_folder: Path, stagein: Callable[..., tuple[int, str, str]]) -> None:
    options = ("--limit", "11", "--shuffle-seed", "5")
    assert stagein("convert", "imagefolder", jpeg_folder, tmp_path / "x.st", *options)[0] == 0
    files = sorted(jpeg_folder.glob("*/*.jpg"))
    expected = [{"image": files[n].read_bytes(), "label": n // 17} for n in permutation(85, 5)[:11].tolist()]
    assert_rows(Dataset(tmp_path / "x.st"), expected)


def test_split(tmp_path: Path, jpeg_folder: Path, stagein: Callable[..., tuple[int, str, str]]) -> None:
    command = (
        "convert",
        "imagefolder",
        jpeg_folder,
        tmp_path / "x {split}.st",
        "--split",
        "train=0.8,val=0.1,test=0.1",
    )
    code, stdout, _ = stagein(*command, "--json")
    assert code == 0
    report = json.loads(stdout)["targets"]
    assert [part["records"] for part in report] == [68, 8, 9]
    images = [
        record["image"].tobytes() for name in ("train", "val", "test") for record in Dataset(tmp_path / f"x {name}.st")
    ]
    assert sorted(images) == sorted(file.read_bytes() for file in jpeg_folder.glob("*/*.jpg"))

    (tmp_path / "x val.st").rename(tmp_path / "gone")  # as if it had been killed after the first of them
    code, stdout, _ = stagein(*command)
    assert code == 0
    assert stdout.count("is complete already") == 2
    assert Dataset(tmp_path / "x val.st").manifest.id == Dataset(tmp_path / "gone").manifest.id
    code, _, stderr = stagein(*command[:-1], "train=0.7,val=0.2,test=0.1")
    assert code == 2
    assert "x train.st exists already" in stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["x.st", "--split", "a=0.5,b=0.5"], "write {split} in its name"),
        (["{split}", "--split", "a=0.5,b=0.6"], "adds up to 1.1"),
        (["{split}", "--split", "a=0.5,a=0.5"], "is not of the form NAME=SHARE"),
        (["{split}", "--split", "a"], "is not of the form NAME=SHARE"),
        (["{split}", "--split", "../a=1"], "is not of the form NAME=SHARE"),
        (["{split}", "--split", "a=0.999,b=0.001"], "too few for a split with b"),
        (["x.st", "--codec", "gzip"], "the codec 'gzip' is not known"),
    ],
)
def test_options_that_cannot_be(
    options: list[str], reason: str, tmp_path: Path, jpeg_folder: Path, stagein: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, stderr = stagein("convert", "imagefolder", jpeg_folder, tmp_path / options[0], *options[1:])
    assert code == 2
    assert reason in " ".join(stderr.replace("\u2502", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_dry_run(tmp_path: Path, jpeg_folder: Path, stagein: Callable[..., tuple[int, str, str]]) -> None:
    command = ("convert", "imagefolder", jpeg_folder, tmp_path / "x {split}.st", "--split", "a=0.6,b=0.4", "--dry-run")
    code, stdout, _ = stagein(*command)
    assert code == 0
    assert "x a.st: would be 51 records" in stdout
    assert "x b.st: would be 34 records" in stdout
    assert "image (primary)" in stdout
    first, second = json.loads(stagein(*command, "--json")[1])["targets"]
    assert first["records"] + second["records"] == 85
    assert first["nbytes"] > sum(file.stat().st_size for file in jpeg_folder.glob("*/*.jpg")) / 2
    assert list(tmp_path.iterdir()) == []


STREAM = """
import numpy as np

def records():
    for number in range(23):
        yield {"data": np.arange(number), "label": number, "text": "ä" * number}

def nothing():
    return iter([])

def broken():
    yield {"x": np.zeros(3)}
    raise OSError("no such disk")
"""


def test_a_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stagein: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "stream_of_records.py").write_text(STREAM)
    code, _, stderr = stagein("convert", "python", "stream_of_records:records", "x.st", "--limit", "19")
    assert code == 0, stderr
    rows = [{"data": np.arange(number), "label": number, "text": "ä" * number} for number in range(19)]
    assert_rows(Dataset(tmp_path / "x.st"), rows)
    code, _, stderr = stagein("convert", "python", "stream_of_records:records", "y.st", "--shuffle-seed", "1")
    assert code == 2
    assert "--shuffle-seed needs them by number" in stderr
    code, _, stderr = stagein("convert", "python", "stream_of_records:broken", "y.st")
    assert code == 3
    assert "record 1 of stream_of_records:broken failed: OSError: no such disk" in stderr
    code, _, stderr = stagein("convert", "python", "stream_of_records:nothing", "y.st")
    assert code == 3
    assert "nothing yields no records" in stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"x.st", "stream_of_records.py", "__pycache__"}


def test_a_killed_worker_is_a_sentence_and_the_same_command_ends_in_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time, numpy as np\n"
        "class Slow:\n"
        "    def __len__(self): return 120\n"
        "    def __getitem__(self, number):\n"
        "        time.sleep(0.02)\n"
        "        return {'x': np.full(99, number)}\n"
    )
    arguments = ["python", "slow:Slow", "x.st", "--shard-bytes", "3kB", "--workers", "2", "--codec", "none"]
    command = [sys.executable, "-m", "stagein.tools.cli", "convert", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        journal = tmp_path / f"x.st{PART_SUFFIX}" / "journal"
        while len(list(journal.glob("*.npz"))) < 3 and process.poll() is None:
            time.sleep(0.005)
        os.kill(descendants(process.pid)[-1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a worker process was killed" in stderr
    assert "Traceback" not in stderr
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert "kept from an earlier attempt" in again.stdout
    straight = subprocess.run(
        [*command[:6], "y.st", *command[7:]], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert straight.returncode == 0, straight.stderr
    assert Dataset(tmp_path / "x.st").manifest == Dataset(tmp_path / "y.st").manifest


def test_members_of_archives_that_become_no_field_are_told(
    tmp_path: Path, stagein: Callable[..., tuple[int, str, str]]
) -> None:
    others = ["left.jpg", "right.jpg", "seg.png", "pth", "flac", "wav"]
    members = {f"{n}.{extension}": jpeg(n) for n in range(3) for extension in others}
    write_tar(tmp_path / "a.tar", members | {f"{n}.cls": b"%d" % n for n in range(3)})
    code, _, complaint = stagein("convert", "webdataset", tmp_path / "a.tar", tmp_path / "x.st")
    assert code == 0
    assert (
        "members .left.jpg, .right.jpg, .seg.png, .pth, .flac and 1 more are left out: --field NAME=EXTENSION"
        in complaint
    )
    fields = [f"--field=f{number}={extension}" for number, extension in enumerate(others)]
    code, _, complaint = stagein("convert", "webdataset", tmp_path / "a.tar", tmp_path / "y.st", *fields)
    assert (code, "left out" in complaint) == (0, False)
