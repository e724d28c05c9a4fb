"""A data set on disk: its manifest, its small fields as whole arrays, and its records by number.

No HDF5 or Zarr library is involved: those write, verify and inspect; training reads bytes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import SourceError
from .fallback_reader import FallbackReader
from .index import RecordIndex, load_column
from .located import LocatedRecords
from .manifest import Manifest
from .record_reader import PackedRecords, RecordNumbers, RecordReader
from .schema import Field, Schema, shape_name
from .values import fits_shapes, from_rows

if TYPE_CHECKING:
    from .jpeg.cut import CutJpegs
    from .window_reader import Memory, WindowReader

Record: TypeAlias = dict[str, Any]
"""The fields of a record by name: `tensor` and `ragged` as arrays, `encoded` as the bytes of its file (uint8), `text` as str."""


def open_dataset(path: Path | str) -> "Dataset":
    """Open the data set at `path`. Raises SourceError, one sentence, when there is none that can be trusted."""
    return Dataset(path)


class Dataset:
    """A data set on disk: a sequence of records. Safe to use from many threads; picklable (files are opened again there).

        with formats.open("train.st") as dataset:
            dataset.fields, len(dataset)
            dataset[0]["image"], dataset[-1]             # a record is a dict
            dataset[10:20], dataset[[5, 3, 8]]           # several, read together: a list of them

    path         the data set as converted.
    staged_path  a copy of some or all of its shards, nearer; `staged_shards` names the shards it has (None: all). Where
                 one of them turns out to be bad, it is read from the source: see `left_shards`.
    """

    def __init__(
        self, path: Path | str, *, staged_path: Path | None = None, staged_shards: Collection[str] | None = None
    ) -> None:
        """Raises SourceError or ChecksumError, one sentence, when `path` holds no data set that can be trusted."""
        self.path = Path(path)
        self.staged_path = staged_path
        self.staged_shards = None if staged_shards is None else frozenset(staged_shards)
        self.manifest = Manifest.load(self._root)
        self.readers = {name: self._open_reader(name, field) for name, field in self.schema.indexed_fields.items()}
        """The fields that are read record by record: the large ones, and small ones whose records differ in size."""
        self.columns: dict[str, NDArray[np.generic]] = {
            name: load_column(self._root, name, field, self.manifest) for name, field in self.schema.columns.items()
        }
        """The small fields of a fixed shape, whole: [num_records, *shape] each."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """What a record holds, by name."""
        return self.schema.record_fields

    @property
    def schema(self) -> Schema:
        return self.manifest.record_schema

    @property
    def reader(self) -> RecordReader:
        """The reader of the primary field."""
        return self.readers[self.schema.primary]

    @property
    def index(self) -> RecordIndex:
        """Where the records of the primary field lie."""
        return self.reader.index

    @property
    def left_shards(self) -> dict[Path, str]:
        """Files of the staged copy that turned out to be bad, with the reason: they are read from the source instead."""
        left: dict[Path, str] = {}
        for reader in self.readers.values():
            left |= reader.left if isinstance(reader, FallbackReader) else {}
        return left

    def __len__(self) -> int:
        return self.manifest.num_records

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}: {field}" for name, field in self.fields.items())
        return f"Dataset({str(self.path)!r}, {len(self)} records of {fields})"

    @overload
    def __getitem__(self, records: int | np.integer[Any]) -> Record: ...

    @overload
    def __getitem__(self, records: slice | Sequence[int] | NDArray[np.integer[Any]]) -> list[Record]: ...

    def __getitem__(self, records: int | np.integer[Any] | slice | Sequence[int] | NDArray[np.integer[Any]]) -> Any:
        """A record by its number, or several by a slice or a list of numbers; negative ones count from the end.

        Raises IndexError for a number that is not there, ChecksumError or SourceError, naming file and record, for what
        is damaged or missing.
        """
        every = range(len(self))
        if isinstance(records, slice):
            return self._read(every[records])
        if isinstance(records, (int, np.integer)):
            return self._read([every[records]])[0]
        return self._read([every[record] for record in records])

    def __iter__(self) -> Iterator[Record]:
        return (self[record] for record in range(len(self)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, numbers: Sequence[int]) -> list[Record]:
        records: list[Record] = [
            {name: np.array(self.columns[name][number]) if name in self.columns else None for name in self.fields}
            for number in numbers
        ]
        for name, reader in self.readers.items():
            if name not in self.fields:
                continue
            if reader.field.codec:
                values: Sequence[Any] = list(reader.read_tensors(numbers))
            else:
                values = self.values_of(name, numbers, reader.read_records(numbers))
            for record, value in zip(records, values, strict=True):
                record[name] = value
        return records

    def values_of(self, name: str, records: RecordNumbers, stored: Sequence[NDArray[np.uint8]]) -> list[Any]:
        """What the uncompressed bytes of these records of an indexed field stand for: see `values.from_rows`.

        Raises SourceError for a record whose shape does not fit its bytes.
        """
        field = self.schema.fields[name]
        if not field.has_shapes:
            return [from_rows(field, content) for content in stored]
        numbers = np.asarray(records, np.int64)
        shapes = self.columns[shape_name(name)][numbers].astype(np.int64)
        fits = fits_shapes(field, shapes, np.array([len(content) for content in stored], np.int64))
        if not fits.all():
            wrong = int(np.argmin(fits))
            number, shape = int(numbers[wrong]), tuple(shapes[wrong].tolist())
            shard = self.manifest.parts_of(name)[int(self.readers[name].index.shard[number])]
            raise SourceError(
                f"record {number} in {self.path / shard.file} has {len(stored[wrong])} bytes, which are no array of the "
                f"shape {shape} that it is said to have: run `stagein verify {self.path}`"
            )
        return [from_rows(field, content, shape) for content, shape in zip(stored, shapes.tolist(), strict=True)]

    def read_records(self, records: Sequence[int], buffer: memoryview | None = None) -> list[NDArray[np.uint8]]:
        """The stored bytes of these records of the primary field: see `RecordReader.read_records`."""
        return self.reader.read_records(records, buffer)

    def read_packed(self, records: RecordNumbers, buffer: memoryview | None = None) -> PackedRecords:
        """The same, packed: see `RecordReader.read_packed`."""
        return self.reader.read_packed(records, buffer)

    def locate(self, records: RecordNumbers) -> LocatedRecords | None:
        """Where these records of the primary field lie: see `RecordReader.locate`."""
        return self.reader.locate(records)

    @property
    def is_seekable(self) -> bool:
        """Whether the primary field holds seekable JPEGs, so that `read_windows` reads less than whole records."""
        return any(field.rows_of == self.schema.primary for field in self.schema.fields.values())

    def windows_are_awaited(self) -> bool:
        """Whether `read_windows` would have to wait until its kernels are compiled, once a machine, which is being done then: whole
        records can be read meanwhile."""
        return self._window_reader.is_awaited()

    def read_windows(self, records: ArrayLike, windows: ArrayLike, memory: "Memory | None" = None) -> "CutJpegs":
        """Read of these images of the primary field what a crop window of each needs, to fresh memory or that which `memory` gives:
        see `WindowReader.read`."""
        wanted = np.asarray(records, np.int64), np.asarray(windows, np.int64)
        return self._window_reader.read(*wanted) if memory is None else self._window_reader.read(*wanted, memory)

    def read_tensors(self, records: Sequence[int], out: NDArray[np.generic] | None = None) -> NDArray[np.generic]:
        """These records of a `tensor` primary field, decoded: see `RecordReader.read_tensors`."""
        return self.reader.read_tensors(records, out)

    def decode(self, stored: NDArray[np.uint8]) -> NDArray[np.generic]:
        """One record of a `tensor` primary field from its stored bytes; a view of them when they are not compressed."""
        return self.reader.decode(stored)

    def close(self) -> None:
        """Close the files; the data set cannot be read afterwards."""
        for reader in self.readers.values():
            reader.close()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "staged_path": self.staged_path, "staged_shards": self.staged_shards}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @cached_property
    def _window_reader(self) -> "WindowReader":
        from .jpeg.rows import RowTables
        from .window_reader import WindowReader

        return WindowReader(self.reader, RowTables(self._root, self.manifest, self.schema.primary))

    @property
    def _root(self) -> Path:
        """Where everything but shards is read from."""
        return self.staged_path or self.path

    def _open_reader(self, name: str, field: Field) -> RecordReader:
        index = RecordIndex.load(self._root, self.manifest, name)
        parts = [part.file for part in self.manifest.parts_of(name)]
        is_column = name in self.schema.ragged_columns
        source = [self.path / file for file in parts]
        near = [self._root / file if is_column else self._shard_path(file) for file in parts]
        return RecordReader(field, index, source) if near == source else FallbackReader(field, index, near, source)

    def _shard_path(self, name: str) -> Path:
        near = self.staged_path is not None and (self.staged_shards is None or name in self.staged_shards)
        return (self.staged_path if near and self.staged_path is not None else self.path) / name
