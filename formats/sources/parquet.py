"""Parquet files, one row a record: numbers, texts, lists, and files in binary columns, as Hugging Face stores images.

Parquet is documented at parquet.apache.org; what Hugging Face adds is a schema in the metadata (`huggingface`, JSON: the names
of classes) and columns `struct<bytes, path>` for images and audio. Sizes of values are not in the footer, so columns of
varying size are read twice: once for their sizes, once for their values, both in whole row groups.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from stagein.formats.errors import SourceError, UsageError
from stagein.formats.images import BadImageError
from stagein.formats.listing import files_below
from stagein.formats.schema import Field, Schema, reason_of
from stagein.formats.source import RefusedRecord, Room, SourceRecord
from stagein.formats.values import BadValueError, Value, numbers_field

from .fields import SIZE_FIELD, file_field, image_size
from .files import SourceFile, find_files, most_common, source_name, used_files
from .read_order import read_in_order

if TYPE_CHECKING:
    import pyarrow

_SCAN_THREADS = 4
"""Files whose row groups are in memory at a time."""
_LOOKED_AT = 64
_PANDAS_INDEX = "__index_level_"
_IMAGES = ("jpeg", "png", "image")


@dataclass(frozen=True)
class ParquetColumn:
    """The column that a field is made of; `leaf` is what is read of it: `image.bytes` of a struct of Hugging Face's."""

    name: str
    is_struct: bool
    field: Field

    @property
    def leaf(self) -> str:
        return f"{self.name}.bytes" if self.is_struct else self.name


@dataclass(frozen=True)
class ParquetRecords:
    """The rows of Parquet files: for each its file, its row group and its row in that."""

    name: str
    schema: Schema
    columns: Mapping[str, ParquetColumn]
    files: tuple[SourceFile, ...]
    places: NDArray[np.int64]
    """[records, 3]: number of the file, of the row group in it, of the row in that."""
    sizes: Mapping[str, NDArray[np.int64]]
    refused: tuple[RefusedRecord, ...]
    kind: str = "parquet"

    @property
    def nbytes(self) -> NDArray[np.int64]:
        fixed = self.schema.primary_field.record_bytes
        return self.sizes.get(self.schema.primary, np.full(len(self.places), fixed, np.int64))

    @property
    def secondary_nbytes(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: nbytes for name, nbytes in self.sizes.items() if name != self.schema.primary}

    @property
    def costly_order(self) -> str | None:
        return "row groups of Parquet are read whole" if self.places[:, 2].any() else None

    def identity(self) -> object:
        sizes = {name: nbytes.tolist() for name, nbytes in self.sizes.items()}
        names = [(file.path.name, file.nbytes) for file in self.files]
        return names, self.places.tolist(), sizes, {name: column.name for name, column in self.columns.items()}

    def part(self, numbers: NDArray[np.int64]) -> "ParquetRows":
        places = self.places[numbers]
        files, file_numbers = used_files(self.files, places[:, 0])
        return ParquetRows(
            self.columns, "hw" in self.schema.fields, files, np.column_stack([file_numbers, places[:, 1:]])
        )


