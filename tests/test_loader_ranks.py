"""Real ranks that load together: an error on one of them is raised by all, or ends the job; none is left waiting."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpi import run_ranks

pytestmark = pytest.mark.mpi
RANK = Path(__file__).parent / "loader_rank.py"


@pytest.mark.parametrize(("collective", "workers"), [("mpi", 2), ("gloo", 0)])
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


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_first_batch_after_which_its_rank_exits_ends_the_job(workers):
    """The other rank waits in the allreduce of the first step by then, and the exit of the first one for it."""
    started = time.monotonic()
    done = run_ranks(2, sys.executable, RANK, "mpi", "exits", workers, 5)
    assert done.returncode == 5, (done.returncode, done.stderr)
    assert "raised 0 False record 5 is damaged" in done.stdout
    assert "rank 1 ends the job: 1 other ranks have not seen in 3 s that it cannot go on" in done.stderr
    assert time.monotonic() - started < 60


def test_ranks_that_all_raise_an_error_exit_as_they_like():
    done = run_ranks(2, sys.executable, RANK, "mpi", "exits", 2, 29)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stdout.count("raised 3 ") == 2 and "ends the job" not in done.stderr


def test_worker_processes_beside_mpi_do_not_take_themselves_for_ranks():
    done = run_ranks(2, sys.executable, Path(__file__).parent / "worker_process_rank.py", "spawn")
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("loaded"))
    assert lines == ["loaded 0 1 4 5 8 9", "loaded 2 3 6 7 10 11"]


def test_worker_processes_are_not_forked_from_ranks():
    done = run_ranks(2, sys.executable, Path(__file__).parent / "worker_process_rank.py", "fork")
    assert done.returncode != 0
    assert "worker processes cannot be forked once MPI has started" in done.stderr


MESH = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
import torch.testing._internal.distributed.fake_pg
from stagein.formats.errors import UsageError
from stagein.loaders import DataLoader

for rank in range(4):
    dist.init_process_group("fake", rank=rank, world_size=4, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    loader = DataLoader(list(range(9)), 2, shuffle=True, distributed=mesh["dp"], seed=1)
    print("loaded", *(number for batch in loader for number in batch.tolist()))
    try:
        DataLoader(list(range(9)), 2, distributed=mesh)
    except UsageError as error:
        print("refused", error)
    dist.destroy_process_group()
"""


def test_ranks_of_one_replica_of_the_model_get_the_same_batches():
    done = subprocess.run([sys.executable, "-c", MESH], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("loaded")]
    assert loaded[0] == loaded[1] != loaded[2] == loaded[3]
    assert sorted(map(int, loaded[0] + loaded[2])) == list(range(9))
    assert done.stdout.count("give the one that the data are divided along, such as mesh['dp']") == 4
