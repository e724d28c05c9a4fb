"""Staged copies verified, and healed chunk by chunk: from the copy of another node of the job, else from the source.

Size and time of a file tell nothing when a disk has changed a byte; only reading does. All ranks of the job call these functions
together: each reads its share of its node's copy. A damaged file is made anew beside the old one and takes its name when it is
whole, so that a loader that reads meanwhile sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stagein.formats.checksums import pwrite_all
from stagein.formats.errors import ChecksumError, SourceError, StageinError, UsageError, destination_error
from stagein.formats.manifest import MANIFEST_NAME, Manifest
from stagein.formats.publish import publish_bytes, publish_file

from .cache import PUBLISHED_MODE, Ready, Store, read_ready
from .chunk_io import ChunkReader, check_sum
from .leases import WriterLease
from .stage_plan import ChunkTable, Flags
from .world import Communicator

DEFAULT_THREADS = 4


@dataclass(frozen=True)
class CopyReport:
    """One node's copy: what was checked, what was found damaged or missing, and where its bytes came from again."""

    node: str
    path: str
    files: int
    nbytes: int
    damaged_files: tuple[str, ...]
    damaged_chunks: int
    healed_from: tuple[str, ...] = ()
    """Names of nodes, or the path of the source; empty when nothing was healed."""


