"""Printing for people: bars with rate and time left on a terminal, plain lines in a job log, sentences for errors."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_LOG_INTERVAL_SECONDS = 10.0


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


@contextmanager
def progress_bytes(description: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is; yields a function to call with (bytes done, bytes in all) as often as wanted."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar(description) as update:
            yield update
    else:
        yield _PlainProgress(description)


@contextmanager
def _bar(description: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _PlainProgress:
    """A line now and then, and one when it is done."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        finished = done >= total
        if not finished and now - self._last < _LOG_INTERVAL_SECONDS:
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        left = (
            f"done in {seconds_text(now - self._start)}"
            if finished
            else f"{seconds_text((total - done) / max(rate, 1))} left"
        )
        share = 100 * done / total if total else 100
        line = f"{self._description}: {share:.0f} % of {bytes_text(total)}, {bytes_text(rate)}/s, {left}"
        print(line, file=sys.stderr, flush=True)
