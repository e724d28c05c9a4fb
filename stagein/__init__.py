"""stagein: from millions of small files on a parallel file system to GPUs that never wait.

Importing this package loads nothing heavy: torch, DALI, MPI and HDF5 are imported where they are used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "StageinError": "stagein.formats.errors",
    "World": "stagein.world",
    "connect": "stagein.world",
    "stage": "stagein.staging",
}

__all__ = ["StageinError", "World", "__version__", "connect", "stage"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
