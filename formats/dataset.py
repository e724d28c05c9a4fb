"""A data set on disk: its manifest, its small fields as whole arrays, and its records by number.

No HDF5 or Zarr library is involved: those write, verify and inspect; training reads bytes.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .index import RecordIndex, load_column
from .manifest import Manifest
from .record_reader import RecordReader
from .schema import Schema


class Dataset:
    """A data set on disk. Safe to use from many threads; picklable (files are opened again on the other side).

    path         the data set as converted.
    staged_path  a copy of some or all of its shards, nearer; `staged_shards` names the shards it has (None: all).
    """

    def __init__(
        self, path: Path | str, *, staged_path: Path | None = None, staged_shards: Collection[str] | None = None
    ) -> None:
        """Raises SourceError, one sentence, when `path` holds no data set that can be trusted."""
        self.path = Path(path)
        self.staged_path = staged_path
        self.staged_shards = None if staged_shards is None else frozenset(staged_shards)
        root = staged_path or self.path
        self.manifest = Manifest.load(root)
        self.reader = RecordReader(
            self.schema.primary_field,
            RecordIndex.load(root, self.manifest),
            [self._shard_path(shard.file) for shard in self.manifest.shards],
        )
        self.columns: dict[str, NDArray[np.generic]] = {
            name: load_column(root, name, field, self.manifest.num_records)
            for name, field in self.schema.columns.items()
        }
        """The small fields, whole: [num_records, *shape] each."""

    @property
    def index(self) -> RecordIndex:
        """Where the records of the primary field lie."""
        return self.reader.index

    @property
    def schema(self) -> Schema:
        return self.manifest.record_schema

    def __len__(self) -> int:
        return self.manifest.num_records

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}, {len(self)} records in {len(self.manifest.shards)} shards)"

    def __getitem__(self, record: int) -> dict[str, NDArray[np.generic]]:
        """One record, a dict of its fields: `encoded` as its stored bytes (uint8), `tensor` with its shape and dtype."""
        record = range(len(self))[record]  # IndexError and negative numbers as every sequence has them
        (content,) = self.read_records([record])
        fields: dict[str, NDArray[np.generic]] = {
            name: np.asarray(column[record]) for name, column in self.columns.items()
        }
        field = self.schema.primary_field
        fields[self.schema.primary] = content if field.kind == "encoded" else self.decode(content)
        return fields

    def __iter__(self) -> Iterator[dict[str, NDArray[np.generic]]]:
        return (self[record] for record in range(len(self)))

    def read_records(self, records: Sequence[int], buffer: memoryview | None = None) -> list[NDArray[np.uint8]]:
        """The stored bytes of these records of the primary field: see `RecordReader.read_records`."""
        return self.reader.read_records(records, buffer)

    def read_tensors(self, records: Sequence[int], out: NDArray[np.generic] | None = None) -> NDArray[np.generic]:
        """These records of a `tensor` primary field, decoded: see `RecordReader.read_tensors`."""
        return self.reader.read_tensors(records, out)

    def decode(self, stored: NDArray[np.uint8]) -> NDArray[np.generic]:
        """One record of a `tensor` primary field from its stored bytes; a view of them when they are not compressed."""
        return self.reader.decode(stored)

    def close(self) -> None:
        """Close the shards; the data set cannot be read afterwards."""
        self.reader.close()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "staged_path": self.staged_path, "staged_shards": self.staged_shards}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _shard_path(self, name: str) -> Path:
        near = self.staged_path is not None and (self.staged_shards is None or name in self.staged_shards)
        return (self.staged_path if near and self.staged_path is not None else self.path) / name
