"""Records of a data set as other people's libraries see them: h5py, zarr-python, tensorstore."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorstore
import zarr
from numpy.typing import NDArray

from stagein.formats import Dataset
from stagein.formats.schema import Field

ReadRows = Callable[[int, str], NDArray[np.generic]]
"""The rows of a field of a record, as they are stored: bytes of what is encoded or text, one row of a tensor."""


def rows_of(field: Field, value: Any) -> NDArray[np.generic]:
    """The rows that a value of our own reader stands for."""
    if field.kind == "text":
        return np.frombuffer(value.encode(), np.uint8)
    rows = np.asarray(value)
    rows = rows.view(field.stored_dtype) if field.dtype == "bfloat16" else rows
    return rows[None] if field.kind == "tensor" else rows.reshape(-1, *field.row_shape)


def by_h5py(dataset: Dataset) -> ReadRows:
    """From the shard files, each of them a self-contained HDF5 file."""
    shards = {name: dataset.manifest.shards_of(name) for name in dataset.schema.large_fields}
    opened: dict[Path, h5py.File] = {}

    def read(record: int, name: str) -> NDArray[np.generic]:
        field = dataset.fields[name]
        shard = next(
            each for each in shards.get(name, shards[dataset.schema.primary]) if record < each.first + each.records
        )
        path = dataset.path / shard.file
        file = opened.setdefault(path, h5py.File(path, "r", locking=False)) if path not in opened else opened[path]
        row, rows = record - shard.first, file[name]
        if name in dataset.schema.columns:
            return np.asarray(rows[row])[None]
        if not field.is_variable:
            return np.asarray(rows["data"][row])[None]
        start, count = int(rows["offset"][row]), int(rows["count" if field.kind == "ragged" else "nbytes"][row])
        return np.asarray(rows["data"][start : start + count])

    return read


def by_zarr(dataset: Dataset) -> ReadRows:
    """From the Zarr arrays of the fields, at the rows that the index names."""
    group = zarr.open_group(dataset.path, mode="r")

    def read(record: int, name: str) -> NDArray[np.generic]:
        start, stop = _zarr_rows(dataset, group, record, name)
        return np.asarray(group[name][start:stop])

    return read


def by_tensorstore(dataset: Dataset) -> ReadRows:
    """The same by another implementation of Zarr."""
    group = zarr.open_group(dataset.path, mode="r")
    stores = {
        name: tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(dataset.path / name)}}, read=True
        ).result()
        for name in dataset.fields
    }

    def read(record: int, name: str) -> NDArray[np.generic]:
        start, stop = _zarr_rows(dataset, group, record, name)
        return np.asarray(stores[name][start:stop].read().result())

    return read


def _zarr_rows(dataset: Dataset, group: zarr.Group, record: int, name: str) -> tuple[int, int]:
    if name in dataset.schema.columns:
        return record, record + 1
    index, field = group[f"index/{name}"], dataset.fields[name]
    start = int(index["row"][record])
    return start, start + (int(index["nbytes"][record]) // field.row_bytes if field.is_variable else 1)


def readers_of(dataset: Dataset) -> dict[str, ReadRows]:
    """All readers that its container has a view for."""
    readers: dict[str, ReadRows] = {}
    if "hdf5" in dataset.manifest.container:
        readers["h5py"] = by_h5py(dataset)
    if "zarr" in dataset.manifest.container:
        readers |= {"zarr-python": by_zarr(dataset), "tensorstore": by_tensorstore(dataset)}
    return readers


def assert_read_alike(dataset: Dataset) -> None:
    """Every reader finds in every field of every record the very bits that our own does."""
    readers = readers_of(dataset)
    for number, record in enumerate(dataset):
        for name, value in record.items():
            expected = rows_of(dataset.fields[name], value)
            for reader, read in readers.items():
                found = read(number, name)
                place = f"record {number}, field {name}, by {reader}"
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape), place
                assert found.tobytes() == expected.tobytes(), place
