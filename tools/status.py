"""`stagein status`: which data sets are on this node, or on all nodes of the job, and who uses them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from stagein.cache import expand_node
from stagein.finding import destinations
from stagein.inventory import CacheEntry, CacheStatus, read_cache
from stagein.world import Communicator, connect

from .console import bytes_text, count_text, print_table, printable, say, say_json, seconds_text

_LISTED_NAMES = 4


def run(to: str | None, *, as_json: bool) -> None:
    """Print what is in the cache below `to`, or where `stage` has put data sets before; the first rank alone prints.

    Raises StageinError on every rank.
    """
    communicator = connect()
    caches = gather_caches(communicator, to)
    if communicator.world.rank:
        return
    if as_json:
        say_json({"caches": [cache.model_dump(mode="json") for cache in caches]})
        return
    if any(cache.entries for cache in caches):
        print_table(_table(caches))
        for dataset_id, source in _sources(caches).items():
            say(f"{dataset_id[:12]} is a copy of {source}")
    else:
        say(
            "nothing is staged"
            if caches
            else "nothing is staged that this user knows of: --to DIR looks below that folder"
        )
    for cache in caches[:_LISTED_NAMES]:
        say(f"{cache.node} {cache.to}: {bytes_text(cache.free_bytes)} free of {bytes_text(cache.total_bytes)}")
    if len(caches) > _LISTED_NAMES:
        least = min(caches, key=lambda cache: cache.free_bytes)
        say(f"and {len(caches) - _LISTED_NAMES} more; the least free has {least.node}: {bytes_text(least.free_bytes)}")


def gather_caches(communicator: Communicator, to: str | None) -> list[CacheStatus]:
    """The caches of all nodes, on every rank; below `to`, or below every destination that the node knows."""
    caches: list[CacheStatus] = []
    with communicator.together():
        if communicator.world.local_rank == 0:
            node = communicator.world.node_name
            folders = [expand_node(to, node)] if to else [folder for folder in destinations() if folder.is_dir()]
            caches = [read_cache(folder, node) for folder in folders]
    return [cache for of_rank in communicator.gather_all(caches) for cache in of_rank]


def _table(caches: Sequence[CacheStatus]) -> Table:
    """One row for each data set and state, however many nodes there are."""
    rows: dict[tuple[str, str], list[tuple[str, CacheEntry]]] = {}
    for cache in caches:
        for entry in cache.entries:
            rows.setdefault((entry.id, entry.state), []).append((cache.node, entry))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("data set", "state", "bytes", "nodes", "in use by", "last used"):
        may_wrap = column in ("nodes", "in use by")
        table.add_column(column, overflow="fold", no_wrap=not may_wrap)
    for (dataset_id, state), places in rows.items():
        entries = [entry for _, entry in places]
        table.add_row(
            dataset_id[:12],
            state,
            _bytes_text(entries),
            printable(_names_text(list(dict.fromkeys(node for node, _ in places)))),
            printable(_users_text(entries)),
            f"{seconds_text(max(0.0, time.time() - max(entry.last_used for entry in entries)))} ago",
        )
    return table


def _sources(caches: Sequence[CacheStatus]) -> dict[str, str]:
    """Where data sets were staged from, as far as it is known: paths are too long for the table."""
    entries = [entry for cache in caches for entry in cache.entries]
    return {entry.id: entry.source for entry in entries if entry.source}


def _bytes_text(entries: Sequence[CacheEntry]) -> str:
    held_bytes = sum(entry.held_bytes for entry in entries)
    whole_bytes = sum(entry.dataset_bytes or entry.held_bytes for entry in entries)
    return bytes_text(held_bytes) + ("" if held_bytes == whole_bytes else f" of {bytes_text(whole_bytes)}")


def _names_text(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return ", ".join(names[:_LISTED_NAMES]) + more


def _users_text(entries: Sequence[CacheEntry]) -> str:
    writers = _names_text([f"stage ({entry.writer})" for entry in entries if entry.writer])
    readers = sum(len(entry.readers) for entry in entries)
    return ", ".join(filter(None, [writers, count_text(readers, "reader") if readers else ""]))
