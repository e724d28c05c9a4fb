"""`stagein convert`: pack a source into a data set of shards, or several, with the cores of all ranks that mpirun started."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

from stagein.formats.assembly import refuse_target
from stagein.formats.codecs import parse_codec
from stagein.formats.conversion import (
    ConversionPlan,
    Converted,
    Progress,
    carry_out,
    plan_conversion,
    refuse_bad_records,
    signals_as_errors,
    start_workers,
)
from stagein.formats.errors import ExitCode, SourceError, StageinError, UsageError, WatchdogError
from stagein.formats.manifest import MANIFEST_NAME, Manifest
from stagein.formats.shard_workers import ShardExecutor, ShardWorkers
from stagein.formats.source import PartialSource, PiecewiseSource, Source, record_nbytes
from stagein.formats.sources.images import BYTES_AFTER, BYTES_BEFORE, change_images
from stagein.formats.sources.python import RecordStream
from stagein.formats.sources.selection import refuse_shares, select, split
from stagein.world import Communicator, connect

from .console import bytes_text, complain, count_text, progress_bytes, say, say_json, seconds_text
from .convert_options import ConvertOptions

_LISTED_SKIPPED = 20
_LISTED_LEFT_OUT = 5
_MANY_READS = 4
"""How often a source is read before it is worth a warning."""
_SPLIT = "{split}"
_STREAM_SECONDS = 5.0
"""How often the progress of records is shown whose number is not known."""

Executors = Callable[[int], AbstractContextManager[ShardExecutor]]
"""Who makes so many shards."""


def run(
    scan: Callable[[], Source | RecordStream], target: Path, options: ConvertOptions, source: Path | None = None
) -> None:
    """Convert what `scan` finds into the data set `target`; the first rank alone prints.

    source  where that lies, if it lies in files: not written to.

    Raises StageinError, on every rank.
    """

    def convert(executors: Executors) -> None:
        _refuse_at_once(target, options, source)
        _convert(scan, target, options, executors)

    communicator = connect().within(options.timeout)
    if communicator.world.size > 1:
        _run_on_ranks(communicator, convert, options)
        return
    workers = options.workers or usable_cores()
    with signals_as_errors(target):
        convert(lambda shards: start_workers(min(workers, shards)))


def _run_on_ranks(communicator: Communicator, convert: Callable[[Executors], None], options: ConvertOptions) -> None:
    from stagein.shard_ranks import RankPool, follow

    workers = ShardWorkers(options.workers or _cores_of_this_rank(communicator))
    with workers, _noted_signals() as stopping_signal:
        try:
            if communicator.world.rank == 0:
                pool = RankPool(communicator, workers)
                pool.lead(lambda: convert(lambda shards: pool), stopping_signal)
            else:
                follow(communicator, workers, stopping_signal)
        except WatchdogError as error:
            complain(str(error))
            communicator.abort(error.exit_code)
        except StageinError:  # every rank has one
            raise
        except BaseException:  # a bug on one rank: the others would wait for it
            traceback.print_exc()
            communicator.abort(ExitCode.FAILED)


def _refuse_at_once(target: Path, options: ConvertOptions, source: Path | None) -> None:
    """Refuse what cannot be whatever the source holds: to look at all of it may take long. Raises StageinError."""
    parse_codec(options.codec)
    if options.split is not None:
        if _SPLIT not in target.name:
            raise UsageError(f"{target} does not say where the parts go: write {_SPLIT} in its name, as my-{_SPLIT}.st")
        refuse_shares(options.split)
    elif _SPLIT in target.name:
        raise UsageError(
            f"{target} has {_SPLIT} in its name: say with --split into which parts, as --split train=0.9,val=0.1"
        )
    if not options.dry_run:
        refuse_target(target, source, overwrite=options.overwrite)


def _convert(
    scan: Callable[[], Source | RecordStream], target: Path, options: ConvertOptions, executors: Executors
) -> None:
    scanned = scan()
    if isinstance(scanned, RecordStream):
        _write_stream(scanned, target, options)
        return
    if isinstance(scanned, PartialSource):
        _warn_of_what_is_left_out(scanned.left_out, scanned.name)
    found = select(scanned, limit=options.limit, shuffle_seed=options.shuffle_seed)
    source = with_changed_images(found, options)
    refuse_bad_records(source, skip_bad=options.skip_bad)
    plans = _plans(source, target, options)
    if options.shuffle_seed is not None and isinstance(scanned, PiecewiseSource):
        _warn_of_costly_order(scanned.costly_order, found.name, sum(len(plan.shards) for plan in plans.values()))
    if options.dry_run:
        _report_plans(plans, options)
        return
    if not options.json:
        say(f"{found.name}: {count_text(len(found.nbytes), 'record')}, {bytes_text(record_nbytes(found).sum())}")
    reports = [_carry_out(plan, path, options, executors) for path, plan in plans.items()]
    if options.json:
        say_json(reports[0] if options.split is None else {"targets": reports})


def _warn_of_what_is_left_out(left_out: tuple[str, ...], name: str) -> None:
    if left_out:
        more = f" and {len(left_out) - _LISTED_LEFT_OUT} more" if len(left_out) > _LISTED_LEFT_OUT else ""
        complain(
            f"{name}: members {', '.join(left_out[:_LISTED_LEFT_OUT])}{more} are left out: --field NAME=EXTENSION, one for each "
            "field, takes others than the usual ones"
        )


def _warn_of_costly_order(why: str | None, name: str, shards: int) -> None:
    if why is not None and shards >= _MANY_READS:
        complain(
            f"{name}: with --shuffle-seed each of {shards} shards takes reading all of it, because {why}: leave the option "
            "out (loaders shuffle in any case), or convert a decompressed copy"
        )


def _write_stream(stream: RecordStream, target: Path, options: ConvertOptions) -> None:
    """Write records as they come, in this process: nothing can be dealt out, and an interrupted run starts from the beginning."""
    impossible = {
        "--dry-run": options.dry_run,
        "--shuffle-seed": options.shuffle_seed is not None,
        "--split": options.split is not None,
        "--seekable-jpeg": options.seekable_jpeg,
        "--image-max-side": options.image_max_side is not None,
        "--image-quality": options.image_quality is not None,
        "--skip-bad": options.skip_bad,
    }
    asked = [option for option, is_asked in impossible.items() if is_asked]
    if asked:
        raise UsageError(
            f"{stream.name} yields records one by one: {asked[0]} needs them by number, so return an object with __len__ and "
            "__getitem__, or leave the option out"
        )
    from stagein.formats.writer import Writer

    start = last = time.monotonic()
    writer = Writer(
        target,
        codec=parse_codec(options.codec),
        container=options.container.value,
        shard_bytes=options.shard_bytes,
        overwrite=options.overwrite,
    )
    records = 0
    with writer:
        for record in islice(stream, options.limit):
            writer.write(record)
            records += 1
            now = time.monotonic()
            if now - last > _STREAM_SECONDS and not options.json:
                last = now
                complain(f"converting: {count_text(records, 'record')}, {records / (now - start):,.0f} records/s")
        if not records:
            raise SourceError(f"{stream.name} yields no records: there is nothing to convert")
    manifest = Manifest.load(target)
    report = _report(target, Converted(manifest, (), 0, {}), manifest.nbytes, time.monotonic() - start, options)
    if options.json:
        say_json(report)


def _plans(source: Source, target: Path, options: ConvertOptions) -> dict[Path, ConversionPlan]:
    """What is to be written where: one data set, or one a part of the split."""
    codec = parse_codec(options.codec)
    parts = {target: source}
    if options.split is not None:
        shares = split(source, options.split, options.shuffle_seed or 0)
        parts = {target.with_name(target.name.replace(_SPLIT, name)): part for name, part in shares.items()}
    return {
        path: plan_conversion(part, container=options.container.value, codec=codec, shard_bytes=options.shard_bytes)
        for path, part in parts.items()
    }


def _carry_out(plan: ConversionPlan, target: Path, options: ConvertOptions, executors: Executors) -> dict[str, Any]:
    """Make one data set and say so; returns the report for --json."""
    start = time.monotonic()
    description = "converting" if options.split is None else f"converting {target.name}"
    if options.split is not None and not options.overwrite and _is_done(plan, target):
        if not options.json:
            say(f"{target} is complete already")
        return {"target": str(target), "id": Manifest.load(target).id, "complete": True}
    with progress_bytes(description, quiet=options.json) as update:

        def on_progress(progress: Progress) -> None:
            rate = progress.records / max(time.monotonic() - start, 1e-9)
            note = f"{count_text(progress.records, 'record')}, {rate:,.0f}/s"
            update(progress.nbytes, progress.total_bytes, note)

        converted = carry_out(
            plan,
            target,
            executors(len(plan.shards)),
            skip_bad=options.skip_bad,
            overwrite=options.overwrite,
            on_progress=on_progress,
        )
    return _report(target, converted, int(record_nbytes(plan.source).sum()), time.monotonic() - start, options)


def _is_done(plan: ConversionPlan, target: Path) -> bool:
    """Whether an earlier run of the same command got as far as to complete this part of the split."""
    return (target / MANIFEST_NAME).exists() and plan.is_done_by(Manifest.load(target))


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


def _cores_of_this_rank(communicator: Communicator) -> int:
    """Its share of the cores that it may use, which other ranks of its node may use as well."""
    mine = communicator.world.node_name, sorted(os.sched_getaffinity(0))
    return max(1, len(mine[1]) // communicator.gather_all(mine).count(mine))


@contextmanager
def _noted_signals() -> Iterator[Callable[[], str | None]]:
    """Inside, SIGTERM, SIGINT and SIGUSR1 are noted; yields a function that names the one that came, if one did."""
    names: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield lambda: names[0] if names else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report_plans(plans: dict[Path, ConversionPlan], options: ConvertOptions) -> None:
    if options.json:
        listed = [
            {
                "target": str(target),
                "records": len(plan.source.nbytes),
                "nbytes": int(record_nbytes(plan.source).sum()),
                "shards": len(plan.shards),
                "container": plan.layout.container,
                "schema": plan.layout.schema.model_dump(mode="json"),
                "skipped": [asdict(refused) for refused in plan.source.refused],
            }
            for target, plan in plans.items()
        ]
        say_json(listed[0] if options.split is None else {"targets": listed})
        return
    from .info import print_fields

    for target, plan in plans.items():
        records, nbytes, shards = len(plan.source.nbytes), int(record_nbytes(plan.source).sum()), len(plan.shards)
        say(
            f"{target}: would be {count_text(records, 'record')}, {bytes_text(nbytes)} before compression, "
            f"in {count_text(shards, 'shard')} of {plan.layout.container}"
        )
    plan = next(iter(plans.values()))
    if plan.source.refused:
        say(f"  {count_text(len(plan.source.refused), 'thing')} in the source would be left out")
    print_fields(plan.layout.schema)


def _report(
    target: Path, converted: Converted, source_bytes: int, seconds: float, options: ConvertOptions
) -> dict[str, Any]:
    manifest = converted.manifest
    if not options.json:
        _say_converted(target, converted, source_bytes, seconds)
    return {
        "target": str(target),
        "id": manifest.id,
        "records": manifest.num_records,
        "shards": manifest.num_shards,
        "nbytes": manifest.nbytes,
        "seconds": round(seconds, 3),
        "records_per_second": round(manifest.num_records / seconds, 1),
        "bytes_per_second": round(source_bytes / seconds),
        "reused_shards": converted.reused_shards,
        "counts": converted.counts,
        "skipped": [asdict(refused) for refused in converted.skipped],
    }


def _say_converted(target: Path, converted: Converted, source_bytes: int, seconds: float) -> None:
    manifest = converted.manifest
    if converted.skipped:
        were = "was" if len(converted.skipped) == 1 else "were"
        left_out = f"{count_text(len(converted.skipped), 'thing')} {were} left out"
        complain(f"{left_out}, as asked: the list is {target / 'skipped.tsv'}")
        for refused in converted.skipped[:_LISTED_SKIPPED]:
            complain(f"  {refused.name}: {refused.reason}")
    _say_counts(converted.counts)
    reused = f", {converted.reused_shards} of them kept from an earlier attempt" if converted.reused_shards else ""
    say(
        f"{target}: {count_text(manifest.num_records, 'record')} in {count_text(manifest.num_shards, 'shard')}{reused}, "
        f"{bytes_text(manifest.nbytes)}, in {seconds_text(seconds)} ({bytes_text(source_bytes / seconds)}/s, "
        f"{manifest.num_records / seconds:,.0f} records/s), id {manifest.id[:12]}"
    )


def _say_counts(counts: Mapping[str, int]) -> None:
    """What became of images that were changed, and of their bytes."""
    for outcome, count in sorted(counts.items()):
        if outcome not in (BYTES_BEFORE, BYTES_AFTER):
            say(f"{outcome}: {count:,}")
    if BYTES_BEFORE in counts:
        before, after = counts[BYTES_BEFORE], counts[BYTES_AFTER]
        say(f"images: {bytes_text(before)} became {bytes_text(after)} ({after / max(before, 1) - 1:+.1%})")
