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

import numpy as np
from numpy.typing import NDArray

from .assembly import FinishedShard, GrowingDataset, fingerprint, journal_shard, resume_shard
from .checksums import crc32c, pread_exactly
from .errors import InterruptedRunError, SourceError, StageinError, destination_error
from .images import BadImageError, read_header
from .manifest import DEFAULT_CHUNK_BYTES, Container, Manifest, Source
from .shards import (
    DEFAULT_SHARD_BYTES,
    PayloadBuffer,
    ShardContent,
    ShardLayout,
    ShardPlan,
    encoded_capacity,
    plan_encoded_shards,
    refuse_large_record,
    write_shard,
)
from .sources import FilePlan

_LISTED_BAD_FILES = 20


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
    skipped: tuple[tuple[str, str], ...]
    reused_shards: int


@dataclass(frozen=True)
class _ShardTask:
    """Everything a worker process needs to make one shard."""

    plan: ShardPlan
    root: Path
    paths: tuple[str, ...]
    nbytes: tuple[int, ...]
    mtime_ns: tuple[int, ...]
    labels: tuple[int, ...]
    layout: ShardLayout
    folder: Path
    skip_bad: bool

    def fingerprint(self) -> str:
        layout = (
            self.layout.schema.model_dump(mode="json"),
            self.layout.container,
            self.layout.capacity,
            self.layout.chunk_bytes,
        )
        return fingerprint(str(self.root), self.paths, self.nbytes, self.mtime_ns, self.labels, layout, self.skip_bad)


@dataclass(frozen=True)
class _ShardResult:
    number: int
    shard: FinishedShard | None
    reused: bool
    bad: tuple[tuple[str, str], ...] = ()