@dataclass(frozen=True)
class ParquetRows:
    """Some of the rows of Parquet files; `has_size`: the size of the image is a field of its own."""

    columns: Mapping[str, ParquetColumn]
    has_size: bool
    files: tuple[SourceFile, ...]
    places: NDArray[np.int64]

    def mark(self) -> object:
        columns = {name: (column.name, column.field.model_dump(mode="json")) for name, column in self.columns.items()}
        return columns, self.has_size, [file.mark() for file in self.files], self.places.tolist()

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        groups = np.unique(self.places[:, :2], axis=0, return_inverse=True)[1].reshape(-1)
        return read_in_order(groups, np.zeros(len(groups), np.int64), self._read, room)

    def _read(self, records: NDArray[np.int64], room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        for number, of_file in groupby(self.places[records].tolist(), key=lambda place: place[0]):
            file = self.files[number]
            with _opened(file) as content:
                for group, of_group in groupby(of_file, key=lambda place: place[1]):
                    table = _read_group(file, content, group, [column.leaf for column in self.columns.values()])
                    for _, _, row in of_group:
                        try:
                            yield self._read_row(table, row, room)
                        except (BadValueError, BadImageError) as error:
                            yield RefusedRecord(f"{file.path}: row {row} of row group {group}", str(error))

    def _read_row(self, table: "pyarrow.Table", row: int, room: Room) -> SourceRecord:
        values: dict[str, Value] = {}
        for name, column in self.columns.items():
            value = _cell(table, row, column)
            if column.field.kind == "encoded":
                content = memoryview(value).cast("B")  # type: ignore[arg-type]  # binary cells are buffers
                if column.field.encoding in _IMAGES and self.has_size and "hw" not in values:
                    values["hw"] = image_size(content)
                room(name, len(content))[:] = content
            else:
                values[name] = value
        return SourceRecord(values)


def scan_parquet(
    source: Path | Sequence[Path], *, fields: Mapping[str, str] | None = None, primary: str | None = None
) -> ParquetRecords:
    """The rows of a .parquet file, of a list of them, or of those that lie in a folder or below it.

    `fields` maps names of fields to columns; without it every column is a field of its own name. Numbers are `tensor`, texts
    `text`, lists of numbers `ragged`, lists of a fixed length `tensor`, binary columns and structs with `bytes` `encoded`: an
    image, with its size in `hw`, where they start like one. `primary` is by default the image.

    Files that cannot be read, or whose columns differ from most others', are refused, as are rows in which a value is null.
    Raises SourceError when there is nothing to read, UsageError for columns that cannot be fields or without pyarrow.
    """
    _require_pyarrow()
    files = _find(source)
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        looked_at = dict(zip(files, pool.map(_look_at, files), strict=True))
    refused = [RefusedRecord(str(file.path), found) for file, found in looked_at.items() if isinstance(found, str)]
    readable = {file: found for file, found in looked_at.items() if not isinstance(found, str)}
    if not readable:
        raise SourceError(f"{source_name(source)} holds no Parquet file that can be read: {refused[0].reason}")
    common = most_common(found.types for found in readable.values())
    for file, found in list(readable.items()):
        if found.types != common:
            refused.append(
                RefusedRecord(str(file.path), f"its columns are {found.types}, those of most files {common}")
            )
            del readable[file]
    columns, schema = _make_fields(readable, fields, primary)
    variable = {name: column for name, column in columns.items() if column.field.is_variable}
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        sizes = list(pool.map(lambda file: _sizes(file, variable), readable))
    for file, measured in zip(list(readable), sizes, strict=True):
        if isinstance(measured, str):
            refused.append(RefusedRecord(str(file.path), measured))
            del readable[file]
    measured_sizes = [measured for measured in sizes if not isinstance(measured, str)]
    return ParquetRecords(
        name=source_name(source),
        schema=schema,
        columns=columns,
        files=tuple(readable),
        places=_places(list(readable.values())),
        sizes={
            name: np.concatenate([np.zeros(0, np.int64), *(measured[name] for measured in measured_sizes)])
            for name in variable
        },
        refused=tuple(refused),
    )


@dataclass(frozen=True)
class _Footer:
    """What the end of a file says: the types of its columns, as text, Hugging Face's features, the rows of its row groups."""

    types: str
    features: Mapping[str, Any]
    group_rows: tuple[int, ...]


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'stagein[parquet]'") from None


def _find(source: Path | Sequence[Path]) -> tuple[SourceFile, ...]:
    if isinstance(source, Path) and source.is_dir():
        found = [path for path in files_below(source) if path.suffix == ".parquet" and not path.name.startswith(".")]
        if not found:
            raise SourceError(
                f"{source} holds no Parquet files (*.parquet): name the folder that holds them, or the files"
            )
        return find_files(found, bool, "Parquet files")
    return find_files(source, bool, "Parquet files")


@contextmanager
def _opened(file: SourceFile) -> Iterator["Any"]:
    """The file, as pyarrow reads it. Raises SourceError when it has changed or cannot be read."""
    import pyarrow.parquet

    with file.open() as descriptor, open(descriptor, "rb", closefd=False) as stream:
        try:
            content = pyarrow.parquet.ParquetFile(stream)
        except _arrow_errors() as error:
            raise SourceError(f"{file.path} cannot be read as Parquet: {_first_line(error)}") from None
        yield content


def _arrow_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises for files that are damaged."""
    import pyarrow

    return (pyarrow.ArrowException, OSError)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _look_at(file: SourceFile) -> _Footer | str:
    """The footer of a file, or why it cannot be read."""
    if not file.nbytes:
        return "the file is empty"
    try:
        with _opened(file) as content:
            schema, metadata = content.schema_arrow, content.metadata
            said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
            groups = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
            types = ", ".join(f"{column.name}: {column.type}" for column in schema)
            return _Footer(types, said.get("info", {}).get("features", {}), groups)
    except SourceError as error:
        return str(error).removeprefix(f"{file.path} ")
    except (ValueError, AttributeError) as error:
        return f"its metadata are damaged: {_first_line(error)}"


def _read_group(file: SourceFile, content: Any, group: int, columns: list[str]) -> "pyarrow.Table":
    try:
        return content.read_row_group(group, columns=columns, use_threads=False)
    except _arrow_errors() as error:
        raise SourceError(f"row group {group} of {file.path} cannot be read: {_first_line(error)}") from None


def _places(footers: Sequence[_Footer]) -> NDArray[np.int64]:
    places = [
        np.column_stack([np.full(rows, file), np.full(rows, group), np.arange(rows)])
        for file, footer in enumerate(footers)
        for group, rows in enumerate(footer.group_rows)
    ]
    return np.concatenate([np.zeros((0, 3), np.int64), *places])


def _make_fields(
    readable: Mapping[SourceFile, _Footer], fields: Mapping[str, str] | None, primary: str | None
) -> tuple[dict[str, ParquetColumn], Schema]:
    """The columns that become fields, and the schema of the records. A few rows of the first file that has any are looked at."""
    file, footer = next(((file, footer) for file, footer in readable.items() if any(footer.group_rows)), (None, None))
    if file is None or footer is None:
        file, footer = next(iter(readable.items()))
    with _opened(file) as content:
        arrow = content.schema_arrow
        names = [name for name in arrow.names if not name.startswith(_PANDAS_INDEX)]
        chosen = dict(fields) if fields else {name: name for name in names}
        for column in chosen.values():
            if column not in names:
                raise UsageError(f"{file.path} has no column {column!r}: it has {', '.join(names)}")
            if names.count(column) > 1:
                raise UsageError(f"{file.path} has several columns {column!r}: name the others by --field")
        group = next((number for number, rows in enumerate(footer.group_rows) if rows), None)
        rows = (
            None
            if group is None
            else _read_group(file, content, group, sorted(set(chosen.values()))).slice(0, _LOOKED_AT)
        )
    columns: dict[str, ParquetColumn] = {}
    for name, column in chosen.items():
        arrow_type = arrow.field(column).type
        try:
            made = _field(arrow_type, None if rows is None else rows.column(column), footer.features.get(column, {}))
        except BadValueError as error:
            raise UsageError(
                f"the column {column!r} of {file.path} cannot be a field: {error}; name the others by --field"
            ) from None
        columns[name] = ParquetColumn(column, _is_struct(arrow_type), made)
    declared = {name: column.field for name, column in columns.items()}
    images = [name for name, each in declared.items() if each.encoding in _IMAGES]
    if images and "hw" not in declared:
        declared["hw"] = SIZE_FIELD
    try:
        return columns, Schema(fields=declared, primary=primary or (images[0] if images else ""))
    except ValidationError as error:
        raise UsageError(
            f"the columns {', '.join(columns)} make no data set: {reason_of(error)}; choose by --field"
        ) from None


def _is_struct(arrow_type: Any) -> bool:
    """Whether it is Hugging Face's type of files: struct<bytes: binary, path: string>."""
    import pyarrow

    return bool(pyarrow.types.is_struct(arrow_type) and arrow_type.get_field_index("bytes") >= 0)


def _field(arrow_type: Any, column: Any, feature: Mapping[str, Any]) -> Field:
    """The field for a column; `column` are some of its values, None if there are none. Raises BadValueError."""
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    cells = [] if column is None else [cell for cell in column if cell.is_valid]
    meta = {"classes": feature["names"]} if feature.get("names") else {}
    if types.is_boolean(arrow_type) or types.is_integer(arrow_type) or types.is_floating(arrow_type):
        return Field(kind="tensor", dtype=np.dtype(arrow_type.to_pandas_dtype()).name, meta=meta)
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return Field(kind="text")
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type):
        return file_field([cell.as_py() for cell in cells])
    if _is_struct(arrow_type):
        return file_field([cell["bytes"].as_py() for cell in cells if cell["bytes"].is_valid])
    if types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        return _list_field(arrow_type, [cell.as_py() for cell in cells])
    raise BadValueError(f"its type is {arrow_type}")


