"""Signals that ask a process to stop, noted until it can stop in good order. Light: it is imported before anything that is not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems send before they kill: Slurm's `--signal=USR1@120` says two minutes before the end."""


class StopSignals:
    """While the block runs, a signal sets `received` in place of ending the process.

    Blocks nest: an inner one knows of a signal that came before it, and the outer one of all that came. In another thread
    than the main one, which alone gets signals, a block changes nothing.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self.received: str | None = None
        """The name of the signal that came, such as "SIGTERM"."""
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._before[number] = signal.signal(number, self._note)
            for outer in self._outer():
                self.received = self.received or outer.received
        return self

    def __exit__(self, *_: object) -> None:
        for outer in self._outer():
            outer.received = outer.received or self.received
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _outer(self) -> set[StopSignals]:
        handlers = (getattr(handler, "__self__", None) for handler in self._before.values())
        return {owner for owner in handlers if isinstance(owner, StopSignals)}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
