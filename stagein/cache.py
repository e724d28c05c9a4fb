"""The node-local store of staged data sets, and how a loader finds one in it.

    TO/stagein/ID.lock      locked by the one job that writes this data set on this node
    TO/stagein/ID.part/     work in progress: files under their own names, and a journal of finished chunks a rank
    TO/stagein/ID/          a staged data set; to be trusted only with READY, which is written last and says what is here

ID is the data set's id, which its content determines: two versions never mix, and the next job finds the data warm.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from stagein.formats.errors import NoSpaceError, StageinError, UsageError, destination_error
from stagein.formats.manifest import MANIFEST_NAME, Manifest
from stagein.formats.publish import PART_SUFFIX, fsync_folder, publish_bytes
from stagein.formats.zarr_view import link_paths

from .stage_plan import ChosenPolicy, ChunkTable, Flags
from .world import node_name

STORE_NAME = "stagein"
READY_NAME = "READY"
RECEIPT_NAME = "receipt.json"
TO_VARIABLE = "STAGEIN_TO"
"""Destinations to look for staged copies in, separated as in PATH; `{node}` stands for the node's name."""

_JOURNAL_PREFIX = "journal-"
_PUBLISHED_MODE = 0o444
_WORK_MODE = 0o644


class Ready(BaseModel):
    """READY: what is in a staged copy. `files` are the files of the manifest that are here, whole and verified."""

    model_config = ConfigDict(frozen=True)

    format: Literal["stagein-ready"] = "stagein-ready"
    version: int = 1
    id: str
    policy: ChosenPolicy
    files: tuple[str, ...]


class StagedCopy(BaseModel):
    """A staged copy on this node: its folder, and the shards and other files that are in it."""

    model_config = ConfigDict(frozen=True)

    path: Path
    policy: ChosenPolicy
    files: frozenset[str]


def expand_node(destination: str, node: str) -> Path:
    """`{node}` in a destination stands for the node's name."""
    return Path(destination.replace("{node}", node)).absolute()


