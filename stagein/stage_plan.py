"""What moves where: a pure function of the manifest, the nodes and their room. Nothing here touches a disk or a network.

Every byte is addressed by its *chunk*: the chunks of all files of the manifest, in its order, numbered from 0. A plan says
which files end on which node; `rank_work` deals the chunks that are still missing to the ranks that read them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from stagein.formats.errors import NoSpaceError, UsageError
from stagein.formats.manifest import FileEntry, Manifest

from .world import World

Policy: TypeAlias = Literal["auto", "replicate", "partition"]
ChosenPolicy: TypeAlias = Literal["replicate", "partition"]
Chunks: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]

BLOCK_BYTES = 4096
"""Every file is counted in whole blocks of this size, as file systems keep them."""


@dataclass(frozen=True)
class Place:
    """Where one chunk lies: `nbytes` from `offset` of the file number `file`, and what their sum must be."""

    file: int
    name: str
    offset: int
    nbytes: int
    chunk_sum: bytes

    def __str__(self) -> str:
        return f"{self.name} at byte {self.offset}"


class ChunkTable:
    """The chunks of a data set by number: a million of them are four arrays, not a million objects."""

    def __init__(self, manifest: Manifest) -> None:
        self.files: tuple[FileEntry, ...] = tuple(manifest.all_files())
        self._chunk_bytes = manifest.chunk_bytes
        counts = np.array([entry.num_chunks(manifest.chunk_bytes) for entry in self.files], dtype=np.int64)
        self.first: Chunks = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        """Number of each file's first chunk, and behind the last file the number of chunks."""
        self.file_of: Chunks = np.repeat(np.arange(len(self.files)), counts)
        file_bytes = np.array([entry.nbytes for entry in self.files], dtype=np.int64)
        offsets = (np.arange(len(self)) - self.first[self.file_of]) * self._chunk_bytes
        self.nbytes: Chunks = np.minimum(file_bytes[self.file_of] - offsets, self._chunk_bytes)

    def __len__(self) -> int:
        return int(self.first[-1])

    def place(self, chunk: int) -> Place:
        """Where chunk number `chunk` lies."""
        file = int(self.file_of[chunk])
        number = chunk - int(self.first[file])
        entry = self.files[file]
        offset = number * self._chunk_bytes
        return Place(file, entry.file, offset, int(self.nbytes[chunk]), entry.chunk_sum(number))

    def of_files(self, files: Sequence[int]) -> Flags:
        """Flags of the chunks that belong to these files."""
        chosen = np.zeros(len(self.files), dtype=np.bool_)
        chosen[list(files)] = True
        return chosen[self.file_of]

    @property
    def longest_bytes(self) -> int:
        """Bytes of the largest chunk."""
        return int(self.nbytes.max(initial=0))

    def total_bytes(self, chunks: Chunks | Flags) -> int:
        return int(self.nbytes[chunks].sum())


@dataclass(frozen=True)
class NodeSpace:
    """A node, its number of ranks, the free bytes at its destination and the bytes of this data set it already holds there."""

    name: str
    ranks: int
    free_bytes: int
    held_bytes: int = 0

    @property
    def room_bytes(self) -> int:
        """What this data set may fill: a second run plans as the first one did."""
        return self.free_bytes + self.held_bytes


@dataclass(frozen=True)
class StagePlan:
    """Which files end where: `shared` ones on every node, `owned[n]` on node n only. Files are numbers in manifest order."""

    policy: ChosenPolicy
    nodes: tuple[NodeSpace, ...]
    shared: tuple[int, ...]
    owned: tuple[tuple[int, ...], ...]

    def files_of(self, node: int) -> tuple[int, ...]:
        """The files that node number `node` will hold."""
        return tuple(sorted(self.shared + self.owned[node]))

    @cached_property
    def rings(self) -> int:
        """Ranks of each node that pass chunks on to the next node; ranks above that help only with their own node's files."""
        return min(node.ranks for node in self.nodes)

    def summary(self, manifest: Manifest) -> PlanSummary:
        """What `--dry-run` shows, for data that is nowhere yet: what is held already will not be read again."""
        table = ChunkTable(manifest)
        traveling = _by_size(table, table.of_files(self.shared))
        nodes = []
        for number, node in enumerate(self.nodes):
            shared_bytes = table.total_bytes(_dealt(traveling, number, len(self.nodes)))
            owned_bytes = sum(table.files[file].nbytes for file in self.owned[number])
            files = self.files_of(number)
            gets_bytes = sum(table.files[file].nbytes for file in files)
            nodes.append(
                NodeSummary(
                    name=node.name,
                    files=len(files),
                    gets_bytes=gets_bytes,
                    held_bytes=node.held_bytes,
                    free_bytes=node.free_bytes,
                    reads_bytes=shared_bytes + owned_bytes,
                )
            )
        return PlanSummary(dataset_id=manifest.id, policy=self.policy, nodes=tuple(nodes))


class NodeSummary(BaseModel):
    """One node of a plan, in bytes: what it gets, has on disk already, has free, and reads from the source for the others too."""

    name: str
    files: int
    gets_bytes: int
    held_bytes: int
    free_bytes: int
    reads_bytes: int


class PlanSummary(BaseModel):
    """A plan in numbers."""

    dataset_id: str
    policy: ChosenPolicy
    nodes: tuple[NodeSummary, ...]


