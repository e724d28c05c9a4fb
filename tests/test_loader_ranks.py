"""Real ranks that load together: an error on one of them is raised by all, or ends the job; none is left waiting."""

import sys
import time
from pathlib import Path

import pytest
from mpi import run_ranks

pytestmark = pytest.mark.mpi
RANK = Path(__file__).parent / "loader_rank.py"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("collective", ["mpi", "gloo"])
def test_an_error_on_one_rank_is_raised_by_all_in_place_of_the_same_batch(collective, workers, tmp_path):
    # Global batch 3 is samples 24 … 31: sample 29 is rank 1's.
    done = run_ranks(2, sys.executable, RANK, collective, "yes", workers, 29, env={"MEETING_FILE": tmp_path / "meet"})
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("raised"))
    assert len(lines) == 2, done.stdout
    assert lines[0] == "raised 3 False record 29 is damaged"
    assert lines[1].startswith("raised 3 True rank 1 on ")
    assert lines[1].endswith(": record 29 is damaged")


def test_an_error_in_the_first_batch_that_nobody_catches_ends_the_job_with_its_exit_code():
    started = time.monotonic()
    done = run_ranks(2, sys.executable, RANK, "mpi", "no", 0, 5)
    assert done.returncode == 5, (done.returncode, done.stderr)
    assert "record 5 is damaged" in done.stderr
    assert time.monotonic() - started < 30
