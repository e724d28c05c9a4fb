"""`stagein bench load` as a command: contestants that are installed have their line, in one unit; no timing is judged."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stagein.formats import Dataset
from stagein.formats.library_readers import read_by_h5py, read_by_preadv, read_by_tensorstore
from stagein.loaders.synthetic import make_image_folder
from stagein.tools.bench_load import Contestant, in_random_order, make_tensors, read_through


def _bench_load(*options: str) -> str:
    command = [sys.executable, "-m", "stagein.tools.cli", "bench", "load", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout


def test_images_have_a_line_for_each_contestant_chosen_and_look_as_pillows() -> None:
    quick = ["--rounds", "2", "--round-seconds", "0.1", "--threads", "2", "--batch-size", "8", "--size", "64"]
    chosen = ["stagein, seekable", "engine alone", "torch + pillow"]
    output = _bench_load(*quick, *(word for name in chosen for word in ("--against", name)))
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [line["contestant"] for line in lines] == ["stagein", *chosen]
    assert all(len(line["rates"]) == 2 and min(line["rates"]) > 0 for line in lines)
    psnr = {
        name: float(found) for name, found in re.findall(r"^(stagein.*?)  +first.* psnr (\S+)", output, re.MULTILINE)
    }
    assert psnr.keys() == {"stagein", "stagein, seekable"}
    assert min(psnr.values()) > 50
    assert re.search(r"^stagein / engine alone: ", output, re.MULTILINE)
    assert all(int(peak) > 50 for peak in re.findall(r"peak_mb (\d+)", output))


def test_a_contestant_is_waited_for_until_it_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = tmp_path / "busy"
    busy.write_text(
        f"#!{sys.executable}\nimport time\nopen('works', 'w').close()\n"
        "end = time.process_time() + 1.5\nwhile time.process_time() < end: pass\n"
        "open('rests', 'w').close()\ntime.sleep(60)\n"
    )
    busy.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(busy))
    with Contestant({"name": "busy"}, tmp_path / "log") as contestant:
        while not Path("works").exists():
            time.sleep(0.001)
        contestant.settle()
        assert Path("rests").exists()


def test_what_left_the_memory_is_there_again_once_it_was_read_through(tmp_path: Path) -> None:
    make_tensors(tmp_path / "x.st", "int16", codec=None)
    shards = sorted((tmp_path / "x.st").glob("shards/*"))
    for shard in shards:
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if all(map(_is_in_memory, shards)):
        pytest.skip("this file system drops nothing from memory when asked")
    read_through(tmp_path)
    assert all(map(_is_in_memory, shards))


def _is_in_memory(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            for position in range(0, path.stat().st_size, 1 << 16):
                os.preadv(file.fileno(), [bytearray(1)], position, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pytest.skip("this file system does not say what is in memory")
    return True


@pytest.mark.parametrize("seed", range(20))
def test_contestants_that_are_compared_in_pairs_run_one_after_the_other(seed: int) -> None:
    pair = {"stagein, DALI graph", "DALI alone"}
    names = ["stagein", "stagein, DALI graph", "DALI alone", "spdl", "litdata"]
    shuffled = in_random_order(names, random.Random(seed))
    assert sorted(shuffled) == sorted(names)
    first = min(map(shuffled.index, pair))
    assert set(shuffled[first : first + 2]) == pair


def test_a_contestant_that_there_is_not_is_refused() -> None:
    command = [sys.executable, "-m", "stagein.tools.cli", "bench", "load", "--against", "nobody"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert refused.returncode == 2
    assert "'nobody'" in refused.stderr


@pytest.mark.parametrize("command", ["load", "device"])
def test_less_than_a_batch_is_refused_and_not_waited_for(command: str, tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", images_per_class=2, height=32, width=32)
    for of_what in ([str(tmp_path / "images")], ["--tensors", "int16"]):
        refused = subprocess.run(
            [sys.executable, "-m", "stagein.tools.cli", "bench", command, "--batch-size", "5000", *of_what],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert refused.returncode == 2
        assert "records do not fill a batch of 5000" in refused.stderr


def test_tensors_have_a_line_for_each_contestant() -> None:
    options = [
        "--tensors",
        "int16",
        "--codec",
        "blosc-lz4",
        "--rounds",
        "2",
        "--round-seconds",
        "0.1",
        "--threads",
        "2",
    ]
    output = _bench_load(*options)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    rates = {line["contestant"]: line["rates"] for line in lines}
    assert {"stagein", "reading alone", "h5py", "torch + npy"} <= rates.keys()
    assert all(len(of_rounds) == 2 and min(of_rounds) > 0 for of_rounds in rates.values())
    assert lines[0]["records"] == "int16"
    assert lines[0]["codec"] == "blosc-lz4"


def test_tensors_as_they_are_have_the_system_alone_beside_them() -> None:
    output = _bench_load("--tensors", "float32", "--rounds", "1", "--round-seconds", "0.1", "--against", "preadv alone")
    assert "stagein / preadv alone: " in output and "does not take part" not in output


def test_contestants_read_the_same_numbers(tmp_path: Path) -> None:
    make_tensors(tmp_path / "x.st", "int16", codec=None)
    dataset, records = Dataset(tmp_path / "x.st"), [255, 0, 3, 254]
    expected = dataset.reader.read_tensors(np.array(records))
    for read in (read_by_preadv(dataset.path), read_by_h5py(dataset.path), read_by_tensorstore(dataset.path, 1)):
        found = np.zeros_like(expected)
        read(records, found)
        assert np.array_equal(found, expected)
