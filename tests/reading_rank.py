"""Loads all records of a data set, in order and then shuffled, for strace to watch.

    reading_rank.py DATASET

Prints "in order" before one epoch and "shuffled" before another, and after each the sum of what it loaded.
"""

import sys

from stagein.loaders import DataLoader, RecordDataset

dataset = RecordDataset(sys.argv[1], staged=None)
for is_shuffled in (False, True):
    loader = DataLoader(dataset, 16, shuffle=is_shuffled, device="cpu")
    list(loader)  # kernels are compiled, files are in memory
    print("shuffled" if is_shuffled else "in order", flush=True)
    print(sum(int(batch["volume"].sum()) for batch in loader), flush=True)