def _list_field(arrow_type: Any, cells: Sequence[Any]) -> Field:
    from pyarrow import types

    shape: list[int | None] = []
    while not types.is_primitive(arrow_type):
        if types.is_fixed_size_list(arrow_type):
            shape.append(arrow_type.list_size)
        elif types.is_list(arrow_type) or types.is_large_list(arrow_type):
            shape.append(None)
        else:
            raise BadValueError(f"it holds lists of {arrow_type}")
        arrow_type = arrow_type.value_type
    if not (types.is_boolean(arrow_type) or types.is_integer(arrow_type) or types.is_floating(arrow_type)):
        raise BadValueError(f"it holds lists of {arrow_type}")
    for axis in range(1, len(shape)):  # only the first extent may differ: what the first row has, all must have
        if shape[axis] is None:
            extents = [np.shape(cell)[axis] for cell in cells if _depth(cell) > axis]
            shape[axis] = extents[0] if extents else 1
    return numbers_field(np.dtype(arrow_type.to_pandas_dtype()).name, tuple(shape))


def _depth(cell: Any) -> int:
    """How deep lists are nested, as far as they are not empty and of equal lengths."""
    try:
        return np.ndim(np.asarray(cell)) if len(cell) else 1
    except ValueError:
        raise BadValueError("its lists differ in more than their first extent") from None