class Store:
    """One data set's place in the store below the destination `to`."""

    def __init__(self, to: Path, manifest: Manifest) -> None:
        self.to = to
        self._manifest = manifest
        self._table = ChunkTable(manifest)
        self._folder = to / STORE_NAME
        self.final = self._folder / manifest.id
        self.work = self._folder / f"{manifest.id}{PART_SUFFIX}"
        self._lock_path = self._folder / f"{manifest.id}.lock"

    def free_bytes(self) -> int:
        """Bytes that may be written below the destination."""
        status = os.statvfs(self.to)
        return status.f_bavail * status.f_frsize

    def held_bytes(self) -> int:
        """Bytes on disk of what an earlier run left or finished of this data set."""
        return sum(
            (folder / entry.file).lstat().st_blocks * 512
            for folder in (self.final, self.work)
            for entry in self._table.files
            if (folder / entry.file).exists()
        )

    def make_folder(self) -> None:
        """Make the store's own folder, which also shows that the destination can be written."""
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise destination_error(error, "making", self._folder) from None

    def holds(self, files: Sequence[int]) -> bool:
        """Whether a published copy has all these files (by number), with READY and in their right sizes."""
        ready = read_ready(self.final, self._manifest.id)
        if ready is None:
            return False
        here = set(ready.files)
        return all(self._table.files[file].file in here and self._has_size(self.final, file) for file in files)

    def _has_size(self, folder: Path, file: int) -> bool:
        entry = self._table.files[file]
        try:
            status = (folder / entry.file).lstat()
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == entry.nbytes

    @contextlib.contextmanager
    def mark(self, job: str) -> Iterator[None]:
        """Leave a mark that shows on which node this folder is seen, for `marks` of the same job."""
        path = self._folder / f".mark.{job}.{node_name()}"
        path.touch()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def marks(self, job: str) -> list[str]:
        """Names of the nodes of this job that write to the same folder as this one."""
        prefix = f".mark.{job}."
        return sorted(path.name.removeprefix(prefix) for path in self._folder.glob(f"{prefix}*"))

    def try_lease(self) -> int | None:
        """The lease of this data set on this node, as a locked descriptor; None while another job has it.

        The kernel takes it back when the holder dies.
        """
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".ljust(64).encode(), 0)
        return descriptor

    def lease_holder(self) -> str:
        """Process and host that hold the lease."""
        try:
            return f"process {self._lock_path.read_text().strip()}"
        except OSError:
            return "another process"

    def journal_bytes(self) -> int:
        """Size of all journals: it grows while somebody makes progress."""
        with contextlib.suppress(OSError):
            return sum(path.stat().st_size for path in self.work.glob(f"{_JOURNAL_PREFIX}*"))
        return 0

    def prepare(self, files: Sequence[int]) -> Flags:
        """Make the work folder ready for these files, at their full size, and return the chunks claimed to be there.

        A claim comes from the journal of an earlier run, or from a published copy that lacks something and is therefore
        withdrawn; its bytes are still to be verified. Raises NoSpaceError when the files do not fit.
        """
        try:
            claimed = self._withdraw() if self.final.exists() else self._journaled()
            self.work.mkdir(exist_ok=True)
            self._remove_others({self._table.files[file].file for file in files})
            for file in files:
                if not self._allocate(file):
                    claimed[self._table.first[file] : self._table.first[file + 1]] = False
        except OSError as error:
            raise destination_error(error, "making room in", self.work) from None
        return claimed & self._table.of_files(files)

    def _withdraw(self) -> Flags:
        """Turn a published copy back into work in progress, all files of the right size being claimed."""
        (self.final / READY_NAME).unlink(missing_ok=True)
        fsync_folder(self.final)
        if self.work.exists():
            shutil.rmtree(self.work)
        self.final.rename(self.work)
        claimed = self._table.of_files([f for f in range(len(self._table.files)) if self._has_size(self.work, f)])
        with open(self.work / f"{_JOURNAL_PREFIX}withdrawn", "w") as journal:
            journal.writelines(f"{chunk}\n" for chunk in np.flatnonzero(claimed))
        return claimed

    def _journaled(self) -> Flags:
        """Chunks that the journals list. A line cut short by a crash may name a wrong one: claims are verified anyway."""
        claimed = np.zeros(len(self._table), dtype=np.bool_)
        for path in self.work.glob(f"{_JOURNAL_PREFIX}*"):
            numbers = (int(word) for word in path.read_bytes().split() if word.isdigit())
            claimed[[number for number in numbers if number < len(claimed)]] = True
        return claimed

    def _remove_others(self, wanted: set[str]) -> None:
        """Remove whatever lies in the work folder and is neither wanted nor a journal."""
        for folder, _, names in os.walk(self.work):
            for name in names:
                path = Path(folder) / name
                below = path.relative_to(self.work).as_posix()
                if below not in wanted and not (below.startswith(_JOURNAL_PREFIX) and "/" not in below):
                    path.unlink()

    def _allocate(self, file: int) -> bool:
        """Give a file its full size on disk; whether it had it before."""
        path = self.work / self._table.files[file].file
        if self._has_size(self.work, file):
            path.chmod(_WORK_MODE)
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _WORK_MODE)
        try:
            allocate(descriptor, self._table.files[file].nbytes)
        finally:
            os.close(descriptor)
        return False

    @contextlib.contextmanager
    def journal(self, local_rank: int) -> Iterator[Callable[[int], object]]:
        """The journal of one rank, as a function that notes a chunk: one decimal number a line.

        A note is one system call, so that threads do not mix their lines.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            descriptor = os.open(self.work / f"{_JOURNAL_PREFIX}{local_rank}", flags, _WORK_MODE)
        except OSError as error:
            raise destination_error(error, "opening a journal in", self.work) from None
        try:
            yield lambda chunk: os.write(descriptor, b"%d\n" % chunk)
        finally:
            os.close(descriptor)

    def sync(self, file: int) -> None:
        """Make one finished file durable and immutable."""
        path = self.work / self._table.files[file].file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fchmod(descriptor, _PUBLISHED_MODE)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise destination_error(error, "writing", path) from None

    def publish(self, policy: ChosenPolicy, files: Sequence[int]) -> None:
        """Give the finished work its final name: manifest, links, folders made durable, rename, and READY last."""
        try:
            publish_bytes(self.work / MANIFEST_NAME, self._manifest.to_bytes())
            self._make_links()
            for folder, _, _ in os.walk(self.work):
                fsync_folder(Path(folder))
            self.work.rename(self.final)
            fsync_folder(self._folder)
            names = tuple(self._table.files[file].file for file in files)
            ready = Ready(id=self._manifest.id, policy=policy, files=names)
            publish_bytes(self.final / READY_NAME, ready.model_dump_json(indent=1).encode() + b"\n")
            for journal in self.final.glob(f"{_JOURNAL_PREFIX}*"):
                journal.unlink()
        except OSError as error:
            raise destination_error(error, "publishing", self.final) from None

    def _make_links(self) -> None:
        """The Zarr view's links to the shards that are here."""
        for name, target in link_paths(self._manifest):
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if (path.parent / target).exists():
                path.symlink_to(target)

    def discard_work(self) -> None:
        """Remove work in progress."""
        shutil.rmtree(self.work, ignore_errors=True)

    def write_receipt(self, content: bytes) -> None:
        """Keep the receipt beside READY."""
        publish_bytes(self.final / RECEIPT_NAME, content)

    def read_receipt(self) -> bytes | None:
        """The receipt of the run that staged the copy, if it is still there."""
        try:
            return (self.final / RECEIPT_NAME).read_bytes()
        except OSError:
            return None


