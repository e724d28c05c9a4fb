"""How a loader finds the copy of a data set that `stage` has put on its node."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stagein.formats.publish import publish_bytes

from .cache import READY_NAME, STORE_NAME, expand_node, read_ready
from .leases import ReaderLease
from .stage_plan import ChosenPolicy
from .world import node_name

TO_VARIABLE = "STAGEIN_TO"
"""Destinations to look for staged copies in, separated as in PATH; `{node}` stands for the node's name."""


@dataclass(frozen=True)
class StagedCopy:
    """A staged copy on this node: its folder, and the shards and other files that are in it.

    It is not evicted while this object, or a pickled copy of it, lives.
    """

    path: Path
    policy: ChosenPolicy
    files: frozenset[str]
    lease: ReaderLease


def destinations(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where this node may have staged copies: below STAGEIN_TO, else where `stage` noted it, the latest first."""
    node = node_name(environment)
    if environment.get(TO_VARIABLE):
        return [expand_node(to, node) for to in environment[TO_VARIABLE].split(os.pathsep) if to]
    return noted_destinations(node, environment)


def find_staged(dataset_id: str, environment: Mapping[str, str] = os.environ) -> StagedCopy | None:
    """The staged copy of a data set on this node, None when there is none.

    With the policy partition only some shards are in it: `files` says which.
    """
    for root in destinations(environment):
        folder = root / STORE_NAME / dataset_id
        try:
            lease = ReaderLease(folder)
        except OSError:
            continue
        ready = read_ready(folder, dataset_id)
        if ready is not None:
            note_use(folder)
            return StagedCopy(folder, ready.policy, frozenset(ready.files), lease)
    return None


def note_use(folder: Path) -> None:
    """Remember that a staged copy was used now, as the time of READY; somebody else's copy does not let us."""
    with contextlib.suppress(OSError):
        os.utime(folder / READY_NAME)


def note_destination(to: Path, node: str, environment: Mapping[str, str] = os.environ) -> None:
    """Remember that this node has staged data below `to`. Never fails: without the note a loader reads the source."""
    for folder in _note_folders(node, environment):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_ours(folder):
                name = hashlib.sha256(os.fsencode(to)).hexdigest()[:16]
                publish_bytes(folder / name, os.fsencode(to))
                return


def noted_destinations(node: str, environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Destinations that `note_destination` remembered on this node, the latest first."""
    notes = [
        note
        for folder in _note_folders(node, environment)
        if _is_ours(folder)
        for note in folder.iterdir()
        if not note.name.startswith(".")
    ]
    notes.sort(key=lambda note: note.stat().st_mtime, reverse=True)
    return [Path(os.fsdecode(note.read_bytes())) for note in notes]


def _note_folders(node: str, environment: Mapping[str, str]) -> list[Path]:
    """Node-local folders for notes, the best first: the system's runtime folder of this user, else a temporary one."""
    temporary = Path(environment.get("TMPDIR") or tempfile.gettempdir()) / f"stagein-{os.getuid()}" / node
    runtime = environment.get("XDG_RUNTIME_DIR")
    return [Path(runtime) / "stagein" / node, temporary] if runtime else [temporary]


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can have put a note there: temporary folders are open to all users."""
    try:
        status = [folder.parent.lstat(), folder.lstat()]
    except OSError:
        return False
    return all(s.st_uid == os.getuid() and stat.S_ISDIR(s.st_mode) and not s.st_mode & 0o022 for s in status)
