"""`stagein bench read`, `bench write` and `bench decode` as commands: every contestant that is installed has its line; no timing is judged."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stagein.tools.bench_read import _records_per_second


@pytest.mark.parametrize("bench", ["read", "write"])
def test_a_line_for_each_contestant_and_a_table(tmp_path: Path, bench: str) -> None:
    options = ["--record-bytes", "3kB", "--total-bytes", "60kB", "--rounds", "1", "--work", str(tmp_path)]
    options += ["--threads", "2"] if bench == "read" else []
    command = [sys.executable, "-m", "stagein.tools.cli", "bench", bench, *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    rates = {line["contestant"]: line["rates"] for line in lines}
    assert {"stagein", "h5py", "zarr-python"} <= rates.keys()
    assert all(rate > 0 for of_rounds in rates.values() for rate in of_rounds)
    assert lines[0]["record_bytes"] == 3000
    assert lines[0]["records"] == 20
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", ["blosc-lz4", "lz4"])
def test_decoding_with_one_thread_and_with_several(tmp_path: Path, codec: str) -> None:
    command = [sys.executable, "-m", "stagein.tools.cli", "bench", "decode", "--codec", codec, "--rounds", "1"]
    command += ["--threads", "3", "--work", str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    rates = {
        line["contestant"]: line["rates"]
        for line in [json.loads(line) for line in output.splitlines() if line[0] == "{"]
    }
    peers = {"h5py"} if codec == "lz4" else {"h5py", "tensorstore"}
    assert rates.keys() == {"stagein, 1 thread", "stagein, 3 threads", "3 processes", *peers}
    assert output.splitlines()[-1].startswith("stagein, 3 threads beside 3 processes: ")
    assert all(rate > 0 for of_rounds in rates.values() for rate in of_rounds)


def test_a_rate_counts_no_more_time_than_was_taken():
    """A reader that keeps the GIL, as copying bytes does, kept whoever took the time from it for seconds, while the reader went on."""
    ended_at = [time.perf_counter()]

    def read(numbers: NDArray[np.int64]) -> int:
        if len(ended_at) == 1:
            time.sleep(0.1)  # whoever looks on is ready before it
        total = sum(range(2_000_000))
        ended_at.append(time.perf_counter())
        return total

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1.0)
    try:
        rate = _records_per_second(lambda: read, num_records=10, batch=4, threads=1)
    finally:
        sys.setswitchinterval(interval)
    assert rate < 1.5 * 4 * len(ended_at) / (ended_at[-1] - ended_at[0])
