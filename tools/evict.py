"""`stagein evict`: remove data sets from the cache of this node, or of all nodes of the job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from stagein.cache import STORE_NAME
from stagein.formats.errors import NoSpaceError, StageinError, UsageError
from stagein.formats.manifest import MANIFEST_NAME, Manifest
from stagein.inventory import CacheEntry, CacheStatus, choose_evicted, evict
from stagein.world import connect

from .console import bytes_text, say, say_json, seconds_text
from .status import gather_caches

_LEAST_ID_DIGITS = 6


class Evicted(BaseModel):
    """One data set that was evicted from one node, or would be."""

    node: str
    to: Path
    id: str
    source: str | None
    freed_bytes: int
    unused_seconds: float


def run(
    datasets: Sequence[str],
    to: str | None,
    *,
    free_bytes: int | None = None,
    unused_seconds: float | None = None,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Evict the data sets named, by id or path; else those unused for longest until `free_bytes` are free, or all unused so long.

    Raises, on every rank, UsageError when nothing says what to evict, StageinError when what was named is in use,
    NoSpaceError when `free_bytes` cannot be reached on some node, which keeps everything then.
    """
    communicator = connect()
    with communicator.together():
        if not datasets and free_bytes is None and unused_seconds is None:
            raise UsageError("say what to evict: data sets by id or path, --free SIZE, or --older-than AGE")
    caches = gather_caches(communicator, to)
    evicted: list[Evicted] = []
    failure: StageinError | None = None
    with communicator.together():
        ids = [_id_of(dataset, caches) for dataset in datasets]
        before = None if unused_seconds is None else time.time() - unused_seconds
        if communicator.world.local_rank == 0:
            for cache in caches:
                if cache.node == communicator.world.node_name:
                    entries = choose_evicted(cache, ids, free_bytes, before)
                    evicted += _evict(cache, entries, must=bool(ids), dry_run=dry_run)
                    failure = failure or _shortage(cache, evicted, free_bytes, before)
    everything = [each for of_rank in communicator.gather_all(evicted) for each in of_rank]
    if communicator.world.rank == 0:
        _report(everything, dry_run, as_json)
    with communicator.together():
        if failure is not None:
            raise failure


def _id_of(dataset: str, caches: Sequence[CacheStatus]) -> str:
    """The id of a data set in some cache, given by the path of a copy or by the beginning of its id."""
    name = Manifest.load(Path(dataset)).id if (Path(dataset) / MANIFEST_NAME).is_file() else dataset
    found = {entry.id for cache in caches for entry in cache.entries if entry.id.startswith(name)}
    if len(found) == 1 and len(name) >= _LEAST_ID_DIGITS:
        return found.pop()
    reason = "is too short to be sure" if len(name) < _LEAST_ID_DIGITS else "is several" if found else "is not staged"
    raise UsageError(f"{dataset} {reason}: name a data set, or an id, that `stagein status` shows")


def _evict(cache: CacheStatus, entries: Sequence[CacheEntry], *, must: bool, dry_run: bool) -> list[Evicted]:
    evicted = []
    for entry in entries:
        if not dry_run and not evict(cache.to, entry):
            if must:
                raise StageinError(_in_use_text(cache, entry))
            continue
        evicted.append(
            Evicted(
                node=cache.node,
                to=cache.to,
                id=entry.id,
                source=entry.source,
                freed_bytes=entry.disk_bytes,
                unused_seconds=max(0.0, time.time() - entry.last_used),
            )
        )
    return evicted


def _in_use_text(cache: CacheStatus, entry: CacheEntry) -> str:
    readers = f"read by {', '.join(map(str, entry.readers))}" if entry.readers else "in use"
    user = f"being staged by {entry.writer}" if entry.writer else readers
    return f"{entry.id[:12]} in {cache.to / STORE_NAME} on node {cache.node} is {user}: end that first, then evict it"


def _shortage(
    cache: CacheStatus, evicted: Sequence[Evicted], free_bytes: int | None, unused_since: float | None
) -> NoSpaceError | None:
    """What to say when there is, or would be, less room than was asked for."""
    freed_bytes = sum(each.freed_bytes for each in evicted if each.to == cache.to)
    if free_bytes is None or cache.free_bytes + freed_bytes >= free_bytes:
        return None
    idle_bytes = sum(entry.disk_bytes for entry in choose_evicted(cache, unused_since=unused_since))
    return NoSpaceError(
        f"{cache.to} on node {cache.node} cannot have {bytes_text(free_bytes)} free: {bytes_text(cache.free_bytes)} are, and "
        f"{bytes_text(idle_bytes)} could be evicted; `stagein status` shows what is in use"
    )


def _report(evicted: Sequence[Evicted], dry_run: bool, as_json: bool) -> None:
    if as_json:
        say_json({"dry_run": dry_run, "evicted": [each.model_dump(mode="json") for each in evicted]})
        return
    for each in evicted:
        source = f" (from {each.source})" if each.source else ""
        say(
            f"{each.node} {each.to}: {'would evict' if dry_run else 'evicted'} {each.id[:12]}{source}, "
            f"{bytes_text(each.freed_bytes)}, unused for {seconds_text(each.unused_seconds)}"
        )
    if not evicted:
        say("nothing to evict")
