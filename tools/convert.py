"""`stagein convert`: pack a source into a data set of shards."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from stagein.formats.conversion import Converted, Progress, convert
from stagein.formats.manifest import Container
from stagein.formats.source_imagefolder import scan_imagefolder

from .console import bytes_text, complain, progress_bytes, say, seconds_text

_LISTED_SKIPPED = 20


def run_imagefolder(
    source: Path,
    target: Path,
    *,
    container: Container,
    shard_bytes: int,
    workers: int | None,
    skip_bad: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Convert a folder of class folders of images. Raises StageinError."""
    start = time.monotonic()
    plan = scan_imagefolder(source)
    if not as_json:
        classes = len(set(plan.labels.tolist()))
        say(f"{source}: {len(plan.paths):,} images in {classes} classes, {bytes_text(plan.nbytes.sum())}")
    with progress_bytes("converting", quiet=as_json) as update:

        def on_progress(progress: Progress) -> None:
            update(progress.nbytes, progress.total_bytes)

        converted = convert(
            plan,
            target,
            container=container,
            shard_bytes=shard_bytes,
            workers=workers or usable_cores(),
            skip_bad=skip_bad,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    _report(target, converted, time.monotonic() - start, as_json)


def usable_cores() -> int:
    """Cores this process may use: a job's share of the node, not the whole node."""
    return len(os.sched_getaffinity(0))


def _report(target: Path, converted: Converted, seconds: float, as_json: bool) -> None:
    manifest = converted.manifest
    if as_json:
        say(
            json.dumps(
                {
                    "target": str(target),
                    "id": manifest.id,
                    "records": manifest.num_records,
                    "shards": len(manifest.shards),
                    "nbytes": manifest.nbytes,
                    "seconds": round(seconds, 3),
                    "reused_shards": converted.reused_shards,
                    "skipped": [asdict(refused) for refused in converted.skipped],
                }
            )
        )
        return
    if converted.skipped:
        complain(f"{len(converted.skipped)} files were left out, as asked; they are listed in {target / 'skipped.tsv'}")
        for refused in converted.skipped[:_LISTED_SKIPPED]:
            complain(f"  {refused.name}: {refused.reason}")
    reused = f", {converted.reused_shards} of them kept from an earlier attempt" if converted.reused_shards else ""
    say(
        f"{target}: {manifest.num_records:,} records in {len(manifest.shards)} shards{reused}, {bytes_text(manifest.nbytes)}, "
        f"in {seconds_text(seconds)} ({bytes_text(manifest.nbytes / seconds)}/s), id {manifest.id[:12]}"
    )
