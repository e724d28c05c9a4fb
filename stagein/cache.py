"""The node cache: one place on the local disk for staged data sets, shared by all jobs of the node.

    TO/stagein/ID/          a staged data set; to be trusted only with READY, which is written last and says what is here
    TO/stagein/ID.part/     work in progress: files under their own names, and a journal of finished chunks a rank
    TO/stagein/ID.lock      the writer's lease: one job at a time changes this data set on this node
    TO/stagein/ID.evicted/  on its way out

ID is the data set's id, which its content determines: two versions never mix, and the next job finds the data warm.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from stagein.formats.errors import UsageError, destination_error
from stagein.formats.manifest import MANIFEST_NAME, Manifest
from stagein.formats.publish import PART_SUFFIX, fsync_folder, publish_bytes
from stagein.formats.zarr_view import link_paths

from .leases import Owner, WriterLease, writer_of
from .stage_plan import ChosenPolicy, ChunkTable, Flags
from .world import node_name

STORE_NAME = "stagein"
READY_NAME = "READY"
RECEIPT_NAME = "receipt.json"
LOCK_SUFFIX = ".lock"
EVICTED_SUFFIX = ".evicted"

_MARK_PREFIX = ".mark."
_JOURNAL_PREFIX = "journal-"
PUBLISHED_MODE = 0o444
_WORK_MODE = 0o644


class Ready(BaseModel):
    """READY: what is in a staged copy. `files` are the files of the manifest that are here, whole and verified when written.

    `source` is the data set that they were copied from. The time of the file is that of the copy's last use.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["stagein-ready"] = "stagein-ready"
    version: int = 1
    id: str
    policy: ChosenPolicy
    source: str
    files: tuple[str, ...]


def expand_node(destination: str, node: str) -> Path:
    """`{node}` in a destination stands for the node's name."""
    return Path(destination.replace("{node}", node)).absolute()


