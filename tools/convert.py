"""`stagein convert`: pack a source into a data set of shards."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from stagein.formats.codecs import Codec
from stagein.formats.conversion import Converted, Progress, convert
from stagein.formats.errors import UsageError
from stagein.formats.source_images import BYTES_AFTER, BYTES_BEFORE, change_images
from stagein.formats.sources import Source, record_nbytes

from .console import bytes_text, complain, count_text, progress_bytes, say, seconds_text
from .convert_commands import ConvertOptions

_LISTED_SKIPPED = 20


def run(scan: Callable[[], Source], target: Path, options: ConvertOptions) -> None:
    """Convert the source that `scan` finds into the data set `target`. Raises StageinError."""
    start = time.monotonic()
    source = scan()
    if not options.json:
        say(f"{source.name}: {count_text(len(source.nbytes), 'record')}, {bytes_text(record_nbytes(source).sum())}")
    source = with_changed_images(source, options)
    with progress_bytes("converting", quiet=options.json) as update:

        def on_progress(progress: Progress) -> None:
            update(progress.nbytes, progress.total_bytes)

        converted = convert(
            source,
            target,
            container=options.container.value,
            codec=parse_codec(options.codec),
            shard_bytes=options.shard_bytes,
            workers=options.workers or usable_cores(),
            skip_bad=options.skip_bad,
            overwrite=options.overwrite,
            on_progress=on_progress,
        )
    _report(target, converted, time.monotonic() - start, options.json)


def parse_codec(text: str) -> Codec | Literal["auto"] | None:
    """A codec on the command line: auto, none, zstd, lz4, blosc-lz4 (by bytes) or blosc-lz4:bit. Raises UsageError."""
    codecs: dict[str, Codec | Literal["auto"] | None] = {
        "auto": "auto",
        "none": None,
        "zstd": Codec(name="zstd"),
        "lz4": Codec(name="lz4"),
        "blosc-lz4": Codec(name="blosc-lz4", shuffle="byte"),
        "blosc-lz4:bit": Codec(name="blosc-lz4", shuffle="bit"),
    }
    if text not in codecs:
        raise UsageError(f"--codec {text} is not known: take one of {', '.join(codecs)}")
    return codecs[text]


def with_changed_images(source: Source, options: ConvertOptions) -> Source:
    """The source with its images changed as the options say: shrunk first, then made seekable. Raises UsageError."""
    if options.image_max_side is not None or options.image_quality is not None:
        from stagein.loaders.shrink import ShrinkImages

        source = change_images(source, ShrinkImages(options.image_max_side, options.image_quality))
    if options.seekable_jpeg:
        from stagein.formats.seekable_images import SeekableJpegs

        source = change_images(source, SeekableJpegs())
    return source


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
                    "shards": manifest.num_shards,
                    "nbytes": manifest.nbytes,
                    "seconds": round(seconds, 3),
                    "reused_shards": converted.reused_shards,
                    "counts": converted.counts,
                    "skipped": [asdict(refused) for refused in converted.skipped],
                }
            )
        )
        return
    if converted.skipped:
        complain(
            f"{len(converted.skipped)} things were left out, as asked; they are listed in {target / 'skipped.tsv'}"
        )
        for refused in converted.skipped[:_LISTED_SKIPPED]:
            complain(f"  {refused.name}: {refused.reason}")
    _say_counts(converted.counts)
    reused = f", {converted.reused_shards} of them kept from an earlier attempt" if converted.reused_shards else ""
    say(
        f"{target}: {count_text(manifest.num_records, 'record')} in {count_text(manifest.num_shards, 'shard')}{reused}, {bytes_text(manifest.nbytes)}, "
        f"in {seconds_text(seconds)} ({bytes_text(manifest.nbytes / seconds)}/s), id {manifest.id[:12]}"
    )


def _say_counts(counts: Mapping[str, int]) -> None:
    """What became of images that were changed, and of their bytes."""
    for outcome, count in sorted(counts.items()):
        if outcome not in (BYTES_BEFORE, BYTES_AFTER):
            say(f"{outcome}: {count:,}")
    if BYTES_BEFORE in counts:
        before, after = counts[BYTES_BEFORE], counts[BYTES_AFTER]
        say(f"images: {bytes_text(before)} became {bytes_text(after)} ({after / max(before, 1) - 1:+.1%})")
