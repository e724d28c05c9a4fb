"""Printing for people: bars with rate and time left on a terminal, plain lines in a job log, sentences for errors."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stagein.formats.errors import destination_error

if TYPE_CHECKING:
    from rich.table import Table

_LOG_INTERVAL_SECONDS = 5.0
_RATE_SECONDS = 60.0
"""The time left follows from the last minute: what an earlier run had finished goes by much faster than the rest."""
_LISTED = "\n  "
"""How a message begins each line of a list in it."""
_UNDECODABLE = range(0xDC80, 0xDD00)
"""What Python reads the bytes of a name as that are no UTF-8 (PEP 383)."""


def say(text: str) -> None:
    """One plain line on standard output, at once even when it goes to a file. Raises StageinError when that is full."""
    _print(printable(text))


def say_json(content: Mapping[str, Any]) -> None:
    """One JSON object in a line of ASCII on standard output, for programs. Raises StageinError when that is full."""
    _print(json.dumps(content))


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # or Python fails once more on what is left to write, when it ends
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        raise destination_error(error, "writing", "to standard output") from None


def complain(text: str) -> None:
    """One message on standard error, as every command words its errors."""
    print(f"stagein: {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with what is not printable in it escaped, as `\\n` and `\\x1b`: names of files may hold anything, and would break a
    line, move the cursor of a terminal or change its colours. Only line breaks before lists stay."""
    if text.isprintable():
        return text
    return _LISTED.join("".join(map(_escaped, line)) for line in text.split(_LISTED))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if ord(character) in _UNDECODABLE:
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


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
    """A Rich table, as wide as it needs to be where there is no terminal to fit. Brackets in its cells are no markup."""
    from rich.console import Console

    from stagein.launchers import started_by_mpi

    on_terminal = (
        sys.stdout.isatty() and not started_by_mpi()
    )  # mpirun gives its ranks a terminal, whatever it writes to
    width, force_terminal = (None, None) if on_terminal else (110, False)
    Console(width=width, force_terminal=force_terminal, markup=False, emoji=False).print(table)


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
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(*columns, console=Console(stderr=True), expand=True)
    task = progress.add_task(printable(description), total=None, note="")

    def show(done: int, total: int, note: str = "") -> None:
        progress.update(task, completed=done, total=total, note=note)
        progress.start()  # not before: what fails at once has no bar

    try:
        yield show
    finally:
        progress.stop()


class _PlainProgress:
    """A line now and then, and one when it is done."""

    def __init__(self, description: str) -> None:
        self._description = printable(description)
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
