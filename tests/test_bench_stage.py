"""`stagein bench stage` as a command: every contestant has its line; and the paced source keeps its pace."""

import json
import sys
import threading
import time
from pathlib import Path

from mpi import run_ranks
from synthetic import write_dataset

from stagein.tools.bench_stage import SharedRate


def test_all_contestants_run_and_leave_nothing(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [300_000, 200_001])
    work = tmp_path / "work"
    command = ["-m", "stagein.tools.cli", "bench", "stage", tmp_path / "set", "--work", work, "--rounds", "1"]
    plain = run_ranks(2, sys.executable, *command)
    assert plain.returncode == 0, plain.stderr
    contestants = [json.loads(line)["contestant"] for line in plain.stdout.splitlines() if line.startswith("{")]
    assert all(f"\n{name}: " in f"\n{plain.stdout}" for name in contestants), "each line says what it does"
    assert contestants == [
        "Bcast of chunks",
        "Bcast, verified",
        "cp on every node",
        "cp, verified",
        "stagein",
        "stagein, unverified",
        "writing alone",
    ]
    paced = run_ranks(2, sys.executable, *command, "--source-rate", "4MB")
    assert paced.returncode == 0, paced.stderr
    rates = {
        line["contestant"]: line["rates"][0]
        for line in map(json.loads, filter(lambda text: text.startswith("{"), paced.stdout.splitlines()))
    }
    assert rates.pop("read-once bound") == 4
    assert max(rates.values()) < 4
    assert rates["cp on every node"] < 2  # both nodes read everything through the one source
    assert not work.exists()


def test_threads_and_ranks_share_the_rate_of_a_source(tmp_path: Path) -> None:
    ranks = [SharedRate(tmp_path, 1e9) for _ in range(2)]
    started = time.monotonic()
    threads = [
        threading.Thread(target=lambda rank=rank: [rank.reserve(1_000_000) for _ in range(1000)])
        for rank in ranks
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ranks[0].reserve(0) - started >= 8.0  # 8 x 1000 slots of a millisecond
