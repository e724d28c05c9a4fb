"""Where the `stagein` command starts: what must be done before anything heavy is imported, which takes long.

Signals that ask it to stop are noted, or end it in one sentence, and what worker processes are forked from starts to import what
they need, beside us.
"""

import gc
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from stagein.stop_signals import StopSignals

_RESUMABLE = ("stage", "train")
"""Commands that SIGTERM and SIGUSR1 stop in good order, however early they come: job scripts send them before the time limit."""
_NO_WORK = {"--help", "-h", "--dry-run"}
_ONE_WORKER = re.compile(r"--workers[ =]0*1( |$)")
_OBJECTS_BETWEEN_COLLECTIONS = 50_000
_MOMENT_SECONDS = 1e-3


class _StoppedError(BaseException):
    """A signal came that nobody below hears in a way of its own."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


def main() -> None:
    """Entry point of the `stagein` command."""
    _open_closed_streams()
    _on_signals(_stop)
    sys.unraisablehook = _stop_later
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale that lacks a character is no reason to fail
    try:
        _run_with_little_garbage()
    except _StoppedError as stopped:
        _on_signals(signal.SIG_DFL)  # one more is one too many
        # light modules only: others may be in the middle of their import, which cannot be begun anew
        from stagein.formats.errors import ExitCode
        from stagein.launchers import started_by_mpi

        if started_by_mpi():  # the launcher ends all ranks so, and speaks for them
            signal.raise_signal(stopped.number)
        print(f"stagein: stopped by {stopped.number.name}: run the same command again", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)


def _open_closed_streams() -> None:
    """Lead standard streams that came closed to nowhere: a file of ours would get such a number, and what libraries print."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
            setattr(sys, name, os.fdopen(number, mode))


def _on_signals(handler: signal.Handlers | Callable[[int, FrameType | None], NoReturn]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise _StoppedError(signal.Signals(number))


def _stop_later(dropped: "sys.UnraisableHookArgs") -> None:
    """Python drops what is raised in a callback of a weak reference, of which imports have many: it is raised again behind that."""
    if not isinstance(dropped.exc_value, _StoppedError):
        sys.__unraisablehook__(dropped)
        return
    number = dropped.exc_value.number
    signal.signal(signal.SIGALRM, lambda *_: _stop(number, None))
    signal.setitimer(signal.ITIMER_REAL, _MOMENT_SECONDS)


def _run_with_little_garbage() -> None:
    if sys.argv[1:2] == ["train"]:  # for hours: garbage of its user's code is collected as that expects it
        _run_command()
        return
    # What is imported stays: to look through it for garbage again and again, and at the end, is a quarter of a short command.
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        _run_command()
    finally:
        gc.freeze()


def _run_command() -> None:
    if _has_workers(sys.argv[1:]):
        from stagein.formats import worker_server

        worker_server.start()
        try:
            _run()
        finally:
            worker_server.stop()
    elif sys.argv[1:2] and sys.argv[1] in _RESUMABLE:
        with StopSignals() as signals:
            _run()
            if signals.received:  # what was asked for is done, but whoever sent the signal counts on being heard
                from stagein.formats.errors import ExitCode

                sys.exit(ExitCode.INTERRUPTED)
    else:
        _run()


def _has_workers(arguments: Sequence[str]) -> bool:
    """Whether this command will have work for processes beside it, as far as its arguments say."""
    if arguments[:1] != ["convert"] or not arguments[2:] or _NO_WORK.intersection(arguments):
        return False
    asked = " ".join(arguments)
    return not _ONE_WORKER.search(asked) and ("--workers" in asked or len(os.sched_getaffinity(0)) > 1)


def _run() -> None:
    """Run the command; returns when it has succeeded."""
    from .cli import main

    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    main()
