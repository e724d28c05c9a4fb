"""Conversion: a plan, and its shards made by several processes or ranks, resumable, byte-identical however many there are."""

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .assembly import GrowingDataset, fingerprint
from .codec_trial import TRIED_RECORDS, CodecTrial
from .codecs import Codec
from .errors import InterruptedRunError, SourceError, destination_error
from .manifest import DEFAULT_CHUNK_BYTES, Container, Manifest, Origin
from .schema import Schema
from .shard_tasks import ShardResult, ShardTask
from .shard_workers import InProcess, ShardExecutor, ShardWorkers, result_of
from .shards import (
    DEFAULT_SHARD_BYTES,
    ShardLayout,
    ShardPlan,
    plan_shards,
    refuse_codecs,
    refuse_container,
    refuse_large_record,
    refuse_sizes,
)
from .source import RefusedRecord, Source, SourceRecord, record_nbytes, variable_nbytes
from .values import row_bytes, to_rows

_LISTED_REFUSED = 20


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: records and bytes that are in finished shards, of all."""

    records: int
    total_records: int
    nbytes: int
    total_bytes: int
    reused_shards: int


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    manifest: Manifest
    skipped: tuple[RefusedRecord, ...]
    reused_shards: int
    counts: Mapping[str, int]
    """What sources count about their records (`SourceRecord.counts`), added up."""


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion of `source` will write: which records go to which shard, and what shards look like."""

    source: Source
    layout: ShardLayout
    shards: tuple[ShardPlan, ...]

    @property
    def origin(self) -> Origin:
        """What the manifest says about the source."""
        return Origin(kind=self.source.kind, records_sha256=fingerprint(self.source.identity()))

    def is_done_by(self, manifest: Manifest) -> bool:
        """Whether this manifest is of a data set that the plan has led to."""
        layout = ShardLayout(manifest.record_schema, manifest.container, manifest.capacity, manifest.chunk_bytes)
        return layout == self.layout and manifest.source == self.origin


