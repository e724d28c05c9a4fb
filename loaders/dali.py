"""The one place where NVIDIA DALI is imported, late: it is large, optional, and not needed to read records."""

from functools import cache
from types import SimpleNamespace

from stagein.formats.errors import UsageError


@cache
def import_dali() -> SimpleNamespace:
    """`fn`, `types`, `Pipeline` and `DataNode` of DALI. Raises UsageError, naming the extra to install, where there is no DALI."""
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.data_node import DataNode
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise UsageError(
            f"loading with a graph needs NVIDIA DALI, which cannot be imported ({error}): install `stagein[cuda13]`, "
            "or `stagein[cuda12]` for an older driver; both also work without a GPU"
        ) from error
    return SimpleNamespace(DataNode=DataNode, Pipeline=Pipeline, fn=fn, types=types)
