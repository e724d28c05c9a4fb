"""Conversion: the shards of a plan, made by several processes, resumable, byte-identical however many there are."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .assembly import FinishedShard, GrowingDataset, fingerprint, finish_shard, journal_shard, resume_shard
from .codecs import WORTHWHILE_RATIO, Codec
from .errors import InterruptedRunError, SourceError, StageinError, destination_error
from .manifest import DEFAULT_CHUNK_BYTES, Container, Manifest, Origin
from .schema import Schema
from .shards import (
    DEFAULT_SHARD_BYTES,
    PayloadBuffer,
    ShardBuilder,
    ShardLayout,
    ShardPlan,
    plan_shards,
    refuse_codec,
    refuse_large_record,
)
from .sources import RefusedRecord, Source, SourcePart, SourceRecord

_LISTED_REFUSED = 20
_TRIED_RECORDS = 32


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


@dataclass(frozen=True)
class _ShardTask:
    """Everything a worker process needs to make one shard."""

    plan: ShardPlan
    part: SourcePart
    layout: ShardLayout
    folder: Path
    skip_bad: bool

    def fingerprint(self) -> str:
        layout = self.layout
        schema = layout.schema.model_dump(mode="json")
        return fingerprint(
            self.part.mark(), schema, layout.container, layout.capacity, layout.chunk_bytes, self.skip_bad
        )


@dataclass(frozen=True)
class _ShardResult:
    number: int
    shard: FinishedShard | None
    reused: bool
    bad: tuple[RefusedRecord, ...] = ()


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

    `codec` compresses the records of a `tensor` primary field; "auto" tries some on a few records and takes what is
    worthwhile. Records of an `encoded` field are stored as they are.

    Killed at any point, the same call again keeps the finished shards. What cannot be a record is listed in a
    SourceError at the end, or left out and written to skipped.tsv when `skip_bad` is set. Other errors: UsageError
    (target exists, another process writes it), SourceError (something changed or cannot be read), NoSpaceError,
    InterruptedRunError (SIGTERM, SIGINT).
    """
    if source.refused and not skip_bad:
        raise _refusal(source, list(source.refused))
    for record, nbytes in enumerate(source.nbytes.tolist()):
        refuse_large_record(nbytes, f"record {record} of {source.name}")
    schema = with_codec(source.schema, choose_codec(source) if codec == "auto" else codec)
    refuse_codec(schema, container)
    shard_plans, capacity = plan_shards(schema, source.nbytes, shard_bytes)
    layout = ShardLayout(schema, container, capacity, chunk_bytes)
    with _os_errors_as_sentences(target):
        growing = GrowingDataset(target, overwrite=overwrite)
    try:
        with _os_errors_as_sentences(target), _signals_as_errors(target):
            tasks = [
                _ShardTask(
                    plan,
                    source.part(np.arange(plan.first, plan.first + plan.records)),
                    layout,
                    growing.folder,
                    skip_bad,
                )
                for plan in shard_plans
            ]
            results = _run_tasks(tasks, source.nbytes, min(workers, max(1, len(tasks))), on_progress)
            bad = [refused for result in results for refused in result.bad]
            if bad:
                raise _refusal(source, bad)
            shards = [result.shard for result in results if result.shard is not None]
            skipped = (*source.refused, *(refused for shard in shards for refused in shard.skipped))
            origin = Origin(kind=source.kind, records_sha256=fingerprint(source.identity()))
            manifest = growing.publish(layout, shards, origin, skipped)
    finally:
        growing.close()
    return Converted(manifest, skipped, sum(result.reused for result in results))


def with_codec(schema: Schema, codec: Codec | None) -> Schema:
    """The schema with its primary field compressed by `codec`, where it is a tensor field."""
    field = schema.primary_field
    if codec is None or field.kind != "tensor":
        return schema
    compressed = field.model_copy(update={"codec": codec})
    return schema.model_copy(update={"fields": {**schema.fields, schema.primary: compressed}})


