"""The allreduce trainer: takes any iterable of batches, on any number of ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch
    from .models import build_model
    from .reports import StepReport, Summary, Validation
    from .schedule import Schedule
    from .trainer import Trainer

__all__ = ["Batch", "Schedule", "StepReport", "Summary", "Trainer", "Validation", "build_model"]

_MODULES = {
    "Batch": "batch",
    "Schedule": "schedule",
    "StepReport": "reports",
    "Summary": "reports",
    "Trainer": "trainer",
    "Validation": "reports",
    "build_model": "models",
}


def __getattr__(name: str) -> Any:
    # Not imported until asked for: torch takes a second.
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
