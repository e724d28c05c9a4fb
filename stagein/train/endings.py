"""How a run ends before its time: an error on one rank, an error that nobody caught. (Of signals knows `stagein.stop_signals`.)"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from stagein.formats.errors import ExitCode, StageinError
from stagein.world import Communicator


class Failures:
    """Errors of what a rank does alone, kept until all ranks can be told: they wait in an allreduce, and would for ever."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._first: Exception | None = None

    def __bool__(self) -> bool:
        return self._first is not None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Run a block; an error in it is kept, the first one only, and the block is left."""
        try:
            yield
        except Exception as error:
            self._first = self._first or error
        except SystemExit as end:  # the user's code ended this rank; the others would wait for it in an allreduce
            self._first = self._first or StageinError(f"the script called sys.exit({end.code!r})")

    def raise_together(self) -> None:
        """Raise what was kept on any rank, on all of them; nothing where nothing was. Collective."""
        first, self._first = self._first, None
        with self._communicator.together():
            if first is not None:
                raise first


def end_job_on_uncaught_error(communicator: Communicator) -> None:
    """From now on an error that ends this process ends all ranks: they would wait for it in an allreduce for ever."""
    if communicator.world.size == 1:
        return
    report = sys.excepthook

    def report_and_abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(kind, error, trace)
        communicator.abort(error.exit_code if isinstance(error, StageinError) else ExitCode.FAILED)

    sys.excepthook = report_and_abort
