"""What MPI means for processes that a rank starts beside itself, such as torch's worker processes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .launchers import started_by_mpi

_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL")


def mpi_connects_ranks() -> bool:
    """Whether MPI runs in this process and others: a fork of it may corrupt or hang what they say to each other."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1


@contextmanager
def hidden_from_mpi() -> Iterator[None]:
    """Processes started in this block do not take themselves for a rank.

    A script with `from mpi4py import MPI` at its top runs it again in every process that is spawned; a second MPI_Init
    under the name of the same rank ends the job with Open MPI 5.
    """
    if not started_by_mpi():
        yield
        return
    names = [name for name in os.environ if name.startswith(_LAUNCHER_PREFIXES)]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)