def convert(
    plan: FilePlan,
    target: Path,
    *,
    container: Container = "hdf5+zarr",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Converted:
    """Pack the records of `plan` into the data set `target`, with `workers` processes (1: this one).

    Killed at any point, the same call again keeps the finished shards. Files that are no complete images are all listed
    in a SourceError at the end, or left out and written to skipped.tsv when `skip_bad` is set. Other errors: UsageError
    (target exists, another process writes it), SourceError (a file changed or cannot be read), NoSpaceError,
    InterruptedRunError (SIGTERM, SIGINT).
    """
    if plan.refused and not skip_bad:
        raise _bad_files_error(plan.root, list(plan.refused))
    for path, nbytes in zip(plan.paths, plan.nbytes, strict=True):
        refuse_large_record(int(nbytes), path)
    shard_plans = plan_encoded_shards(plan.nbytes, shard_bytes)
    layout = ShardLayout(plan.schema, container, encoded_capacity(shard_plans, shard_bytes), chunk_bytes)
    with _os_errors_as_sentences(target):
        growing = GrowingDataset(target, overwrite=overwrite)
    try:
        tasks = [_make_task(plan, shard_plan, layout, growing.folder, skip_bad) for shard_plan in shard_plans]
        with _os_errors_as_sentences(target), _signals_as_errors(target):
            results = _run_tasks(tasks, plan, min(workers, max(1, len(tasks))), on_progress)
            bad = [file for result in results for file in result.bad]
            if bad:
                raise _bad_files_error(plan.root, bad)
            shards = [result.shard for result in results if result.shard is not None]
            source = Source(
                kind=plan.kind, records_sha256=fingerprint(plan.paths, plan.nbytes.tolist(), plan.labels.tolist())
            )
            shards[:1] = [_with_skipped(shard, plan.refused) for shard in shards[:1]]
            manifest = growing.publish(layout, shards, source)
    finally:
        growing.close()
    skipped = tuple(file for shard in shards for file in shard.skipped)
    return Converted(manifest, skipped, sum(result.reused for result in results))


def _with_skipped(shard: FinishedShard, refused: tuple[tuple[str, str], ...]) -> FinishedShard:
    return FinishedShard(
        shard.entry,
        shard.payload_bytes,
        shard.offset,
        shard.nbytes,
        shard.crc32c,
        shard.columns,
        (*refused, *shard.skipped),
    )


def _bad_files_error(root: Path, bad: list[tuple[str, str]]) -> SourceError:
    listed = "".join(f"\n  {path}: {reason}" for path, reason in bad[:_LISTED_BAD_FILES])
    more = f"\n  … and {len(bad) - _LISTED_BAD_FILES} more" if len(bad) > _LISTED_BAD_FILES else ""
    files = "file is no complete image" if len(bad) == 1 else "files are no complete images"
    return SourceError(
        f"{len(bad)} {files} below {root}: mend or remove them, or pass --skip-bad to leave them out{listed}{more}"
    )


def _make_task(plan: FilePlan, shard: ShardPlan, layout: ShardLayout, folder: Path, skip_bad: bool) -> _ShardTask:
    mine = slice(shard.first, shard.first + shard.records)
    return _ShardTask(
        shard,
        plan.root,
        plan.paths[mine],
        tuple(plan.nbytes[mine].tolist()),
        tuple(plan.mtime_ns[mine].tolist()),
        tuple(plan.labels[mine].tolist()),
        layout,
        folder,
        skip_bad,
    )


def _run_tasks(
    tasks: list[_ShardTask], plan: FilePlan, workers: int, on_progress: Callable[[Progress], None]
) -> list[_ShardResult]:
    """The results of all tasks, in shard order."""
    total_records, total_bytes = len(plan.paths), int(plan.nbytes.sum())
    results: list[_ShardResult] = []
    records = nbytes = 0
    for result in _run_here(tasks) if workers == 1 else _run_in_pool(tasks, workers):
        task = tasks[result.number]
        records, nbytes = records + len(task.paths), nbytes + sum(task.nbytes)
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
    payload = buffer.view(task.plan.payload_bytes)
    content, bad = _read_files(task, payload)
    if bad and not task.skip_bad:
        return _ShardResult(number, None, reused=False, bad=bad)
    entry = write_shard(task.folder, number, task.plan.first, content, task.layout)
    absolute = content.offset + np.uint64(entry.data_offset)
    shard = FinishedShard(entry, len(payload), absolute, content.nbytes, content.crc32c, dict(content.columns), bad)
    journal_shard(task.folder, number, mark, shard)
    return _ShardResult(number, shard, reused=False)


def _read_files(task: _ShardTask, payload: memoryview) -> tuple[ShardContent, tuple[tuple[str, str], ...]]:
    """Read the files of a shard to their places in `payload`; returns what is there and the files that are no images."""
    root = os.open(task.root, os.O_RDONLY | os.O_DIRECTORY)
    offsets, sizes, sums, labels, image_sizes = [], [], [], [], []
    bad: list[tuple[str, str]] = []
    position = 0
    try:
        for path, nbytes, label in zip(task.paths, task.nbytes, task.labels, strict=True):
            room = payload[position : position + nbytes]
            _read_whole_file(root, path, room, task.root)
            try:
                header = read_header(room)
            except BadImageError as error:
                bad.append((path, str(error)))
                continue
            offsets.append(position)
            sizes.append(nbytes)
            sums.append(crc32c(room))
            labels.append(label)
            image_sizes.append((header.height, header.width))
            position += nbytes
    finally:
        os.close(root)
    payload[position:] = bytes(len(payload) - position)
    columns: dict[str, NDArray[np.generic]] = {
        "label": np.array(labels, np.int64),
        "hw": np.array(image_sizes, np.int32).reshape(-1, 2),
    }
    content = ShardContent(
        payload, np.array(offsets, np.uint64), np.array(sizes, np.uint32), np.array(sums, np.uint32), columns
    )
    return content, tuple(bad)


def _read_whole_file(root: int, path: str, room: memoryview, root_path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
        try:
            got = pread_exactly(descriptor, room, 0)
            grown = os.pread(descriptor, 1, len(room))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SourceError(f"{root_path / path} cannot be read: {error.strerror}") from None
    if got != len(room) or grown:
        raise SourceError(
            f"{root_path / path} changed its size while it was converted: run the same command again when it is at rest"
        )


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
