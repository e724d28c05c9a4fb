"""Run on every rank by test_collectives.py: what each backend does to tensors. Rank 0 prints one JSON object."""

import hashlib
import json
import sys

import torch

from stagein.collectives import PIECE_BYTES, Collective, make_collective
from stagein.world import connect


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def sums(collective: Collective) -> dict[str, object]:
    """Sums that are exact in floating point, and the bits of one that is not."""
    rank, size = collective.world.rank, collective.world.size
    lengths = (1, 3, PIECE_BYTES // 4 - 1, PIECE_BYTES // 4 + 5)
    exact = []
    for length in lengths:
        tensor = torch.arange(length, dtype=torch.float32) % 1000 + rank
        collective.allreduce_sum(tensor)
        expected = (torch.arange(length, dtype=torch.float32) % 1000) * size + sum(range(size))
        exact.append(torch.equal(tensor, expected))
    double = torch.tensor([2.0**40 + rank], dtype=torch.float64)
    collective.allreduce_sum(double)
    rounded = torch.randn(100_003, generator=torch.Generator().manual_seed(rank))
    collective.allreduce_sum(rounded)
    return {"exact": exact, "double": double.item() - size * 2.0**40, "bits": digest(rounded)}


def broadcasts(collective: Collective) -> list[str]:
    """The bits of tensors of several types that the last rank filled."""
    root = collective.world.size - 1
    bits = []
    for dtype, shape in (
        (torch.float32, (3, 5)),
        (torch.bfloat16, (1_500_000,)),
        (torch.int64, ()),
        (torch.bool, (7,)),
    ):
        tensor = torch.zeros(shape, dtype=dtype)
        if collective.world.rank == root:
            tensor.fill_(1)
        collective.broadcast(tensor, root=root)
        bits.append(f"{tensor.dtype} {tensor.float().sum().item() == max(1, tensor.numel())}")
    return bits


def main() -> None:
    torch.set_num_threads(1)
    communicator = connect()
    results = {}
    for name in sys.argv[1:]:
        collective = make_collective(name, communicator)
        results[name] = communicator.gather_all({"sums": sums(collective), "broadcasts": broadcasts(collective)})
        collective.close()
    if communicator.world.rank == 0:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
