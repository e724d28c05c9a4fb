"""How far a stage-in is, for people: a bar and a table of nodes on a terminal, a line now and then in a job log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stagein.live import LiveView, NodeProgress, Watch

from .console import bytes_text, printable, seconds_text

if TYPE_CHECKING:
    from rich.console import Group

_LOG_SECONDS = 10.0
_LISTED_NODES = 8


@contextmanager
def show_stage() -> Iterator[Watch]:
    """Yields the function to call with each view of the job."""
    if not sys.stderr.isatty():
        yield _PlainView()
        return
    from rich.console import Console
    from rich.live import Live

    class SteadyConsole(Console):
        """Leaves the cursor as it is: a rank that is killed with the others could not bring it back."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

    with Live(
        console=SteadyConsole(stderr=True, markup=False, emoji=False), auto_refresh=False, transient=True
    ) as live:
        yield lambda view: live.update(render(view), refresh=True)


class _PlainView:
    """A line every ten seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, view: LiveView) -> None:
        now = time.monotonic()
        if now - self._last >= _LOG_SECONDS:
            self._last = now
            print(f"staging: {printable(summary(view))}", file=sys.stderr, flush=True)


def summary(view: LiveView) -> str:
    """A view in one line."""
    if view.phase == "waiting":
        return f"waiting for {seconds_text(view.seconds)}: {view.waits_for} is staging the same data set"
    if view.phase != "moving" or not view.total_bytes:
        return f"{view.phase} for {seconds_text(view.seconds)}"
    slowest = view.slowest
    if slowest is None or len(view.nodes) == 1:
        return _overall(view)
    return f"{_overall(view)}; slowest {slowest.name}: {slowest.share:.0%}, {bytes_text(slowest.bytes_per_second)}/s"


def _overall(view: LiveView) -> str:
    """All nodes of a stage-in that moves, together."""
    rate = sum(node.bytes_per_second for node in view.nodes)
    text = f"{view.done_bytes / view.total_bytes:.0%} of {bytes_text(view.total_bytes)}, {bytes_text(rate)}/s"
    return text if view.seconds_left is None else f"{text}, {seconds_text(view.seconds_left)} left"


def render(view: LiveView) -> Group:
    """A view as a bar, and with several nodes a table of those that will be done last."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    moves = view.phase == "moving" and view.total_bytes
    parts: list[str | Padding | Table] = [f"staging: {printable(_overall(view) if moves else summary(view))}"]
    if moves:
        parts.append(Padding(ProgressBar(total=view.total_bytes, completed=view.done_bytes, width=60), 0))
    if len(view.nodes) > 1:
        table = Table("node", box=None)
        for column in ("done", "of", "", "rate"):
            table.add_column(column, justify="right")
        for node in sorted(view.nodes, key=lambda node: node.share)[:_LISTED_NODES]:
            table.add_row(*_row(node))
        parts.append(table)
    if len(view.nodes) > _LISTED_NODES:
        parts.append(f"and {len(view.nodes) - _LISTED_NODES} nodes that are further on")
    return Group(*parts)


def _row(node: NodeProgress) -> tuple[str, ...]:
    done, total = bytes_text(node.done_bytes), bytes_text(node.total_bytes)
    return printable(node.name), done, total, f"{node.share:.0%}", f"{bytes_text(node.bytes_per_second)}/s"
