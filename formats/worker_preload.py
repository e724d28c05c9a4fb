"""What worker processes have in memory from the start: the process that they are forked from imports this, once.

Kernels that were loaded there need not be loaded by every worker: a third of a second each.
"""

import contextlib
import gc

gc.disable()  # what is imported stays: looking through it for garbage would take a fifth of the time

from . import shard_workers  # noqa: E402, F401  (it is imported for those that are forked)
from .errors import StageinError  # noqa: E402
from .sources import imagefolder  # noqa: E402, F401

with contextlib.suppress(StageinError):  # a library lacks a function: what needs it says so
    from . import write_kernels

    write_kernels.load()

gc.freeze()  # nor do workers look through it, and it stays in memory that they share
gc.enable()