def choose_codec(source: Source) -> Codec | None:
    """The Blosc shuffle that compresses a few records spread over the source best, None when none is worthwhile."""
    field, count = source.schema.primary_field, len(source.nbytes)
    if field.kind != "tensor" or not count:
        return None
    candidates = [Codec(name="blosc-lz4", shuffle="byte"), Codec(name="blosc-lz4", shuffle="bit")]
    stored_bytes = [0] * len(candidates)
    record = memoryview(bytearray(field.record_bytes))
    tried_bytes = 0
    for number in np.unique(np.linspace(0, count - 1, _TRIED_RECORDS).astype(int)).tolist():
        for read in source.part(np.array([number])).read(lambda nbytes: record):
            if isinstance(read, SourceRecord):
                tried_bytes += read.nbytes
                for place, codec in enumerate(candidates):
                    stored_bytes[place] += len(codec.encode(record, field.stored_dtype.itemsize))
    best = min(range(len(candidates)), key=stored_bytes.__getitem__)
    worthwhile = tried_bytes >= WORTHWHILE_RATIO * max(stored_bytes[best], 1)
    return candidates[best] if worthwhile else None


def _refusal(source: Source, bad: list[RefusedRecord]) -> SourceError:
    listed = "".join(f"\n  {refused.name}: {refused.reason}" for refused in bad[:_LISTED_REFUSED])
    more = f"\n  … and {len(bad) - _LISTED_REFUSED} more" if len(bad) > _LISTED_REFUSED else ""
    what = "1 thing in it is no record" if len(bad) == 1 else f"{len(bad)} things in it are no records"
    return SourceError(
        f"{source.name}: {what}: mend or remove them, or pass --skip-bad to leave them out{listed}{more}"
    )


def _run_tasks(
    tasks: list[_ShardTask], record_bytes: NDArray[np.int64], workers: int, on_progress: Callable[[Progress], None]
) -> list[_ShardResult]:
    """The results of all tasks, in shard order."""
    total_records, total_bytes = len(record_bytes), int(record_bytes.sum())
    results: list[_ShardResult] = []
    records = nbytes = 0
    for result in _run_here(tasks) if workers == 1 else _run_in_pool(tasks, workers):
        task = tasks[result.number]
        records += task.plan.records
        nbytes += int(record_bytes[task.plan.first : task.plan.first + task.plan.records].sum())
        results.append(result)
        on_progress(Progress(records, total_records, nbytes, total_bytes, sum(each.reused for each in results)))
    return sorted(results, key=lambda result: result.number)


def _run_here(tasks: list[_ShardTask]) -> Iterator[_ShardResult]:
    buffer = PayloadBuffer()
    return (_make_shard(task, buffer) for task in tasks)


def _run_in_pool(tasks: list[_ShardTask], workers: int) -> Iterator[_ShardResult]:
    """Results as they come, from worker processes that end when this one does, however it ends."""
    context = multiprocessing.get_context("forkserver")  # never fork a process that may have threads or MPI
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        pending: set[Future[_ShardResult]] = {pool.submit(_make_shard_in_worker, task) for task in tasks}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise StageinError(
            "a worker process was killed (out of memory?): run the same command again, it resumes"
        ) from None
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


_worker_buffer: PayloadBuffer


def _start_worker() -> None:
    global _worker_buffer
    _worker_buffer = PayloadBuffer()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _make_shard_in_worker(task: _ShardTask) -> _ShardResult:
    return _make_shard(task, _worker_buffer)


def _make_shard(task: _ShardTask, buffer: PayloadBuffer) -> _ShardResult:
    """Make one shard, or find it finished by an earlier attempt."""
    number, mark = task.plan.number, task.fingerprint()
    finished = resume_shard(task.folder, number, mark, task.layout.chunk_bytes)
    if finished is not None:
        return _ShardResult(number, finished, reused=True)
    builder = ShardBuilder(task.layout, buffer, task.plan.records, task.plan.payload_bytes)
    bad: list[RefusedRecord] = []
    for record in task.part.read(builder.room):
        if isinstance(record, RefusedRecord):
            bad.append(record)
        else:
            builder.add(record.nbytes, record.columns)
    if bad and not task.skip_bad:
        return _ShardResult(number, None, reused=False, bad=tuple(bad))
    shard = finish_shard(task.folder, number, task.plan.first, builder.content(), task.layout, tuple(bad))
    journal_shard(task.folder, number, mark, shard)
    return _ShardResult(number, shard, reused=False)


@contextmanager
def _os_errors_as_sentences(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise destination_error(error, "writing", target) from error


@contextmanager
def _signals_as_errors(target: Path) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise InterruptedRunError in the main thread."""
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
