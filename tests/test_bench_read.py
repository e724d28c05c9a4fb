"""`stagein bench read` and `bench write` as commands: every contestant that is installed has its line; no timing is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


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
