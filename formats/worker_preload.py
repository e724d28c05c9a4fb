"""What worker processes have in memory from the start: the process that they are forked from imports this, once.

Kernels that were loaded there need not be loaded by every worker: a third of a second each.
"""

import contextlib

from . import shard_workers  # noqa: F401  (it is imported for those that are forked)
from .errors import StageinError
from .sources import imagefolder  # noqa: F401

with contextlib.suppress(StageinError):  # a library lacks a function: what needs it says so
    from . import write_kernels

    write_kernels.load()
