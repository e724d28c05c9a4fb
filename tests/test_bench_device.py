"""`stagein bench device` as a command: both contestants have a line, on the CPU and where there is a GPU there too."""

import json
import subprocess
import sys

import pytest

QUICK = ["--rounds", "2", "--round-seconds", "0.1", "--threads", "2", "--batch-size", "4", "--size", "64"]


def bench_device(*options: str) -> tuple[list[dict[str, object]], str]:
    command = [sys.executable, "-m", "stagein.tools.cli", "bench", "device", *QUICK, *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], output


@pytest.mark.parametrize(
    ("device", "options", "unit"),
    [
        ("cpu", [], "images/s"),
        ("cpu", ["--tensors", "int16", "--codec", "lz4"], "GB/s"),
        pytest.param("cuda", [], "images/s", marks=pytest.mark.gpu),
        pytest.param("cuda", ["--tensors", "int16", "--codec", "lz4"], "GB/s", marks=pytest.mark.gpu),
        pytest.param("cuda", ["--tensors", "float32"], "GB/s", marks=pytest.mark.gpu),
    ],
)
def test_what_reaches_the_device_has_a_line_beside_the_same_from_memory(device, options, unit):
    lines, output = bench_device("--device", device, *options)
    assert [line["contestant"] for line in lines] == ["from memory", "stagein"]
    assert all(line["unit"] == unit and len(line["rates"]) == 2 and min(line["rates"]) > 0 for line in lines)
    assert f"batches on {device}" in output