def allocate(descriptor: int, nbytes: int) -> None:
    """Reserve the bytes of a file, so that a full disk shows before anything is moved. Raises OSError (ENOSPC)."""
    if nbytes:
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(descriptor, nbytes)


def check_destination(to: Path, source: Path, node: str) -> None:
    """Refuse a destination that is missing, cannot be written, or lies inside the source. Raises UsageError."""
    if not to.is_dir():
        raise UsageError(f"the destination {to} on node {node} is not a folder: make it first, or name another one")
    if to.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"the destination {to} lies inside the source {source}: choose a folder outside it")
    if not os.access(to, os.W_OK | os.X_OK) or os.statvfs(to).f_flag & os.ST_RDONLY:
        raise UsageError(
            f"the destination {to} on node {node} cannot be written: choose another, or have it made writable"
        )


def read_ready(folder: Path, dataset_id: str) -> Ready | None:
    """READY of a staged copy; None when there is none, or when it is not one of this data set."""
    try:
        ready = Ready.model_validate_json((folder / READY_NAME).read_bytes())
    except (OSError, ValidationError):
        return None
    return ready if ready.id == dataset_id else None


def find_staged(dataset_id: str, environment: Mapping[str, str] = os.environ) -> StagedCopy | None:
    """The staged copy of a data set on this node, None when there is none.

    Looks below the destinations in STAGEIN_TO, else below those that `stage` has noted on this node. With the policy
    partition only some shards are in it: `files` says which.
    """
    node = node_name(environment)
    if environment.get(TO_VARIABLE):
        roots = [expand_node(to, node) for to in environment[TO_VARIABLE].split(os.pathsep) if to]
    else:
        roots = noted_destinations(node, environment)
    for root in roots:
        folder = root / STORE_NAME / dataset_id
        ready = read_ready(folder, dataset_id)
        if ready is not None:
            return StagedCopy(path=folder, policy=ready.policy, files=frozenset(ready.files))
    return None


def note_destination(to: Path, node: str, environment: Mapping[str, str] = os.environ) -> None:
    """Remember that this node has staged data below `to`. Never fails: without the note a loader reads the source."""
    for folder in _note_folders(node, environment):
        with contextlib.suppress(OSError, StageinError, NoSpaceError):
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
