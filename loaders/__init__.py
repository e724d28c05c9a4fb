"""Loaders: a converted data set as torch batches, decoded by DALI, in an order that does not depend on ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataloader import DataLoader
    from .dataset import RecordDataset
    from .graphs import Graph, image_eval, image_train
    from .segmentation_graphs import segmentation_eval, segmentation_train
    from .transforms import PerSample
    from .volume_graphs import volume_eval, volume_train

__all__ = [
    "DataLoader",
    "Graph",
    "PerSample",
    "RecordDataset",
    "image_eval",
    "image_train",
    "segmentation_eval",
    "segmentation_train",
    "volume_eval",
    "volume_train",
]

_MODULES = {
    "DataLoader": "dataloader",
    "Graph": "graphs",
    "PerSample": "transforms",
    "RecordDataset": "dataset",
    "image_eval": "graphs",
    "image_train": "graphs",
    "segmentation_eval": "segmentation_graphs",
    "segmentation_train": "segmentation_graphs",
    "volume_eval": "volume_graphs",
    "volume_train": "volume_graphs",
}


def __getattr__(name: str) -> Any:
    # Not imported until asked for: torch takes a second, and some of the modules need no torch.
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
