"""Every rank holds a replica of the model: how they become equal, and how it is noticed when they are not."""

import hashlib

import torch

from stagein.collectives import Collective
from stagein.formats.errors import StageinError


@torch.no_grad()
def copy_from_rank_0(model: torch.nn.Module, collective: Collective) -> None:
    """Make parameters and buffers those of rank 0, bit by bit."""
    for tensor in (*model.parameters(), *model.buffers()):
        content = tensor.contiguous()
        collective.broadcast(content)
        tensor.copy_(content)


@torch.no_grad()
def average_buffers(model: torch.nn.Module, collective: Collective) -> None:
    """Make floating-point buffers their mean over the ranks: BatchNorm's statistics differ, each rank sees other samples."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers or collective.world.size == 1:
        return
    flat = torch.cat([buffer.float().view(-1) for buffer in buffers])
    collective.allreduce_sum(flat)
    flat.div_(collective.world.size)
    means = torch.split(flat, [buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean.view_as(buffer))


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the bits of all parameters: equal on two ranks if and only if their models are."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_diverged(model: torch.nn.Module, collective: Collective, steps: int) -> None:
    """All ranks made the same `steps` from the same start; memory or network that flips bits shows here. Raises StageinError."""
    fingerprints = collective.communicator.gather_all(fingerprint(model))
    different = [str(rank) for rank, each in enumerate(fingerprints) if each != fingerprints[0]]
    if different:
        error = StageinError(
            f"after step {steps} the parameters of rank {', '.join(different)} differ from those of rank 0: "
            "check the memory of these nodes, and that nothing but the trainer changes parameters"
        )
        error.reported_by_peer = collective.world.rank != 0
        raise error