def plan_conversion(
    source: Source,
    *,
    container: Container = "hdf5+zarr",
    codec: Codec | Literal["auto"] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> ConversionPlan:
    """The plan for `convert` with the same arguments. Raises UsageError for a record or a codec that cannot be."""
    refuse_sizes(shard_bytes, chunk_bytes)
    for name, nbytes in variable_nbytes(source).items():
        if len(nbytes):
            refuse_large_record(int(nbytes.max()), f"field {name!r} of record {int(nbytes.argmax())} of {source.name}")
    schema = settled_schema(source, codec)
    refuse_container(container)
    refuse_codecs(schema, container)
    shards, capacity = plan_shards(schema, len(source.nbytes), variable_nbytes(source), shard_bytes)
    return ConversionPlan(source, ShardLayout(schema, container, capacity, chunk_bytes), tuple(shards))


def convert(
    source: Source,
    target: Path,
    *,
    container: Container = "hdf5+zarr",
    codec: Codec | Literal["auto"] | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Converted:
    """Pack the records of `source` into the data set `target`, with `workers` processes (1: this one).

    `codec` compresses the records of the large `tensor` fields for which the schema names none; "auto" tries some on a few
    records and takes, field by field, what is worthwhile. All other fields are stored as they are.

    Killed at any point, the same call again keeps the finished shards. What cannot be a record is listed in a
    SourceError at the end, or left out and written to skipped.tsv when `skip_bad` is set. Other errors: UsageError
    (target exists, another process writes it), SourceError (something changed or cannot be read), NoSpaceError,
    InterruptedRunError (SIGTERM, SIGINT).
    """
    refuse_bad_records(source, skip_bad=skip_bad)
    plan = plan_conversion(source, container=container, codec=codec, shard_bytes=shard_bytes, chunk_bytes=chunk_bytes)
    executor = start_workers(min(workers, len(plan.shards)))
    with signals_as_errors(target):
        return carry_out(plan, target, executor, skip_bad=skip_bad, overwrite=overwrite, on_progress=on_progress)


def start_workers(workers: int) -> AbstractContextManager[ShardExecutor]:
    """Who makes shards: so many processes, or this one when one is enough."""
    return ShardWorkers(workers) if workers > 1 else nullcontext(InProcess())


def refuse_bad_records(source: Source, *, skip_bad: bool) -> None:
    """Raise SourceError for what was found to be no record, unless that is to be left out."""
    if source.refused and not skip_bad:
        raise _refusal(source, list(source.refused))


def carry_out(
    plan: ConversionPlan,
    target: Path,
    executor: AbstractContextManager[ShardExecutor],
    *,
    skip_bad: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Converted:
    """Have `executor` make the shards of a plan, and publish the data set `target`. Raises as `convert` does.

    The executor is entered when work begins; on leaving after a failure it must be at rest, for others may write then.
    """
    source, layout = plan.source, plan.layout
    with _os_errors_as_sentences(target):
        growing = GrowingDataset(target, overwrite=overwrite)
    try:
        with _os_errors_as_sentences(target), executor as shard_makers:
            tasks = (
                ShardTask(
                    shard,
                    source.part(np.arange(shard.first, shard.first + shard.records)),
                    layout,
                    growing.folder,
                    skip_bad,
                )
                for shard in plan.shards
            )
            results = _run_tasks(tasks, record_nbytes(source), shard_makers, on_progress)
            bad = [refused for result in results for refused in result.bad]
            if bad:
                raise _refusal(source, bad)
            shards = [result.shard for result in results if result.shard is not None]
            skipped = (*source.refused, *(refused for shard in shards for refused in shard.skipped))
            manifest = growing.publish(layout, shards, plan.origin, skipped)
    finally:
        growing.close()
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard.counts)
    return Converted(manifest, skipped, sum(result.reused for result in results), counts)


def settled_schema(source: Source, codec: Codec | Literal["auto"] | None) -> Schema:
    """The schema of a source with codec and storage of every field settled."""
    count = len(source.nbytes)
    means = {name: float(nbytes.mean()) if count else 0.0 for name, nbytes in variable_nbytes(source).items()}
    schema = source.schema.resolved(means, count)
    names = [name for name, field in schema.large_fields.items() if field.kind == "tensor" and field.codec is None]
    codecs = choose_codecs(source, names) if codec == "auto" else dict.fromkeys(names, codec)
    changed = {name: schema.fields[name].model_copy(update={"codec": chosen}) for name, chosen in codecs.items()}
    return schema.model_copy(update={"fields": schema.fields | changed})


def choose_codecs(source: Source, names: Sequence[str]) -> dict[str, Codec | None]:
    """For each of these `tensor` fields the codec that suits a few records spread over the source."""
    trials = {name: CodecTrial(source.schema.fields[name]) for name in names}
    rooms: dict[str, memoryview] = {}

    def room(name: str, nbytes: int) -> memoryview:
        rooms[name] = memoryview(bytearray(nbytes))
        return rooms[name]

    count = len(source.nbytes)
    tried = np.unique(np.linspace(0, count - 1, TRIED_RECORDS).astype(np.int64)) if count and names else np.arange(0)
    for number in tried:  # one by one: what is refused is none of them
        for read in source.part(np.array([number])).read(room):
            for name, trial in trials.items():
                if isinstance(read, SourceRecord):
                    trial.add(rooms[name] if name in rooms else row_bytes(to_rows(trial.field, read.values[name])))
        rooms.clear()
    return {name: trial.choice() for name, trial in trials.items()}


def _refusal(source: Source, bad: list[RefusedRecord]) -> SourceError:
    listed = "".join(f"\n  {refused.name}: {refused.reason}" for refused in bad[:_LISTED_REFUSED])
    more = f"\n  ... and {len(bad) - _LISTED_REFUSED} more" if len(bad) > _LISTED_REFUSED else ""
    what = "1 thing in it is no record" if len(bad) == 1 else f"{len(bad)} things in it are no records"
    return SourceError(
        f"{source.name}: {what}: mend or remove them, or pass --skip-bad to leave them out{listed}{more}"
    )


def _run_tasks(
    tasks: Iterator[ShardTask],
    record_bytes: NDArray[np.int64],
    executor: ShardExecutor,
    on_progress: Callable[[Progress], None],
) -> list[ShardResult]:
    """The results of all tasks, in shard order. Tasks are made when the executor takes them."""
    total_records, total_bytes = len(record_bytes), int(record_bytes.sum())
    results: list[ShardResult] = []
    records = nbytes = reused = 0
    pending: set[Future[ShardResult]] = set()
    while True:
        pending |= {executor.submit(task) for task in islice(tasks, executor.capacity - len(pending))}
        if not pending:
            return sorted(results, key=lambda result: result.plan.number)
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for result in map(result_of, done):
            first, count = result.plan.first, result.plan.records
            records += count
            nbytes += int(record_bytes[first : first + count].sum())
            reused += result.reused
            results.append(result)
            on_progress(Progress(records, total_records, nbytes, total_bytes, reused))


@contextmanager
def _os_errors_as_sentences(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise destination_error(error, "writing", target) from error


@contextmanager
def signals_as_errors(target: Path) -> Iterator[None]:
    """Inside, in the main thread, SIGTERM and SIGINT raise InterruptedRunError: the conversion into `target` can resume."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise InterruptedRunError(
            f"stopped by {name}: finished shards of {target} are kept, the same command again resumes"
        )

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