class Store:
    """One data set's place in the store below the destination `to`."""

    def __init__(self, to: Path, manifest: Manifest) -> None:
        self.to = to
        self.id = manifest.id
        self._manifest = manifest
        self._table = ChunkTable(manifest)
        self._folder = to / STORE_NAME
        self.final = self._folder / manifest.id
        self.work = self._folder / f"{manifest.id}{PART_SUFFIX}"
        self._lock_path = self._folder / f"{manifest.id}{LOCK_SUFFIX}"

    def free_bytes(self) -> int:
        """Bytes that may be written below the destination."""
        return free_bytes(self.to)

    def held_bytes(self) -> int:
        """Bytes on disk of what an earlier run left or finished of this data set."""
        return sum(
            (folder / entry.file).lstat().st_blocks * 512
            for folder in (self.final, self.work)
            for entry in self._table.files
            if (folder / entry.file).exists()
        )

    def finished_bytes(self) -> int:
        """Bytes of published files, and of chunks that an unfinished run has noted in its journals."""
        return self._table.total_bytes(self._table.of_files(sorted(self.published() or ())) | self.journaled())

    def make_folder(self) -> None:
        """Make the store's own folder, which also shows that the destination can be written, and clear what the dead left."""
        try:
            self._folder.mkdir(exist_ok=True)
            fsync_folder(self.to)
        except OSError as error:
            raise destination_error(error, "making", self._folder) from None
        remove_leftovers(self._folder)

    def published(self) -> frozenset[int] | None:
        """The files, by number, of the published copy: READY lists them, and they are there in their right sizes.

        None when there is no published copy.
        """
        ready = read_ready(self.final, self.id)
        if ready is None:
            return None
        here = set(ready.files)
        return frozenset(
            number
            for number, entry in enumerate(self._table.files)
            if entry.file in here and self._has_size(self.final, number)
        )

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
        path = self._folder / f"{_MARK_PREFIX}{job}.{node_name()}"
        try:
            path.write_bytes(Owner.this_process().to_bytes())
        except OSError as error:
            raise destination_error(error, "writing", path) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def marks(self, job: str) -> list[str]:
        """Names of the nodes of this job that write to the same folder as this one."""
        prefix = f"{_MARK_PREFIX}{job}."
        return sorted(path.name.removeprefix(prefix) for path in self._folder.glob(f"{prefix}*"))

    def try_lease(self) -> WriterLease | None:
        """The writer's lease of this data set on this node; None while another job has it."""
        try:
            return WriterLease.take(self._lock_path)
        except PermissionError:
            raise UsageError(
                f"{self._folder} belongs to another user, who staged there first: name a folder of your own, which you may make below it"
            ) from None
        except OSError as error:
            raise destination_error(error, "locking", self._lock_path) from None

    def lease_holder(self) -> str:
        """Process and host that hold the lease."""
        return str(writer_of(self._lock_path) or "a process that has just ended")

    def journal_bytes(self) -> int:
        """Size of all journals: it grows while somebody makes progress."""
        with contextlib.suppress(OSError):
            return sum(path.stat().st_size for path in self.work.glob(f"{_JOURNAL_PREFIX}*"))
        return 0

    def prepare(self, files: Sequence[int]) -> Flags:
        """Make the work folder ready for these files, at their full size, and return the chunks claimed to be there.

        A claim comes from the journal of an earlier run, or from a file that a crash left under its final name while READY does
        not vouch for it; its bytes are still to be verified. A published copy stays as it is, for those who read it.
        Raises NoSpaceError when the files do not fit.
        """
        try:
            if read_ready(self.final, self.id) is None and self.final.exists():
                self._take_back()
            self.work.mkdir(exist_ok=True)
            claimed = self.journaled()
            for file in files:
                if self._take_back_file(file):
                    claimed[self._table.first[file] : self._table.first[file + 1]] = True
            self._remove_others({self._table.files[file].file for file in files})
            publish_bytes(self.work / MANIFEST_NAME, self._manifest.to_bytes())
            for file in files:
                if not self._allocate(file):
                    claimed[self._table.first[file] : self._table.first[file + 1]] = False
        except OSError as error:
            raise destination_error(error, "making room in", self.work) from None
        return claimed & self._table.of_files(files)

    def _take_back(self) -> None:
        """Turn a copy without READY, which a crash left, back into work in progress."""
        (self.final / READY_NAME).unlink(missing_ok=True)
        if self.work.exists():
            shutil.rmtree(self.work)
        self.final.rename(self.work)
        whole = self._table.of_files([f for f in range(len(self._table.files)) if self._has_size(self.work, f)])
        with open(self.work / f"{_JOURNAL_PREFIX}taken-back", "w") as journal:
            journal.writelines(f"{chunk}\n" for chunk in np.flatnonzero(whole))

    def _take_back_file(self, file: int) -> bool:
        """The same for one file that was on its way into a published copy; whether there was one."""
        source, target = (folder / self._table.files[file].file for folder in (self.final, self.work))
        if target.exists() or not self._has_size(self.final, file):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return True

    def journaled(self) -> Flags:
        """Chunks that the journals list. A line cut short by a crash may name a wrong one: claims are verified anyway."""
        claimed = np.zeros(len(self._table), dtype=np.bool_)
        for path in self.work.glob(f"{_JOURNAL_PREFIX}*"):
            numbers = (int(word) for word in path.read_bytes().split() if word.isdigit())
            claimed[[number for number in numbers if number < len(claimed)]] = True
        return claimed

    def _remove_others(self, wanted: set[str]) -> None:
        """Remove whatever lies in the work folder and is neither wanted nor a journal; a link to a folder would lead us out."""
        for folder, folders, names in os.walk(self.work):
            for name in folders:
                if (Path(folder) / name).is_symlink():
                    (Path(folder) / name).unlink()
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
                os.fchmod(descriptor, PUBLISHED_MODE)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise destination_error(error, "writing", path) from None

    def publish(self, policy: ChosenPolicy, files: Sequence[int], source: str) -> None:
        """Give these finished files their final names, and then READY, the last, which vouches for them.

        Nothing is named that is not on the disk: files and folders are made durable before READY is.
        """
        try:
            ready = read_ready(self.final, self.id)
            names = {self._table.files[file].file for file in files} | set(ready.files if ready else ())
            if ready is None:
                self.make_links(self.work)
                _fsync_folders(self.work)
                self.work.rename(self.final)
            else:
                for file in files:
                    self._move_in(self._table.files[file].file)
                self.make_links(self.final)
                _fsync_folders(self.final)
            fsync_folder(self._folder)
            here = tuple(entry.file for entry in self._table.files if entry.file in names)
            ready = Ready(
                id=self.id,
                policy="replicate" if len(here) == len(self._table.files) else policy,
                source=source,
                files=here,
            )
            publish_bytes(self.final / READY_NAME, ready.model_dump_json(indent=1).encode() + b"\n")
            for left in [*self.final.glob(f"{_JOURNAL_PREFIX}*"), *self.final.glob(f".*{PART_SUFFIX}")]:
                left.unlink()
        except OSError as error:
            raise destination_error(error, "publishing", self.final) from None
        self.discard_work()

    def _move_in(self, name: str) -> None:
        """Move one finished file into the published copy; who reads an older file of that name keeps it."""
        target = self.final / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.work / name).rename(target)

    def make_links(self, root: Path) -> None:
        """Make those of the Zarr view's links that are missing."""
        for name, target in self.links(root):
            path = root / name
            if not path.is_symlink():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(target)

    def links(self, root: Path) -> list[tuple[str, str]]:
        """The Zarr view's links, name and target, to the shards that are there."""
        links = link_paths(self._manifest)
        return [
            (name, target) for name, target in links if Path(os.path.normpath(root / name / ".." / target)).exists()
        ]

    def discard_work(self) -> None:
        """Remove work in progress."""
        shutil.rmtree(self.work, ignore_errors=True)

    def write_receipt(self, content: bytes) -> None:
        """Keep the receipt beside READY."""
        publish_bytes(self.final / RECEIPT_NAME, content)


