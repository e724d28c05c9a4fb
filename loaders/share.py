"""Which share of the samples this rank loads: what `distributed=` says, worked out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DistributedSampler

from stagein.formats.errors import UsageError
from stagein.world import find_rank


@runtime_checkable
class MeshDimension(Protocol):
    """One dimension of a `torch.distributed.DeviceMesh`, such as `mesh["dp"]`, as far as it matters here."""

    ndim: int

    def get_local_rank(self) -> int: ...

    def size(self) -> int: ...


Distributed = bool | tuple[int, int] | MeshDimension | None


@dataclass(frozen=True)
class Share:
    """Part `rank` of `world_size` equal parts of the samples."""

    rank: int = 0
    world_size: int = 1
    said_by: str = "nobody"


EVERYTHING = Share()


def find_share(distributed: Distributed) -> Share:
    """The share that `distributed` stands for. Raises UsageError for what is no share.

    True: rank and world of torch.distributed, MPI or Slurm (`stagein.world.find_rank`); (rank, world size); one dimension of
    a device mesh: ranks that differ only in the other dimensions (model parallel ones) get the same share.
    """
    if distributed is None or distributed is False:
        return EVERYTHING
    if distributed is True:
        return Share(*find_rank())
    if isinstance(distributed, MeshDimension):
        if distributed.ndim != 1:
            raise UsageError(
                f"distributed= is a device mesh of {distributed.ndim} dimensions: give the one that the data are divided "
                "along, such as mesh['dp']"
            )
        return Share(distributed.get_local_rank(), distributed.size(), "a device mesh")
    if isinstance(distributed, tuple) and len(distributed) == 2:
        rank, world_size = distributed
        if isinstance(rank, int) and isinstance(world_size, int) and 0 <= rank < world_size:
            return Share(rank, world_size, "the caller")
    raise UsageError(
        f"distributed={distributed!r} is not (rank, world size) with 0 <= rank < world size, nor True, False or one "
        "dimension of a device mesh"
    )


def divides_already(sampler: Iterable[Any] | None, batch_sampler: Iterable[Any] | None) -> bool:
    """Whether the user's sampler is torch's DistributedSampler, bare or below a batch sampler of any kind."""
    return isinstance(sampler, DistributedSampler) or isinstance(
        getattr(batch_sampler, "sampler", None), DistributedSampler
    )


def refuse_undivided() -> None:
    """Raise UsageError where there are several ranks, and nothing said how they divide the samples."""
    rank, world_size, said_by = find_rank()
    if world_size > 1:
        raise UsageError(
            f"this is rank {rank} of {world_size} by {said_by}, and every rank would load all samples: say distributed=True for a share "
            "each, distributed=False for all, or give a sampler"
        )
