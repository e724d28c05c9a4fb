"""A process that is forked has the locks of its parent, perhaps held by threads that it has not: what it makes anew."""

import os
import weakref
from functools import cache
from typing import Protocol


class Renewable(Protocol):
    """What has locks or threads."""

    def renew(self) -> None:
        """Have locks that nobody holds, and no threads."""


_things: "weakref.WeakSet[Renewable]" = weakref.WeakSet()


def renew_in_forks(thing: Renewable) -> None:
    """In a process forked from now on, `thing.renew()` is called before anything else is done with it."""
    _register()
    _things.add(thing)


@cache
def _register() -> None:
    os.register_at_fork(after_in_child=_renew_all)


def _renew_all() -> None:
    for thing in list(_things):
        thing.renew()
