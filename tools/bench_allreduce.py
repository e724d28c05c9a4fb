"""`stagein bench allreduce`: whole training steps of our trainer beside torch's DDP, in interleaved rounds of one job."""

import functools
import random
import time
from collections.abc import Callable

import torch
from torch import nn

from stagein.collectives import Collective, make_collective
from stagein.formats.errors import UsageError
from stagein.train import Trainer
from stagein.world import Communicator, connect

from .rates import print_rates

FEATURES, HIDDEN, CLASSES = 1024, 4096, 1000
BASELINE = "torch DDP, gloo"
_WARM_UP_ROUNDS = 2

Step = Callable[[], object]


def run_allreduce(rounds: int, batch_size: int) -> None:
    """Measure and print on rank 0: a line of JSON for each contestant, then a table of ratios to torch's DDP.

    Each contestant trains an MLP of 25 million parameters (100 MB of gradients) on the CPU, `batch_size` samples a rank,
    one thread a rank. A step counts as long as its slowest rank. Raises UsageError on a single rank.
    """
    communicator = connect()
    if communicator.world.size == 1:
        raise UsageError("there is nothing to reduce on one rank: start it with mpirun -n 2 or more")
    torch.set_num_threads(1)
    rates = bench_steps(communicator, rounds, batch_size)
    if communicator.world.rank == 0:
        ranks = communicator.world.size
        print_rates("allreduce", rates, BASELINE, unit="steps/s", ranks=ranks, batch_size=batch_size)


def bench_steps(communicator: Communicator, rounds: int, batch_size: int) -> dict[str, list[float]]:
    """Steps a second of the slowest rank, for each contestant and round."""
    gloo, mpi = (make_collective(name, communicator) for name in ("gloo", "mpi"))
    try:
        batch = _make_batch(communicator.world.rank, batch_size)
        steps: dict[str, Step] = {
            BASELINE: _ddp_step(batch),
            "stagein, gloo": _trainer_step(gloo, batch),
            "stagein, mpi": _trainer_step(mpi, batch),
        }
        order = random.Random(0)  # the same on every rank
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(_WARM_UP_ROUNDS + rounds):
            for name in order.sample(list(steps), len(steps)):
                communicator.barrier()
                started = time.perf_counter()
                steps[name]()
                slowest = max(communicator.gather_all(time.perf_counter() - started))
                if number >= _WARM_UP_ROUNDS:
                    rates[name].append(1 / slowest)
        return rates
    finally:
        gloo.close()


def _make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


def _make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)


def _make_batch(rank: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(batch_size, FEATURES, generator=generator)
    return inputs, torch.randint(0, CLASSES, (batch_size,), generator=generator)


def _trainer_step(collective: Collective, batch: tuple[torch.Tensor, torch.Tensor]) -> Step:
    model = _make_model()
    loss = functools.partial(nn.functional.cross_entropy, reduction="none")
    trainer = Trainer(model, _make_optimizer(model), loss, collective=collective)
    return lambda: trainer.step(batch)


def _ddp_step(batch: tuple[torch.Tensor, torch.Tensor]) -> Step:
    """As torch's tutorial has it, with the option that saves DDP a copy of the gradients."""
    model = _make_model()
    replica = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = _make_optimizer(model)
    inputs, labels = batch

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(replica(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
