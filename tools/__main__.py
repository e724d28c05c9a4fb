"""Where the `stagein` command starts. Signals that ask it to stop are noted before anything heavy is imported, which takes seconds."""

import sys

from stagein.stop_signals import StopSignals

_RESUMABLE = ("stage", "train")
"""Commands that a signal stops in good order, however early it comes: job scripts send it before the time limit."""


def main() -> None:
    """Entry point of the `stagein` command."""
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
