"""`stagein bench load` as a command: contestants that are installed have their line, in one unit; no timing is judged."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stagein.formats import Dataset
from stagein.formats.library_readers import read_by_h5py, read_by_preadv, read_by_tensorstore
from stagein.loaders.synthetic import make_image_folder
from stagein.tools.bench_load import in_random_order, make_tensors


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
