"""`stagein adopt`: a data set over HDF5 files or Zarr arrays of others, which stay as they are."""

from pathlib import Path

from stagein.formats.assembly import refuse_target
from stagein.formats.foreign.adoption import adopt, scan_foreign

from .console import bytes_text, count_text, progress_bytes, say, say_json
from .convert_commands import parse_fields
from .info import print_fields


def run(
    source: Path,
    target: Path,
    *,
    fields: list[str] | None,
    primary: str | None,
    file_per_record: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Adopt what is at `source` as the data set `target`. Raises StageinError."""
    refuse_target(target, source, overwrite=overwrite)
    records = scan_foreign(source, parse_fields(fields), primary, file_per_record=file_per_record)
    with progress_bytes("adopting", quiet=as_json) as update:
        manifest = adopt(records, target, overwrite=overwrite, on_progress=update)
    if as_json:
        summary = {"path": str(target), "id": manifest.id, "records": manifest.num_records, "nbytes": manifest.nbytes}
        say_json(summary | {"shards": manifest.num_shards})
        return
    say(
        f"{target}: {count_text(manifest.num_records, 'record')} in {count_text(len(manifest.shard_files), 'file')} of {source}, "
        f"{bytes_text(manifest.nbytes)}, linked and not copied"
    )
    print_fields(manifest.record_schema)
