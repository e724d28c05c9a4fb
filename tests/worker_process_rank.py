"""One rank of the tests of worker processes beside MPI: MPI is imported at the top, as in many users' scripts.

worker_process_rank.py START_METHOD
"""

import sys

from mpi4py import MPI

from stagein.loaders import DataLoader


class Numbers:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return index


if __name__ == "__main__":
    loader = DataLoader(Numbers(), 2, num_workers=1, multiprocessing_context=sys.argv[1], distributed=True)
    loaded = [number for batch in loader for number in batch.tolist()]
    MPI.COMM_WORLD.Barrier()
    print("loaded", *loaded, flush=True)
