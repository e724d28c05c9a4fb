"""What worker processes have in memory from the start: the process that they are forked from imports this, once."""

import gc

gc.disable()  # what is imported stays: looking through it for garbage would take a fifth of the time

from . import shard_workers  # noqa: E402, F401  (it is imported for those that are forked)
from .sources import imagefolder  # noqa: E402, F401

gc.freeze()  # nor do workers look through it, and it stays in memory that they share
gc.enable()
