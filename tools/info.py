"""`stagein info`: what a data set is and holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from stagein.formats.dataset import Dataset
from stagein.formats.errors import StageinError
from stagein.formats.schema import Field, Schema
from stagein.formats.values import UNKNOWN_ENCODING, encoding_of

from .console import bytes_text, complain, count_text, print_table, say, say_json

_SHOWN_CHARACTERS = 60
_SHOWN_NUMBERS = 8
_SHOWN_NAMES = 6


@dataclass(frozen=True)
class FieldSize:
    """Bytes of a field in all records, as they are stored and before compression, without padding and metadata."""

    stored_bytes: int
    raw_bytes: int


def run(path: Path, *, records: int, as_json: bool) -> None:
    """Print what the data set at `path` is and holds, and its first `records` records. Raises StageinError."""
    dataset = Dataset(path)
    manifest, sizes = dataset.manifest, field_sizes(dataset)
    if as_json:
        summary = manifest.model_dump(mode="json", by_alias=True, exclude={"shards", "files"})
        summary |= {"path": str(path), "num_shards": manifest.num_shards, "nbytes": manifest.nbytes}
        say_json(summary | {"sizes": {name: asdict(size) for name, size in sizes.items()}})
        return
    stored, raw = sum(size.stored_bytes for size in sizes.values()), sum(size.raw_bytes for size in sizes.values())
    count = max(1, manifest.num_records)
    say(
        f"{path}: {count_text(manifest.num_records, 'record')} in {count_text(manifest.num_shards, 'shard')}, "
        f"{bytes_text(manifest.nbytes)}"
    )
    say(f"  id         {manifest.id}")
    say(f"  container  {manifest.container}, made from {manifest.source.kind}")
    smaller = f", {stored / raw:.1%} of {bytes_text(raw / count)} uncompressed" if stored < raw else ""
    say(f"  record     {bytes_text(stored / count)} on average{smaller}")
    say(f"  sums       crc32c of every record, xxh3_128 of every {bytes_text(manifest.chunk_bytes)} of every file")
    print_fields(manifest.record_schema, sizes, manifest.num_records)
    for number in range(min(records, manifest.num_records)):
        try:
            say(f"{number}: {record_text(dataset[number])}")
        except StageinError as error:
            complain(f"record {number} cannot be shown: {error}")


def field_sizes(dataset: Dataset) -> dict[str, FieldSize]:
    """How large each field of a data set is."""
    sizes = {}
    for name, field in dataset.schema.fields.items():
        raw = len(dataset) * field.record_bytes
        stored = int(dataset.readers[name].index.nbytes.sum(dtype=np.int64)) if name in dataset.readers else raw
        sizes[name] = FieldSize(stored, stored if field.is_variable else raw)
    return sizes


def record_text(record: Mapping[str, Any]) -> str:
    """A record on one line: small values as they are, of large ones what they are."""
    return ", ".join(f"{name} {_value_text(value)}" for name, value in record.items())


def _value_text(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN_CHARACTERS else value[:_SHOWN_CHARACTERS] + "...")
    if value.ndim == 1 and value.dtype == np.uint8 and encoding_of(value.data) != UNKNOWN_ENCODING:
        return f"{encoding_of(value.data)} of {bytes_text(value.nbytes)}"
    if value.size <= _SHOWN_NUMBERS:
        return str(value.tolist())
    return f"{value.dtype.name} [{', '.join(map(str, value.shape))}]"


def print_fields(schema: Schema, sizes: Mapping[str, FieldSize] | None = None, num_records: int = 0) -> None:
    """The fields of a record, one a row; with their sizes, where they are known. What else they say comes after, a line each."""
    known = ["kept in", "a record", "stored"] if sizes else []
    table = Table("field", "holds", "codec", *known, box=SIMPLE_HEAD, pad_edge=False)
    for name, field in schema.fields.items():
        mark = " (primary)" if name == schema.primary else ""
        size = _size_texts(field, sizes[name], num_records) if sizes else []
        table.add_row(name + mark, _holds_text(field), _codec_text(field), *size)
    print_table(table)
    for name, field in schema.fields.items():
        for key, value in field.meta.items():
            say(f"{key} of {name}: {_meta_text(value)}")


def _holds_text(field: Field) -> str:
    """As `jpeg [?, ?, 3]`, `float32 [?, 4]`, `int64`, `text`."""
    shape = f" [{', '.join('?' if extent is None else str(extent) for extent in field.shape)}]" if field.shape else ""
    return (field.encoding or "text") if field.kind == "text" else f"{field.encoding or field.dtype}{shape}"


def _codec_text(field: Field) -> str:
    """As --codec of `stagein convert` takes it."""
    if field.codec is None:
        return ""
    return field.codec.name + (":bit" if field.codec.shuffle == "bit" else "")


def _size_texts(field: Field, size: FieldSize, num_records: int) -> list[str]:
    ratio = f" ({size.stored_bytes / size.raw_bytes:.0%})" if size.stored_bytes < size.raw_bytes else ""
    mean = size.stored_bytes / max(1, num_records)
    return [str(field.storage), bytes_text(mean), bytes_text(size.stored_bytes) + ratio]


def _meta_text(value: object) -> str:
    if not isinstance(value, list):
        return str(value)
    shown = ", ".join(map(str, value[:_SHOWN_NAMES]))
    return shown if len(value) <= _SHOWN_NAMES else f"{shown}, ... {len(value)} in all"