def _cell(table: "pyarrow.Table", row: int, column: ParquetColumn) -> Value:
    """The value of a row: a buffer for `encoded`. Raises BadValueError for one that is null."""
    cell = _meant(table.column(column.name)[row])
    if column.is_struct and cell.is_valid:
        cell = cell["bytes"]
    if not cell.is_valid:
        reason = ": its file lies elsewhere, only its path is here" if column.is_struct else ""
        raise BadValueError(f"its {column.name} is null{reason}")
    if column.field.kind == "encoded":
        return cell.as_buffer()  # type: ignore[no-any-return]
    return _array(column, cell) if hasattr(cell, "values") else cell.as_py()


def _meant(cell: Any) -> Any:
    """The value that a cell stands for: those of a dictionary are numbers of its entries."""
    return cell.value if hasattr(cell, "dictionary") and cell.is_valid else cell


def _array(column: ParquetColumn, cell: Any) -> NDArray[np.generic]:
    """The numbers of a list. numpy would make NaN, or False, of a null among them: it is refused, as are lists that differ."""
    import pyarrow.compute

    values, shape = cell.values, [len(cell)]
    while pyarrow.types.is_nested(values.type):
        extents = set(pyarrow.compute.list_value_length(values).to_pylist()) or {0}
        values, shape = values.flatten(), [*shape, extents.pop()]
        if extents or shape[-1] is None:
            raise BadValueError(f"its {column.name} is no array of numbers")
    if values.null_count:
        raise BadValueError(f"its {column.name} is no array of numbers")
    array: NDArray[np.generic] = values.to_numpy(zero_copy_only=False).reshape(shape)
    return array.reshape(0, *column.field.row_shape) if not array.size and column.field.kind == "ragged" else array


def _sizes(file: SourceFile, columns: Mapping[str, ParquetColumn]) -> dict[str, NDArray[np.int64]] | str:
    """Bytes of every row of these columns in a file, or why it cannot be read."""
    sizes: dict[str, list[NDArray[np.int64]]] = {name: [np.zeros(0, np.int64)] for name in columns}
    if columns:
        try:
            with _opened(file) as content:
                for group in range(content.metadata.num_row_groups):
                    table = _read_group(file, content, group, [column.leaf for column in columns.values()])
                    for name, column in columns.items():
                        sizes[name].append(_cell_bytes(table.column(column.name), column))
        except SourceError as error:
            return str(error)
    return {name: np.concatenate(parts) for name, parts in sizes.items()}


def _cell_bytes(cells: Any, column: ParquetColumn) -> NDArray[np.int64]:
    import pyarrow
    import pyarrow.compute

    if column.is_struct:
        cells = pyarrow.compute.struct_field(cells, ["bytes"])
    if pyarrow.types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    count: Callable[[Any], Any] = (
        pyarrow.compute.list_value_length if column.field.kind == "ragged" else pyarrow.compute.binary_length
    )
    lengths: NDArray[np.int64] = pyarrow.compute.fill_null(count(cells), 0).to_numpy().astype(np.int64)
    return lengths * column.field.row_bytes