def remove_leftovers(folder: Path) -> None:
    """Remove what dead processes left in a store's folder and nobody can use: their marks, and copies half evicted."""
    for mark in folder.glob(f"{_MARK_PREFIX}*"):
        with contextlib.suppress(OSError):
            owner = Owner.parse(mark.read_bytes())
            if owner is not None and owner.is_dead():
                mark.unlink()
    for evicted in folder.glob(f"*{EVICTED_SUFFIX}"):
        shutil.rmtree(evicted, ignore_errors=True)


def free_bytes(to: Path) -> int:
    """Bytes that may be written below a destination."""
    status = os.statvfs(to)
    return status.f_bavail * status.f_frsize


def _fsync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        fsync_folder(Path(folder))


def allocate(descriptor: int, nbytes: int) -> None:
    """Give a file its size, and reserve that on a disk: a full one shows before anything is moved. Raises OSError (ENOSPC).

    File systems without a disk of their own, tmpfs above all, would take as long to reserve as to write.
    """
    if not os.major(os.fstat(descriptor).st_dev):
        os.ftruncate(descriptor, nbytes)
    elif nbytes:
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(descriptor, nbytes)


def check_destination(to: Path, source: Path, node: str, *, must_be_local: bool) -> None:
    """Refuse a destination that is missing, cannot be written, lies inside the source, or whose name is no text. Raises UsageError.

    must_be_local  refuse the file system of the source, too: many nodes would write there what they have just read.
    """
    for path in (source, to):
        if not _is_text(path):
            raise UsageError(f"the name {path} is no UTF-8, as what is noted about a copy has to be: give it another")
    if not to.is_dir():
        raise UsageError(f"the destination {to} on node {node} is not a folder: make it first, or name another one")
    if to.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"the destination {to} lies inside the source {source}: choose a folder outside it")
    if must_be_local and to.stat().st_dev == source.stat().st_dev:
        raise UsageError(
            f"the destination {to} on node {node} is on the file system of the source {source}: name a folder on the node's own disk"
        )
    if not os.access(to, os.W_OK | os.X_OK) or os.statvfs(to).f_flag & os.ST_RDONLY:
        raise UsageError(
            f"the destination {to} on node {node} cannot be written: choose another, or have it made writable"
        )


def _is_text(path: Path) -> bool:
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def mount_of(to: Path) -> Path:
    """The mount point of the file system that a destination lies on."""
    folder = to.resolve()
    while not folder.is_mount():
        folder = folder.parent
    return folder


def refuse_odd_mounts(to: str, mounts: Mapping[str, Path]) -> None:
    """Refuse a destination whose disk is mounted on some nodes only: elsewhere the data would fill another disk.

    mounts  the mount point of the destination by node.
    """
    nodes_of: dict[str, list[str]] = {}
    for node, mount in mounts.items():
        nodes_of.setdefault(str(mount).replace(node, "{node}"), []).append(node)
    if len(nodes_of) > 1:
        (odd, odd_nodes), *_, (usual, usual_nodes) = sorted(nodes_of.items(), key=lambda item: len(item[1]))
        raise UsageError(
            f"the destination {to} lies on the disk mounted at {odd} on node {odd_nodes[0]}, but on the one at {usual} on node "
            f"{usual_nodes[0]}: its own disk is not mounted everywhere; have it mounted, or name another destination"
        )


def read_ready(folder: Path, dataset_id: str) -> Ready | None:
    """READY of a staged copy; None when there is none, or when it is not one of this data set."""
    try:
        ready = Ready.model_validate_json((folder / READY_NAME).read_bytes())
    except (OSError, ValidationError):
        return None
    return ready if ready.id == dataset_id else None
