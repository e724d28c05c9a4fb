"""The interface of stagein.collectives, held true for every backend on real ranks."""

import json
import sys
from pathlib import Path

import pytest
import torch
from mpi import run_ranks

from stagein.collectives import Choice, choose_backend, make_collective
from stagein.formats.errors import UsageError
from stagein.world import Communicator, World

PROGRAM = Path(__file__).with_name("collective_rank.py")


def check_results(results: dict[str, list[dict[str, object]]], ranks: int) -> None:
    for name, of_ranks in results.items():
        assert len(of_ranks) == ranks
        for of_rank in of_ranks:
            assert all(of_rank["sums"]["exact"]), name
            assert of_rank["sums"]["double"] == sum(range(ranks)), name
            assert [each.split()[1] for each in of_rank["broadcasts"]] == ["True"] * 4, name
        assert len({of_rank["sums"]["bits"] for of_rank in of_ranks}) == 1, f"{name}: ranks differ"


@pytest.mark.mpi
def test_sums_and_broadcasts_are_the_same_bits_on_every_rank() -> None:
    ranks = 3
    finished = run_ranks(ranks, sys.executable, PROGRAM, "mpi", "gloo")
    assert finished.returncode == 0, finished.stderr
    check_results(json.loads(finished.stdout), ranks)


def test_a_single_process_keeps_what_it_has() -> None:
    collective = make_collective("single", Communicator())
    tensor = torch.tensor([1.0, 2.0])
    collective.allreduce_sum(tensor)
    collective.broadcast(tensor)
    assert tensor.tolist() == [1.0, 2.0]


@pytest.mark.gpu
def test_nccl_sums_gpu_tensors() -> None:
    torch.cuda.set_device(0)
    collective = make_collective("nccl", Communicator(), device_type="cuda")
    try:
        tensor = torch.tensor([1.0, 2.0], device="cuda")
        collective.allreduce_sum(tensor)
        collective.broadcast(tensor)
        assert tensor.tolist() == [1.0, 2.0]
    finally:
        collective.close()


def test_the_backend_follows_from_ranks_and_device() -> None:
    assert choose_backend(World(), "cuda") == Choice("single", "there is one rank")
    assert choose_backend(World(size=4), "cuda").backend == "nccl"
    assert choose_backend(World(size=4), "cpu").backend == "mpi"


@pytest.mark.parametrize(
    ("name", "device_type", "words"),
    [
        ("horovod", "cpu", "no backend 'horovod'"),
        ("mpi", "cpu", "started by mpirun"),
        ("nccl", "cpu", "cannot reduce cpu tensors"),
        ("gloo", "cuda", "cannot reduce cuda tensors"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused(name: str, device_type: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_collective(name, Communicator(), device_type)


def test_single_is_refused_for_several_ranks() -> None:
    communicator = Communicator()
    communicator.world = World(rank=1, size=2)
    with pytest.raises(UsageError, match="for one rank, but the job has 2"):
        make_collective("single", communicator)
