"""How a run ends before its time: a signal that asks it to, or an error that nobody caught on one rank."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from stagein.formats.errors import ExitCode, StageinError
from stagein.world import Communicator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems send before they kill: Slurm's `--signal=USR1@120` says two minutes before the end."""


class StopSignals:
    """While the block runs, a stop signal sets `received` in place of ending the process. Main thread only."""

    def __init__(self) -> None:
        self.received: str | None = None
        """The name of the signal that came, such as "SIGTERM"."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def end_job_on_uncaught_error(communicator: Communicator) -> None:
    """From now on an error that ends this process ends all ranks: they would wait for it in an allreduce for ever."""
    if communicator.world.size == 1:
        return
    report = sys.excepthook

    def report_and_abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(kind, error, trace)
        communicator.abort(error.exit_code if isinstance(error, StageinError) else ExitCode.FAILED)

    sys.excepthook = report_and_abort
