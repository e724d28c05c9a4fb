"""DALI in a process that is forked: the child has the pipelines of its parent, but not their threads."""

import ctypes
import os
import weakref
from functools import cache
from typing import Any

_pipelines: "weakref.WeakSet[Any]" = weakref.WeakSet()


def leave_to_parent(pipeline: Any) -> None:
    """In a process forked from now on, `pipeline` is never ended: that would wait for threads that are not there."""
    _register()
    _pipelines.add(pipeline)


@cache
def _register() -> None:
    os.register_at_fork(after_in_child=_keep_for_ever)


def _keep_for_ever() -> None:
    for pipeline in list(_pipelines):
        type(pipeline)._pipes.clear()  # DALI's own list of what to end when the interpreter exits
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline))
