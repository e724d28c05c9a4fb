"""One rank of the tests of errors that all ranks must raise: trains in step, with an allreduce over MPI or gloo a step.

    loader_rank.py COLLECTIVE CAUGHT WORKERS BAD_SAMPLE

Sample BAD_SAMPLE of 40 cannot be loaded. With CAUGHT "yes" each rank prints the step and the error it was given, with "exits" it exits then.
"""

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from stagein import failure_board
from stagein.formats.errors import ChecksumError
from stagein.loaders import DataLoader


class OneIsBad(Dataset[int]):
    def __init__(self, bad: int) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        if index == self.bad:
            raise ChecksumError(f"record {index} is damaged")
        return index


def main(collective: str, caught: str, workers: str, bad: str) -> None:
    if collective == "mpi":
        from mpi4py import MPI

        train(lambda: MPI.COMM_WORLD.allreduce(1), caught, workers, bad)
        return
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['MEETING_FILE']}", rank=rank, world_size=2)
    try:
        train(lambda: dist.all_reduce(torch.ones(1)), caught, workers, bad)
        dist.barrier()  # the rank that leaves first closes connections that the other one may still read from
    finally:
        dist.destroy_process_group()  # threads of a group that is still there abort the process when it ends


def train(allreduce: Callable[[], object], caught: str, workers: str, bad: str) -> None:
    failure_board._SEEN_SECONDS = 3
    loader = DataLoader(OneIsBad(int(bad)), 4, num_workers=int(workers), distributed=True)
    step = 0
    try:
        for _ in loader:
            allreduce()
            step += 1
    except ChecksumError as error:
        if caught == "no":
            raise
        print("raised", step, error.reported_by_peer, error, flush=True)
        if caught == "exits":
            sys.exit(1)
        return
    raise SystemExit("no error was raised")


main(*sys.argv[1:])
