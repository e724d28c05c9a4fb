"""What launchers of ranks say in the environment, before any of them is asked. Light: it is also imported while a process is stopped."""

import os
import sys
from collections.abc import Mapping

_LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE")
_MPI_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")


def started_by_mpi(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether an MPI launcher started this process, or the script around us already started MPI."""
    return "mpi4py.MPI" in sys.modules or any(name in environment for name in _MPI_LAUNCHER_VARIABLES)


def ranks_on_this_node(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks the launcher started on this node, by its own word; 1 where it says nothing."""
    return max(1, *(int(environment.get(name, "1")) for name in _LOCAL_SIZE_VARIABLES))
