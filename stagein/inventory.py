"""What the node cache holds, and how it gets room again: the parts of `stagein status` and `stagein evict` that know the disk.

Nothing is evicted that a job writes or a loader reads: both hold leases (`leases.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from stagein.formats.errors import SourceError, UsageError, destination_error
from stagein.formats.manifest import Manifest
from stagein.formats.publish import PART_SUFFIX, fsync_folder

from .cache import (
    EVICTED_SUFFIX,
    LOCK_SUFFIX,
    READY_NAME,
    STORE_NAME,
    Store,
    free_bytes,
    read_ready,
    remove_leftovers,
)
from .leases import Owner, WriterLease, no_readers, readers_of, writer_of
from .stage_plan import ChosenPolicy

State = Literal["complete", "part", "damaged", "staging", "unfinished"]
_ID_DIGITS = 64


class CacheEntry(BaseModel):
    """One data set in the cache of a node.

    state        complete: all files are here; part: those that a partition gave this node; damaged: READY lists files that are
                 gone or have another size; staging: a job is at work; unfinished: left by a job that ended, to be resumed.
    held_bytes   of published files, and of chunks that a journal lists.
    dataset_bytes  of the whole data set; None when its manifest is not here.
    disk_bytes   what removing it would free.
    last_used    Unix time of the last staging or opening by a loader.
    writer       who holds the writer's lease.
    readers      processes that have it open, as far as this user may see them.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    path: Path
    state: State
    policy: ChosenPolicy | None
    source: str | None
    files: int
    held_bytes: int
    dataset_bytes: int | None
    disk_bytes: int
    last_used: float
    writer: Owner | None
    readers: tuple[int, ...]


class CacheStatus(BaseModel):
    """The cache below one destination of a node: the data sets in it, the one used last first."""

    model_config = ConfigDict(frozen=True)

    node: str
    to: Path
    free_bytes: int
    total_bytes: int
    entries: tuple[CacheEntry, ...]


def read_cache(to: Path, node: str) -> CacheStatus:
    """Look at the cache below `to`, without changing anything. Raises UsageError when there is no such folder."""
    try:
        space = os.statvfs(to)
    except OSError as error:
        raise UsageError(f"the destination {to} on node {node} cannot be read: {error.strerror}") from None
    found = (_read_entry(to, dataset_id) for dataset_id in _ids(to / STORE_NAME))
    entries = sorted((entry for entry in found if entry is not None), key=lambda entry: -entry.last_used)
    total_bytes = space.f_blocks * space.f_frsize
    return CacheStatus(node=node, to=to, free_bytes=free_bytes(to), total_bytes=total_bytes, entries=tuple(entries))


def _ids(folder: Path) -> list[str]:
    names = {path.name.removesuffix(PART_SUFFIX) for path in folder.glob("*") if path.suffix != LOCK_SUFFIX}
    return sorted(name for name in names if len(name) == _ID_DIGITS and name.isalnum())


def _read_entry(to: Path, dataset_id: str) -> CacheEntry | None:
    """None when it has just been evicted."""
    folder = to / STORE_NAME
    final, work = folder / dataset_id, folder / f"{dataset_id}{PART_SUFFIX}"
    manifest = _manifest(final) or _manifest(work)
    ready = read_ready(final, dataset_id)
    writer = writer_of(folder / f"{dataset_id}{LOCK_SUFFIX}")
    times = [_mtime(path) for path in (final / READY_NAME, work, *work.glob("journal-*"))]
    if not any(times):
        times.append(_mtime(final))
    store = Store(to, manifest) if manifest is not None else None
    published = store.published() if store is not None else None
    if not any(times):
        return None
    return CacheEntry(
        id=dataset_id,
        path=final if ready is not None else work if work.exists() else final,
        state=_state(writer, None if ready is None else len(ready.files), published, manifest),
        policy=None if ready is None else ready.policy,
        source=None if ready is None else ready.source,
        files=len(published or ()),
        held_bytes=0 if store is None else store.finished_bytes(),
        dataset_bytes=None if manifest is None else manifest.nbytes,
        disk_bytes=_disk_bytes(final) + _disk_bytes(work),
        last_used=max(times),
        writer=writer,
        readers=tuple(readers_of(final)),
    )


def _state(
    writer: Owner | None, listed: int | None, published: Collection[int] | None, manifest: Manifest | None
) -> State:
    if writer is not None:
        return "staging"
    if listed is None:
        return "unfinished"
    if manifest is None or published is None or len(published) < listed:
        return "damaged"
    return "complete" if listed == sum(1 for _ in manifest.all_files()) else "part"


def _manifest(folder: Path) -> Manifest | None:
    with contextlib.suppress(SourceError):
        return Manifest.load(folder)
    return None


def _mtime(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _disk_bytes(root: Path) -> int:
    """Bytes on disk of everything below `root`, which may change or go while we look."""
    nbytes = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                nbytes += os.lstat(f"{folder}/{name}").st_blocks * 512
    return nbytes


def choose_evicted(
    status: CacheStatus,
    named: Collection[str] = (),
    wanted_free_bytes: int | None = None,
    unused_since: float | None = None,
    spared: str | None = None,
) -> list[CacheEntry]:
    """The entries to evict, the one unused for longest first. Pure: it decides, and removes nothing.

    named              ids: these, whatever else is said.
    wanted_free_bytes  as many as it takes to have that much room; none where all together would not give it.
    unused_since       only those not used after this Unix time; without `wanted_free_bytes` all of them.
    spared             the id of one that stays.

    What is leased is chosen only by name; evicting it then fails and says who has it.
    """
    if named:
        return [entry for entry in status.entries if entry.id in named]
    idle = [
        entry for entry in reversed(status.entries) if entry.writer is None and not entry.readers and entry.id != spared
    ]
    if unused_since is not None:
        idle = [entry for entry in idle if entry.last_used <= unused_since]
    if wanted_free_bytes is None:
        return idle
    chosen, free = [], status.free_bytes
    for entry in idle:
        if free >= wanted_free_bytes:
            break
        chosen.append(entry)
        free += entry.disk_bytes
    return chosen if free >= wanted_free_bytes else []


def make_room(to: Path, node: str, wanted_free_bytes: int, spared: str) -> list[CacheEntry]:
    """Evict what was unused for longest until `wanted_free_bytes` are free; nothing when that cannot be reached.

    `spared` is the id of a data set that stays. Returns what was evicted.
    """
    status = read_cache(to, node)
    chosen = choose_evicted(status, wanted_free_bytes=wanted_free_bytes, spared=spared)
    return [entry for entry in chosen if evict(to, entry)]


def evict(to: Path, entry: CacheEntry) -> bool:
    """Remove one data set from the cache below `to`; False when a job or a loader has it, and it stays as it is.

    It loses its name first, all at once, so that nobody ever finds half of it. Raises StageinError where the disk refuses.
    """
    folder = to / STORE_NAME
    final, work, evicted = (
        folder / entry.id,
        folder / f"{entry.id}{PART_SUFFIX}",
        folder / f"{entry.id}{EVICTED_SUFFIX}",
    )
    try:
        lease = WriterLease.take(folder / f"{entry.id}{LOCK_SUFFIX}")
        if lease is None:
            return False
        with no_readers(final) as free:
            if not free:
                lease.close()
                return False
            shutil.rmtree(evicted, ignore_errors=True)
            if final.exists():
                final.rename(evicted)
        if work.exists():
            shutil.rmtree(work)
        fsync_folder(folder)
        remove_leftovers(folder)
        lease.remove()
    except OSError as error:
        raise destination_error(error, "evicting", final) from None
    return True
