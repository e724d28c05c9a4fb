"""The process that worker processes are forked from: clean, without threads or MPI, and with all that they need in memory.

It takes a third of a second to be ready. Whoever will have work starts it first of all: it gets ready on another core, while this
process imports and finds out what there is to do. It ends with this process.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

_END_SECONDS = 10
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


def stop() -> None:
    """End it, if it is running and has no more workers: at once, though it be busy with imports that nobody needs any more."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined, unused-ignore]
    if server._forkserver_pid is None:
        return
    with open(os.pidfd_open(server._forkserver_pid), "rb", buffering=0) as process:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        if multiprocessing.connection.wait([process.fileno()], _END_SECONDS):
            server._stop()


def worker_context() -> BaseContext:
    """How processes are made that are forked from it."""
    return multiprocessing.get_context("forkserver")