@dataclass(frozen=True)
class RankWork:
    """What one rank does.

    by_origin  chunks that travel its ring, by the node that reads them, in the order in which they are sent; every one of
               them passes this rank. Empty for a rank outside the rings.
    local      chunks it reads for its own node alone.
    """

    by_origin: tuple[Chunks, ...]
    local: Chunks

    def reads(self, node: int) -> Chunks:
        """The chunks that this rank, on node number `node`, reads from the source."""
        return np.concatenate([self.by_origin[node], self.local]) if self.by_origin else self.local


def make_plan(manifest: Manifest, nodes: Sequence[NodeSpace], policy: Policy) -> StagePlan:
    """Choose the files of every node. `auto` replicates where every node has the room, and partitions where one has not.

    Raises NoSpaceError, naming need, room and node, when the data set does not fit.
    """
    if policy not in ("auto", "replicate", "partition"):
        raise UsageError(f"policy {policy!r} is unknown: choose auto, replicate or partition")
    files = tuple(manifest.all_files())
    needs = [stored_bytes(entry) for entry in files]
    short = [node for node in nodes if node.room_bytes < sum(needs)]
    if policy == "replicate" and short:
        _refuse(short[0], sum(needs))
    if policy == "replicate" or (policy == "auto" and not short):
        return StagePlan("replicate", tuple(nodes), tuple(range(len(files))), ((),) * len(nodes))
    shards = len(manifest.shards)
    owned = _deal_by_bytes(needs[:shards], sum(needs[shards:]), nodes)
    return StagePlan("partition", tuple(nodes), tuple(range(shards, len(files))), owned)


def stored_bytes(entry: FileEntry) -> int:
    """Bytes that a file takes on disk: whole blocks, and one for its name."""
    return -(-entry.nbytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES


def _deal_by_bytes(
    shard_bytes: list[int], shared_bytes: int, nodes: Sequence[NodeSpace]
) -> tuple[tuple[int, ...], ...]:
    """Give each shard, largest first, to the node with the least so far among those that have room for it."""
    owned: list[list[int]] = [[] for _ in nodes]
    for node in nodes:
        if node.room_bytes < shared_bytes:
            _refuse(node, shared_bytes)
    by_load = [(0, number) for number in range(len(nodes))]
    for shard in sorted(range(len(shard_bytes)), key=lambda number: -shard_bytes[number]):
        without_room = []
        while by_load:
            load, number = heapq.heappop(by_load)
            if shared_bytes + load + shard_bytes[shard] <= nodes[number].room_bytes:
                owned[number].append(shard)
                heapq.heappush(by_load, (load + shard_bytes[shard], number))
                break
            without_room.append((load, number))
        else:
            _refuse_together(nodes, sum(shard_bytes) + shared_bytes * len(nodes))
        for entry in without_room:
            heapq.heappush(by_load, entry)
    return tuple(tuple(sorted(numbers)) for numbers in owned)


def _refuse(node: NodeSpace, need_bytes: int) -> None:
    raise NoSpaceError(
        f"the data set needs {need_bytes:,} bytes, but node {node.name} has room for {node.room_bytes:,}: make room there, "
        "choose another destination, or let more nodes share it with the policy partition"
    )


def _refuse_together(nodes: Sequence[NodeSpace], need_bytes: int) -> None:
    room_bytes = sum(node.room_bytes for node in nodes)
    tightest = min(nodes, key=lambda node: node.room_bytes)
    raise NoSpaceError(
        f"partitioned over {len(nodes)} nodes the data set needs {need_bytes:,} bytes, but they have room for {room_bytes:,} "
        f"(least on node {tightest.name}: {tightest.room_bytes:,}): make room, take more nodes or choose another destination"
    )


def rank_work(
    plan: StagePlan, table: ChunkTable, world: World, missing_anywhere: Flags, missing_here: Flags
) -> RankWork:
    """Deal the missing chunks: each is read by exactly one rank of the whole job.

    Shared files that some node misses (`missing_anywhere`) travel the rings; chunk i of them is read on node i mod N, so that
    the load depends on no file's size. Owned files that this node misses (`missing_here`) are dealt to all its ranks.
    On a single node nothing travels.
    """
    shared = table.of_files(plan.shared) & missing_anywhere
    owned = table.of_files(plan.owned[world.node]) & missing_here
    if world.nodes == 1:
        return RankWork((), _dealt(_by_size(table, shared | owned), world.local_rank, world.local_size))
    local = _dealt(_by_size(table, owned), world.local_rank, world.local_size)
    if world.local_rank >= plan.rings:
        return RankWork((), local)
    traveling = _by_size(table, shared)
    of_nodes = (_dealt(traveling, node, world.nodes) for node in range(world.nodes))
    by_origin = tuple(_dealt(chunks, world.local_rank, plan.rings) for chunks in of_nodes)
    return RankWork(by_origin, local)


def _dealt(chunks: Chunks, receiver: int, receivers: int) -> Chunks:
    """What one receiver gets when chunks are dealt in turns."""
    return chunks[receiver::receivers]


def _by_size(table: ChunkTable, flags: Flags) -> Chunks:
    """The flagged chunks, whole ones first, so that dealing them in turns balances bytes; otherwise in file order."""
    chunks = np.flatnonzero(flags)
    return chunks[np.argsort(-table.nbytes[chunks], kind="stable")]
