"""Printing for people: bars with rate and time left on a terminal, plain lines in a job log, sentences for errors."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.table import Table

_LOG_INTERVAL_SECONDS = 5.0
_RATE_SECONDS = 60.0
"""The time left follows from the last minute: what an earlier run had finished goes by much faster than the rest."""


def say(text: str) -> None:
    """One plain line on standard output, at once even when it goes to a file."""
    print(text, flush=True)


def complain(text: str) -> None:
    """One message on standard error, as every command words its errors."""
    print(f"stagein: {text}", file=sys.stderr, flush=True)


def bytes_text(nbytes: float) -> str:
    """A size for people: 1.1 GB, 20.4 MB, 512 B (powers of 1000, as disks and networks are sold)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(nbytes) < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError("unreachable")


def count_text(count: int, noun: str) -> str:
    """A number of things: 1 shard, 1,200 shards."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def seconds_text(seconds: float) -> str:
    """A duration for people: 0.8 s, 12 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def print_table(table: "Table") -> None:
    """A Rich table, as wide as it needs to be where there is no terminal to fit."""
    from rich.console import Console

    from stagein.world import started_by_mpi

    on_terminal = (
        sys.stdout.isatty() and not started_by_mpi()
    )  # mpirun gives its ranks a terminal, whatever it writes to
    (Console() if on_terminal else Console(width=110, force_terminal=False)).print(table)


class ShowProgress(Protocol):
    """Shows how far something is: bytes done, bytes in all, and whatever else is worth saying."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def progress_bytes(description: str, *, quiet: bool = False) -> Iterator[ShowProgress]:
    """Show how far something is; yields a function to call as often as wanted."""
    if quiet:
        yield lambda done, total, note="": None
    elif sys.stderr.isatty():
        with _bar(description) as show:
            yield show
    else:
        yield _PlainProgress(description)


@contextmanager
def _bar(description: str) -> Iterator[ShowProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(*columns, console=Console(stderr=True), expand=True)
    task = progress.add_task(description, total=None, note="")

    def show(done: int, total: int, note: str = "") -> None:
        progress.start()  # not before: what fails at once has no bar
        progress.update(task, completed=done, total=total, note=note)

    try:
        yield show
    finally:
        progress.stop()


class _PlainProgress:
    """A line now and then, and one when it is done."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._start = self._last = time.monotonic()
        self._recent = deque([(self._start, 0)])

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        finished = done >= total
        if not finished and now - self._last < _LOG_INTERVAL_SECONDS:
            return
        self._last = now
        then, done_then = (self._start, 0) if finished else self._recent[0]
        rate = (done - done_then) / max(now - then, 1e-9)
        self._recent.append((now, done))
        if now - then > _RATE_SECONDS:
            self._recent.popleft()
        left = (
            f"done in {seconds_text(now - self._start)}"
            if finished
            else f"{seconds_text((total - done) / max(rate, 1))} left"
        )
        share = 100 * done / total if total else 100
        parts = [f"{share:.0f} % of {bytes_text(total)}", f"{bytes_text(rate)}/s", note, left]
        print(f"{self._description}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)
