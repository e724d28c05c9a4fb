"""Where the `stagein` command starts: what must be done before anything heavy is imported, which takes long.

Signals that ask it to stop are noted, and what worker processes are forked from starts to import what they need, beside us.
"""

import sys

from stagein.stop_signals import StopSignals

_RESUMABLE = ("stage", "train")
"""Commands that a signal stops in good order, however early it comes: job scripts send it before the time limit."""
_NO_WORK = {"--help", "-h", "--dry-run"}


def main() -> None:
    """Entry point of the `stagein` command."""
    if sys.argv[1:2] == ["convert"] and sys.argv[3:] and not _NO_WORK.intersection(sys.argv):
        from stagein.formats import worker_server

        worker_server.start()
    if sys.argv[1:2] and sys.argv[1] in _RESUMABLE:
        with StopSignals() as signals:
            _run()
            if signals.received:  # what was asked for is done, but whoever sent the signal counts on being heard
                from stagein.formats.errors import ExitCode

                sys.exit(ExitCode.INTERRUPTED)
    else:
        _run()


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
