"""The process that worker processes are forked from: clean, without threads or MPI, and with all that they need in memory.

It takes most of a second to be ready. Whoever will have work starts it first of all: it gets ready on another core, while this
process imports and finds out what there is to do. It ends with this process.
"""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

_PRELOADED = [f"{__package__}.worker_preload"]


def start() -> None:
    """Start it, if it is not running; returns at once."""
    forkserver.set_forkserver_preload(_PRELOADED)
    resource_tracker.ensure_running()  # with which the server would start it, and which unblocks signals
    # Ctrl-C reaches the whole group, and this process decides: the mask is inherited, and a signal that came meanwhile is not lost.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def worker_context() -> BaseContext:
    """How processes are made that are forked from it."""
    return multiprocessing.get_context("forkserver")
