"""`stagein verify`: read a whole data set, or its staged copies on the nodes of a job, and check every sum."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from stagein.cache import READY_NAME, expand_node
from stagein.formats.errors import ChecksumError, UsageError
from stagein.formats.repair import repair
from stagein.formats.verification import verify
from stagein.healing import DEFAULT_THREADS, CopyReport, StagedCopies
from stagein.world import Communicator, connect

from .console import bytes_text, count_text, progress_bytes, say, say_json, seconds_text
from .convert import usable_cores

_LISTED_FILES = 5


def run(path: Path, *, workers: int | None, repairs: bool, good: Path | None, as_json: bool) -> None:
    """Verify the data set at `path` and say what is wrong; with `repairs` mend it first, from the copy at `good`.

    A staged copy is verified on every node of the job, and mended without `good` too: from other nodes and its source.
    Raises ChecksumError or SourceError when something is, and stays, wrong.
    """
    communicator = connect()
    copy = expand_node(str(path), communicator.world.node_name)
    is_staged = os.path.exists(copy / READY_NAME)  # noqa: PTH110  # no, where it may not be looked at
    if any(communicator.gather_all(is_staged)):
        _verify_staged(copy, communicator, workers or DEFAULT_THREADS, repairs, good, as_json)
    elif communicator.world.rank == 0:
        if repairs and good is None:
            raise UsageError(
                f"{path} is no staged copy, whose source is known: say where a good copy is, --from ANOTHER_COPY"
            )
        _verify_dataset(path, workers or usable_cores(), good, as_json)


def _verify_dataset(path: Path, workers: int, good: Path | None, as_json: bool) -> None:
    if good is not None:
        repaired = repair(path, good)
        if not as_json:
            say(f"{path}: {len(repaired.files)} files made again, {repaired.chunks} chunks taken from {good}")
            for file in repaired.files:
                say(f"  {file}")
    start = time.monotonic()
    with progress_bytes("verifying", quiet=as_json) as update:
        report = verify(path, workers=workers, on_progress=update)
    seconds = time.monotonic() - start
    if as_json:
        problems = [
            {"file": problem.file, "problem": problem.text, "damage": problem.damage} for problem in report.problems
        ]
        summary = {"path": str(path), "id": report.manifest.id, "files": report.files, "nbytes": report.nbytes}
        say_json(summary | {"sums": report.sums, "seconds": round(seconds, 3), "problems": problems})
    if error := report.error(path):
        raise error
    if not as_json:
        say(
            f"{path}: all is well: {report.files} files, {bytes_text(report.nbytes)}, {report.sums:,} sums, "
            f"in {seconds_text(seconds)} ({bytes_text(report.nbytes / seconds)}/s)"
        )


def _verify_staged(
    path: Path, communicator: Communicator, workers: int, repairs: bool, good: Path | None, as_json: bool
) -> None:
    prints = communicator.world.rank == 0
    start = time.monotonic()
    copies = StagedCopies(path, communicator)
    with progress_bytes("verifying", quiet=as_json) if prints else contextlib.nullcontext() as update:
        reports = copies.verify(update, workers)
    damaged = any(report.damaged_files for report in reports)
    if damaged and repairs:
        reports = copies.heal(good)
    seconds = time.monotonic() - start
    if prints:
        if as_json:
            say_json({"seconds": round(seconds, 3), "nodes": [asdict(report) for report in reports]})
        else:
            _print_reports(reports, healed=repairs, seconds=seconds)
    with communicator.together():
        if damaged and not repairs and prints:
            raise ChecksumError(
                f"{path} is damaged on {_listed([report.node for report in reports if report.damaged_files])}: the same command "
                "with --repair mends it from other nodes or the source"
            )


def _print_reports(reports: Sequence[CopyReport], *, healed: bool, seconds: float) -> None:
    whole = [report for report in reports if not report.damaged_files]
    if whole:
        nbytes = sum(report.nbytes for report in whole)
        nodes = _listed([report.node for report in whole])
        say(f"{nodes}: all is well: {bytes_text(nbytes)} in {seconds_text(seconds)} ({bytes_text(nbytes / seconds)}/s)")
    for report in reports:
        if report.damaged_files:
            what = f"{count_text(report.damaged_chunks, 'chunk')} damaged or missing in {_listed(report.damaged_files)}"
            mended = f"; mended from {_listed(report.healed_from)}" if healed else ""
            say(f"{report.node} {report.path}: {what}{mended}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED_FILES} more" if len(names) > _LISTED_FILES else ""
    return ", ".join(names[:_LISTED_FILES]) + more
