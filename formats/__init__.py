"""Records on disk: schema, manifest, shards that are HDF5 and Zarr at once, the record index, reading and verifying."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import convert
    from .dataset import Dataset
    from .dataset import open_dataset as open
    from .index import RecordIndex
    from .manifest import Manifest
    from .schema import Field, Schema
    from .sources.imagefolder import scan_imagefolder
    from .verification import verify
    from .writer import Writer

__all__ = [
    "Dataset",
    "Field",
    "Manifest",
    "RecordIndex",
    "Schema",
    "Writer",
    "convert",
    "open",
    "scan_imagefolder",
    "verify",
]

_MODULES = {
    "Dataset": "dataset",
    "Field": "schema",
    "Manifest": "manifest",
    "RecordIndex": "index",
    "Schema": "schema",
    "Writer": "writer",
    "convert": "conversion",
    "open": "dataset",
    "scan_imagefolder": "sources.imagefolder",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    # Not imported until asked for: h5py and zarr are heavy, and the error tree and the manifest need neither.
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), "open_dataset" if name == "open" else name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
