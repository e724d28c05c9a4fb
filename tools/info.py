"""`stagein info`: what a data set is and holds."""

import json
from pathlib import Path

from rich.table import Table

from stagein.formats.manifest import Manifest
from stagein.formats.schema import Field, Schema

from .console import bytes_text, count_text, print_table, say


def run(path: Path, *, as_json: bool) -> None:
    """Print schema, sizes and id of the data set at `path`. Raises SourceError."""
    manifest = Manifest.load(path)
    if as_json:
        summary = manifest.model_dump(mode="json", by_alias=True, exclude={"shards", "files"})
        summary |= {"path": str(path), "num_shards": manifest.num_shards, "nbytes": manifest.nbytes}
        say(json.dumps(summary))
        return
    payload = sum(shard.nbytes for shard in manifest.shards)
    mean = payload / manifest.num_records if manifest.num_records else 0
    say(
        f"{path}: {count_text(manifest.num_records, 'record')} in {count_text(manifest.num_shards, 'shard')}, {bytes_text(manifest.nbytes)}"
    )
    say(f"  id         {manifest.id}")
    say(f"  container  {manifest.container}, made from {manifest.source.kind}")
    primary = manifest.record_schema.primary_field
    smaller = f" ({primary.record_bytes / mean:.2f} times smaller than uncompressed)" if primary.codec and mean else ""
    say(f"  record     {bytes_text(mean)} on average{smaller}")
    say(f"  sums       crc32c of every record, xxh3_128 of every {bytes_text(manifest.chunk_bytes)} of every file")
    print_table(schema_table(manifest.record_schema))


def schema_table(schema: Schema) -> Table:
    """The fields of a record, one a row."""
    table = Table("field", "kind", "dtype", "shape", "more")
    for name, field in schema.fields.items():
        mark = " (primary)" if name == schema.primary else ""
        table.add_row(name + mark, field.kind, field.dtype, _shape_text(field), _meta_text(field))
    return table


def _shape_text(field: Field) -> str:
    return " x ".join("?" if extent is None else str(extent) for extent in field.shape) or "scalar"


def _meta_text(field: Field) -> str:
    parts = [field.encoding] if field.encoding else []
    if field.codec:
        parts.append(field.codec.name + (f", shuffled by {field.codec.shuffle}s" if field.codec.shuffle else ""))
    for key, value in field.meta.items():
        if isinstance(value, list) and len(value) > 6:
            parts.append(f"{key}: {', '.join(map(str, value[:5]))}, … {len(value)} in all")
        else:
            parts.append(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return "; ".join(parts)
