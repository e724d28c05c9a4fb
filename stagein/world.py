"""Who am I among how many: the ranks of a job, the nodes they are on, and the few words ranks say to each other.

`World` is a plain value. `connect()` finds out by MPI where a launcher started us, and otherwise we are alone; MPI is
not even imported then. Bulk data never passes here: see `ring.py` (stage-in) and `collectives.py` (gradients).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from stagein.formats.errors import StageinError, UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

NODE_VARIABLE = "STAGEIN_NODE"
"""Overrides the host name, so that one machine can play several nodes."""

_MPI_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size`; `local_rank` of the `local_size` ranks on node number `node` of `nodes`, called `node_name`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    nodes: int = 1
    node_name: str = "localhost"

    @classmethod
    def of_rank(cls, rank: int, node_names: list[str]) -> World:
        """The world as `rank` sees it when rank r is on the node `node_names[r]`; nodes are numbered by first appearance."""
        order = list(dict.fromkeys(node_names))
        mates = [other for other, name in enumerate(node_names) if name == node_names[rank]]
        return cls(
            rank=rank,
            size=len(node_names),
            local_rank=mates.index(rank),
            local_size=len(mates),
            node=order.index(node_names[rank]),
            nodes=len(order),
            node_name=node_names[rank],
        )


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This node's name: `STAGEIN_NODE` where it is set, else the host name. Raises UsageError for a name no path can hold."""
    name = environment.get(NODE_VARIABLE) or socket.gethostname()
    if "/" in name or "\0" in name or name in (".", ".."):
        raise UsageError(f"{NODE_VARIABLE}={name!r} cannot be part of a path: choose a name without slashes")
    return name


class Communicator:
    """The ranks of a job and the small things they tell each other. All methods but `abort` are collective."""

    def __init__(self, mpi: MPI.Comm | None = None) -> None:
        self.mpi = mpi
        """The MPI communicator, None when alone; for the modules that move bulk data."""
        name = node_name()
        if mpi is None:
            self.world = World(node_name=name)
        else:
            self.world = World.of_rank(mpi.Get_rank(), mpi.allgather(name))

    def barrier(self) -> None:
        if self.mpi is not None:
            self.mpi.Barrier()

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """`root`'s value, on every rank."""
        return value if self.mpi is None else self.mpi.bcast(value, root=root)

    def gather_all(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        return [value] if self.mpi is None else self.mpi.allgather(value)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that every rank runs alone; when it failed on any rank, it fails on all of them.

        The block must not communicate. Each failing rank raises its own error; the others raise the same kind of error,
        naming the first rank that failed and its node.
        """
        failure: StageinError | None = None
        try:
            yield
        except StageinError as error:
            failure = error
        except Exception as error:  # a bug must end the other ranks too
            failure = StageinError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
        reports = self.gather_all(None if failure is None else (type(failure), str(failure), self.world.node_name))
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report is not None:
                kind, sentence, where = report
                raise kind(f"rank {rank} on {where}: {sentence}")

    def abort(self, exit_code: int) -> NoReturn:
        """End every rank of the job at once, with this exit code. For failures in the middle of a collective."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.mpi is not None:
            self.mpi.Abort(exit_code)
        os._exit(exit_code)


def started_by_mpi(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether an MPI launcher started this process, or the script around us already started MPI."""
    return "mpi4py.MPI" in sys.modules or any(name in environment for name in _MPI_LAUNCHER_VARIABLES)


def connect() -> Communicator:
    """Join the job: over MPI when a launcher started us, alone otherwise.

    Raises UsageError when Slurm started several tasks but MPI sees only one: each would silently do all the work.
    """
    if not started_by_mpi():
        _refuse_unconnected_slurm_tasks(1)
        return Communicator()
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.thread_level = "funneled"
    from mpi4py import MPI

    _refuse_unconnected_slurm_tasks(MPI.COMM_WORLD.Get_size())
    return Communicator(MPI.COMM_WORLD)


def _refuse_unconnected_slurm_tasks(mpi_size: int, environment: Mapping[str, str] = os.environ) -> None:
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if mpi_size == 1 and tasks > 1 and "SLURM_PROCID" in environment:
        raise UsageError(
            f"srun started {tasks} tasks, but they do not see each other over MPI: start with mpirun, or with an srun --mpi=… "
            "that fits the MPI library of mpi4py"
        )
