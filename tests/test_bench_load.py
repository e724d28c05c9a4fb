"""`stagein bench load` as a command: contestants that are installed have their line, in one unit; no timing is judged."""

import json
import subprocess
import sys


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
    command = [sys.executable, "-m", "stagein.tools.cli", "bench", "load", *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    rates = {line["contestant"]: line["rates"] for line in lines}
    assert {"stagein", "reading alone", "h5py", "torch + npy"} <= rates.keys()
    assert all(len(of_rounds) == 2 and min(of_rounds) > 0 for of_rounds in rates.values())
    assert lines[0]["records"] == "int16"
    assert lines[0]["codec"] == "blosc-lz4"
