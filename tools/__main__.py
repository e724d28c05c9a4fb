"""Where the `stagein` command starts: what must be done before anything heavy is imported, which takes long.

Signals that ask it to stop are noted, and what worker processes are forked from starts to import what they need, beside us.
"""

import gc
import os
import re
import sys
from collections.abc import Sequence

from stagein.stop_signals import StopSignals

_RESUMABLE = ("stage", "train")
"""Commands that a signal stops in good order, however early it comes: job scripts send it before the time limit."""
_NO_WORK = {"--help", "-h", "--dry-run"}
_ONE_WORKER = re.compile(r"--workers[ =]0*1( |$)")
_OBJECTS_BETWEEN_COLLECTIONS = 50_000


def main() -> None:
    """Entry point of the `stagein` command."""
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