class StagedCopies:
    """The staged copies of one data set on all nodes of the job: `path` on each of them.

    Raises UsageError when there is none, SourceError when its manifest is damaged on every node.
    """

    def __init__(self, path: Path, communicator: Communicator) -> None:
        self._all, self._world = communicator, communicator.world
        self._leads = self._world.local_rank == 0
        self._path = path
        with communicator.together():
            self._ready = _read_ready(path, self._world.node_name)
        self._manifest = self._agree_on_manifest()
        self._table = ChunkTable(self._manifest)
        self._store = Store(path.parent.parent, self._manifest)
        here = set(self._ready.files)
        self._files = [number for number, entry in enumerate(self._table.files) if entry.file in here]
        self._damaged: Flags = np.zeros(len(self._table), dtype=np.bool_)
        self._without_sum: list[str] = []
        """What is wrong and has no chunk: the manifest, links, files that should be empty."""

    def _agree_on_manifest(self) -> Manifest:
        """A manifest that its own id, the folder's name, vouches for; of this node, else of another, else of the source."""
        manifest = _manifest_of(self._path, self._path.name)
        found = self._all.gather_all(manifest is not None)
        if not any(found):
            manifest = _manifest_of(Path(self._ready.source), self._path.name)
            found = self._all.gather_all(manifest is not None)
        with self._all.together():
            if not any(found):
                raise SourceError(
                    f"{self._path / MANIFEST_NAME} is damaged, and so is that of the source {self._ready.source}: evict the "
                    "copy and stage it again"
                )
        content = self._all.broadcast(manifest.to_bytes() if manifest else None, root=found.index(True))
        return manifest or Manifest.parse(content, self._path / MANIFEST_NAME)

    def verify(
        self, progress: Callable[[int, int], None] | None = None, threads: int = DEFAULT_THREADS
    ) -> tuple[CopyReport, ...]:
        """Read all of this node's copy, every rank its share, with `threads` threads each; a report for each node, the same on
        every rank.

        `progress` is called with the bytes that this rank has read and will read.
        """
        here = self._all.on_this_node()
        share = np.flatnonzero(self._table.of_files(self._files))[self._world.local_rank :: self._world.local_size]
        with self._all.together():
            wrong = self._find_wrong(share.tolist(), progress, threads)
        self._damaged[wrong] = True
        self._damaged = here.any_rank(self._damaged)
        here.free()
        self._without_sum = self._find_wrong_without_sum()
        return self._reports(())

    def _find_wrong_without_sum(self) -> list[str]:
        manifest = [] if _manifest_of(self._path, self._path.name) else [MANIFEST_NAME]
        empty = [self._table.files[file].file for file in self._files if not self._table.files[file].nbytes]
        return [
            *manifest,
            *(name for name in empty if not (self._path / name).is_file() or (self._path / name).stat().st_size),
            *(name for name, target in self._store.links(self._path) if not _is_link(self._path / name, target)),
        ]

    def _find_wrong(
        self, chunks: Sequence[int], progress: Callable[[int, int], None] | None, threads: int
    ) -> list[int]:
        reader = ChunkReader(self._path, self._table)
        total_bytes, done_bytes = self._table.total_bytes(np.array(chunks, dtype=np.int64)), 0

        def wrong_of(share: Sequence[int]) -> list[int]:
            nonlocal done_bytes
            buffer, wrong = memoryview(bytearray(self._table.longest_bytes)), []
            for chunk in share:
                try:
                    reader.read(chunk, buffer[: self._table.nbytes[chunk]])
                except (ChecksumError, SourceError):
                    wrong.append(chunk)
                done_bytes += int(self._table.nbytes[chunk])
                if progress is not None:
                    progress(done_bytes, total_bytes)
            reader.close()
            return wrong

        with ThreadPoolExecutor(threads) as pool:
            shares = pool.map(wrong_of, [chunks[number::threads] for number in range(threads)])
            return [chunk for wrong in shares for chunk in wrong]

    def heal(self, source: Path | None = None) -> tuple[CopyReport, ...]:
        """Make every damaged or missing file anew, after `verify`; reports as `verify` gives them.

        source  where chunks come from that no node has; None: where the copy came from.

        Raises ChecksumError or SourceError where that has no good one either, UsageError where it is another data set,
        StageinError while another job stages this one.
        """
        with self._all.together():
            if source is not None and self._world.rank == 0:
                self._refuse_another(source)
        source = source or Path(self._ready.source)
        suppliers: set[str] = set()
        lease = None
        try:
            with self._all.together():
                lease = self._take_lease() if self._leads else None
                if self._leads:
                    self._make_without_sum()
            damaged = self._all.any_rank(self._damaged)
            for file in np.unique(self._table.file_of[damaged]).tolist():
                suppliers |= self._remake(file, source)
            with self._all.together():
                if self._leads:
                    self._store.make_links(self._path)
        finally:
            if lease is not None:
                lease.close()
        return self._reports(tuple(sorted(suppliers)))

    def _refuse_another(self, source: Path) -> None:
        """Refuse what is well, but another data set; what is damaged has its chunks checked one by one."""
        with contextlib.suppress(ChecksumError, SourceError):
            if Manifest.load(source).id != self._manifest.id:
                raise UsageError(f"{source} is not a copy of {self._path}: their ids differ, so nothing is repaired")

    def _make_without_sum(self) -> None:
        links = dict(self._store.links(self._path))
        for name in self._without_sum:
            if name == MANIFEST_NAME:
                self._manifest.save(self._path)
            elif name in links:
                (self._path / name).unlink(missing_ok=True)
            else:
                publish_bytes(self._path / name, b"", mode=PUBLISHED_MODE)

    def _take_lease(self) -> WriterLease:
        lease = self._store.try_lease()
        if lease is None:
            raise StageinError(
                f"{self._path} on node {self._world.node_name} is being staged by {self._store.lease_holder()}: wait for its end"
            )
        return lease

    def _remake(self, file: int, source: Path) -> set[str]:
        """Write this file anew on every node where it is damaged; returns who supplied chunks to this node."""
        chunks = np.arange(self._table.first[file], self._table.first[file + 1])
        wanted = self._leads and file in self._files and self._damaged[chunks].any()
        path = self._path / self._table.files[file].file
        damaged_of = self._all.gather_all(chunks[self._damaged[chunks]].tolist() if file in self._files else None)
        suppliers: set[str] = set()
        with contextlib.ExitStack() as publication:
            part = -1
            with self._all.together():
                if wanted:
                    part = self._begin(path, publication)
                    self._copy_good(chunks[~self._damaged[chunks]].tolist(), part)
            for chunk in sorted({chunk for damaged in damaged_of for chunk in damaged or ()}):
                donors = [
                    rank for rank, damaged in enumerate(damaged_of) if damaged is not None and chunk not in damaged
                ]
                content, supplier = self._supply(chunk, donors, source)
                with self._all.together():
                    if wanted and self._damaged[chunk]:
                        place = self._table.place(chunk)
                        check_sum(place, memoryview(content), f"{place.name} as it came from {supplier}")
                        pwrite_all(part, memoryview(content), place.offset)
                        suppliers.add(supplier)
            with self._all.together():
                publication.close()
        return suppliers

    def _begin(self, path: Path, publication: contextlib.ExitStack) -> int:
        """A descriptor of a file that takes the name `path` when the publication ends."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = publication.enter_context(publish_file(path, mode=PUBLISHED_MODE))
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise destination_error(error, "making again", path) from None
        publication.callback(os.close, descriptor)
        return descriptor

    def _copy_good(self, chunks: Sequence[int], part: int) -> None:
        reader = ChunkReader(self._path, self._table)
        buffer = memoryview(bytearray(self._table.longest_bytes))
        for chunk in chunks:
            content = buffer[: self._table.nbytes[chunk]]
            reader.read(chunk, content)
            pwrite_all(part, content, self._table.place(chunk).offset)
        reader.close()

    def _supply(self, chunk: int, donors: Sequence[int], source: Path) -> tuple[bytes, str]:
        """A chunk and where it came from, on every rank: read once, on the first node that has it, or from the source."""
        rank = donors[0] if donors else 0
        root, supplier = (self._path, f"rank {rank}") if donors else (source, str(source))
        content = bytearray(int(self._table.nbytes[chunk]))
        with self._all.together():
            if self._world.rank == rank:
                if not root.exists():
                    raise SourceError(
                        f"no node has a good copy of all files, and the source {root} is gone: say with --from where one is"
                    )
                reader = ChunkReader(root, self._table)
                reader.read(chunk, memoryview(content))
                reader.close()
                supplier = self._world.node_name if donors else supplier
        supplied, supplier = self._all.broadcast((bytes(content), supplier), root=rank)
        return supplied, supplier

    def _reports(self, suppliers: tuple[str, ...]) -> tuple[CopyReport, ...]:
        damaged_files = [self._table.files[file].file for file in np.unique(self._table.file_of[self._damaged])]
        report = CopyReport(
            node=self._world.node_name,
            path=str(self._path),
            files=len(self._files),
            nbytes=sum(self._table.files[file].nbytes for file in self._files),
            damaged_files=(*damaged_files, *self._without_sum),
            damaged_chunks=int(self._damaged.sum()),
            healed_from=suppliers,
        )
        return tuple(each for each in self._all.gather_all(report if self._leads else None) if each is not None)


def _read_ready(path: Path, node: str) -> Ready:
    ready = read_ready(path, path.name)
    if ready is None:
        raise UsageError(f"{path} on node {node} is no staged copy: `stagein status` shows what is there")
    return ready


def _manifest_of(folder: Path, dataset_id: str) -> Manifest | None:
    with contextlib.suppress(SourceError):
        manifest = Manifest.load(folder)
        return manifest if manifest.id == dataset_id else None
    return None


def _is_link(path: Path, target: str) -> bool:
    return path.is_symlink() and str(path.readlink()) == target
