"""`stagein stage`: bring a data set to the local disks of the nodes of a job."""

import contextlib
from pathlib import Path

from rich.table import Table

from stagein.formats.errors import NoTimeError
from stagein.receipt import NodeReceipt, Receipt
from stagein.stage_plan import PlanSummary, Policy, Prediction
from stagein.staging import DEFAULT_MEMORY_BYTES, DEFAULT_TIMEOUT_SECONDS, plan_stage, stage
from stagein.world import connect

from .console import bytes_text, count_text, print_table, printable, say, say_json, seconds_text
from .live_view import show_stage

_LISTED_NODES = 32


def run(
    source: Path,
    to: str,
    policy: Policy = "auto",
    *,
    copies: int | None = None,
    dry_run: bool = False,
    seconds_left: float | None = None,
    make_room: bool = False,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    as_json: bool = False,
) -> None:
    """Stage `source` to the node-local folder `to`; the first rank alone prints. Raises StageinError on every rank.

    With `dry_run` NoTimeError, after the plan is printed, where the time does not suffice.
    """
    communicator = connect()
    prints = communicator.world.rank == 0
    if dry_run:
        summary = plan_stage(
            source,
            to,
            policy=policy,
            copies=copies,
            world=communicator,
            seconds_left=seconds_left,
            timeout_seconds=timeout_seconds,
        )
        if prints:
            _print_plan(summary, to, as_json)
        with communicator.together():
            _refuse_too_late(summary)
        return
    with show_stage() if prints and not as_json else contextlib.nullcontext() as watch:
        receipt = stage(
            source,
            to,
            policy=policy,
            copies=copies,
            world=communicator,
            make_room=make_room,
            memory_bytes=memory_bytes,
            timeout_seconds=timeout_seconds,
            watch=watch,
        )
    if prints:
        _print_receipt(receipt, as_json)


def _print_plan(summary: PlanSummary, to: str, as_json: bool) -> None:
    if as_json:
        say_json(summary.model_dump(mode="json"))
        return
    name, nodes = summary.dataset_id[:12], count_text(len(summary.nodes), "node")
    copies = f", {count_text(summary.copies, 'node')} for each shard" if summary.policy == "copies" else ""
    say(f"{summary.policy} {name}, {bytes_text(summary.dataset_bytes)}, to {to} on {nodes}{copies}")
    table = _node_table("files", "gets", "has", "free", "reads", "source/s", "network/s", "disk/s")
    for node in summary.nodes[:_LISTED_NODES]:
        sizes = (node.gets_bytes, node.has_bytes, node.free_bytes, node.reads_bytes)
        rates = (node.rates.source, node.rates.network, node.rates.disk) if node.rates else (None, None, None)
        speeds = [bytes_text(rate) if rate else "-" for rate in rates]
        table.add_row(printable(node.name), f"{node.files:,}", *map(bytes_text, sizes), *speeds)
    print_table(table)
    if len(summary.nodes) > _LISTED_NODES:
        say(f"and {len(summary.nodes) - _LISTED_NODES} more nodes; --json lists all")
    if summary.is_there:
        say("every node has its files already: nothing would be moved")
    elif summary.predicted is not None:
        _print_prediction(summary.predicted)


def _node_table(*columns: str) -> Table:
    """A table of numbers with a row a node, for a terminal of 80 columns."""
    table = Table("node", box=None, padding=(0, 0, 0, 1), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _print_prediction(predicted: Prediction) -> None:
    say(f"at least {seconds_text(predicted.seconds)}, bound by the {predicted.resource} of node {predicted.node}")
    if predicted.fits and predicted.seconds_left is not None:
        say(f"the job has {seconds_text(predicted.seconds_left)} left: it fits")


def _refuse_too_late(summary: PlanSummary) -> None:
    predicted = summary.predicted
    if predicted is not None and predicted.fits is False and predicted.seconds_left is not None:
        raise NoTimeError(
            f"staging takes {seconds_text(predicted.seconds)} at least, but the job has {seconds_text(max(0.0, predicted.seconds_left))} "
            "left: ask for more time, or for more nodes and the policy partition; what an earlier run brought is not brought again"
        )


def _print_receipt(receipt: Receipt, as_json: bool) -> None:
    if as_json:
        say_json(receipt.model_dump(mode="json"))
        return
    name, nodes = receipt.dataset_id[:12], len(receipt.nodes)
    where = receipt.nodes[0].path if nodes == 1 else f"{nodes} nodes"
    if not receipt.dataset_bytes:
        say(f"{name} is an empty data set: it is on {where} ({receipt.policy}), and there was nothing to move")
        return
    if receipt.moved_nothing:
        say(f"{name} was on {where} already ({receipt.policy}); nothing was moved")
        return
    say(
        f"{name} is on {where} ({receipt.policy}): {bytes_text(receipt.read_bytes)} read from the source, "
        f"{bytes_text(receipt.written_bytes)} written in {seconds_text(receipt.seconds)}; {_pace_text(receipt)}"
    )
    if nodes > 1:
        _print_nodes(receipt)


def _pace_text(receipt: Receipt) -> str:
    slowest, bound = receipt.slowest, receipt.bound
    node = f"slowest node {slowest.node}: " if len(receipt.nodes) > 1 else ""
    pace = f"{node}{_rate_text(slowest)}"
    if bound is None:
        return pace
    return f"{pace}; bound by the {bound.resource} of {bound.node}, busy for {bound.percent:.0f} % of the time"


def _rate_text(node: NodeReceipt) -> str:
    return f"{bytes_text(node.bytes_per_second)}/s"


def _print_nodes(receipt: Receipt) -> None:
    table = _node_table("read", "received", "written", "reused", "prepare", "move", "publish", "rate")
    for node in sorted(receipt.nodes, key=lambda node: -node.seconds)[:_LISTED_NODES]:
        sizes = (node.read_bytes, node.received_bytes, node.written_bytes, node.reused_bytes)
        phases = (node.prepare_seconds, node.transfer_seconds, node.publish_seconds)
        table.add_row(printable(node.node), *map(bytes_text, sizes), *map(seconds_text, phases), _rate_text(node))
    print_table(table)
    if len(receipt.nodes) > _LISTED_NODES:
        say(f"and {len(receipt.nodes) - _LISTED_NODES} more nodes, which were quicker; --json lists all")
