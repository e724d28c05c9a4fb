"""What moves where: a pure function of the manifest, the nodes and their room. Nothing here touches a disk or a network.

Every byte is addressed by its *chunk*: the chunks of all files of the manifest, in its order, numbered from 0. A plan says
which files end on which node; `rank_work` deals the chunks that are still missing to the ranks that read them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from stagein.formats.errors import NoSpaceError, UsageError
from stagein.formats.manifest import FileEntry, Manifest

from .world import World

Policy: TypeAlias = Literal["auto", "replicate", "partition"]
ChosenPolicy: TypeAlias = Literal["replicate", "partition", "copies"]
Chunks: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
Hops: TypeAlias = NDArray[np.int32]
Resource: TypeAlias = Literal["disk", "source", "network"]

BLOCK_BYTES = 4096
"""Every file is counted in whole blocks of this size, as file systems keep them."""

MINIMUM_BUFFERS = 4
MAXIMUM_BUFFERS = 64


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

    def chunks_of(self, files: Sequence[int]) -> Chunks:
        """Numbers of the chunks of these files, file after file."""
        nothing = [np.zeros(0, np.int64)]
        return np.concatenate(nothing + [np.arange(self.first[file], self.first[file + 1]) for file in files])

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
    """Which files end where. Files are numbers in manifest order.

    policy      replicate (every node gets every shard), partition (one node) or copies (`copies` of them).
    shared      files on every node; their chunks are dealt to the nodes to read.
    first_read  by node, the shards that it reads; they end there and on the next `copies - 1` nodes of the ring.
    ring        node numbers in the order in which chunks are passed on.
    """

    policy: ChosenPolicy
    copies: int
    nodes: tuple[NodeSpace, ...]
    shared: tuple[int, ...]
    first_read: tuple[tuple[int, ...], ...]
    ring: tuple[int, ...]

    def files_of(self, node: int) -> tuple[int, ...]:
        """The files that node number `node` will hold."""
        position = self.ring.index(node)
        readers = [self.ring[position - distance] for distance in range(self.copies if any(self.first_read) else 0)]
        return tuple(sorted(self.shared + tuple(file for reader in readers for file in self.first_read[reader])))

    @cached_property
    def rings(self) -> int:
        """Ranks of each node that pass chunks on to the next node; ranks above that help only with their own node's files."""
        return min(node.ranks for node in self.nodes)

    def hops(self, table: ChunkTable) -> Hops:
        """For each chunk, how many times it is passed on to the next node."""
        of_files = np.full(len(table.files), self.copies - 1, dtype=np.int32)
        of_files[list(self.shared)] = len(self.nodes) - 1
        return of_files[table.file_of]

    def summary(
        self,
        manifest: Manifest,
        gets_bytes: Sequence[int],
        missing_anywhere: Flags,
        *,
        is_there: bool = False,
        rates: Sequence[NodeRates] = (),
        seconds_left: float | None = None,
    ) -> PlanSummary:
        """What `--dry-run` shows. A prediction only where `rates` of all nodes are given and something is to be done.

        gets_bytes        for each node, what it does not have yet of its files.
        missing_anywhere  the chunks that some node does not have yet.
        is_there          every node has its files already, published.
        seconds_left      what is left to the job.
        """
        table = ChunkTable(manifest)
        read_by = _readers(self, table, missing_anywhere)
        nodes = []
        for number, node in enumerate(self.nodes):
            files = self.files_of(number)
            nodes.append(
                NodeSummary(
                    name=node.name,
                    files=len(files),
                    gets_bytes=gets_bytes[number],
                    has_bytes=sum(table.files[file].nbytes for file in files) - gets_bytes[number],
                    free_bytes=node.free_bytes,
                    reads_bytes=table.total_bytes(read_by(number)),
                    rates=rates[number] if rates else None,
                )
            )
        return PlanSummary(
            dataset_id=manifest.id,
            dataset_bytes=manifest.nbytes,
            policy=self.policy,
            copies=self.copies,
            is_there=is_there,
            nodes=tuple(nodes),
            predicted=predict(nodes, seconds_left) if rates and not is_there else None,
        )


class NodeRates(BaseModel):
    """What one node did when all nodes were probed at once, in bytes a second; `network` is None where there is one node."""

    source: float
    network: float | None
    disk: float


class NodeSummary(BaseModel):
    """One node of a plan, in bytes: what it still gets, has already, has free, and reads from the source for the others too."""

    name: str
    files: int
    gets_bytes: int
    has_bytes: int
    free_bytes: int
    reads_bytes: int
    rates: NodeRates | None

    def seconds(self) -> dict[Resource, float]:
        """How long each resource takes for its part at the probed rate; what does not come from the source comes from a node."""
        assert self.rates is not None
        parts: dict[Resource, tuple[int, float | None]] = {
            "disk": (self.gets_bytes, self.rates.disk),
            "source": (self.reads_bytes, self.rates.source),
            "network": (max(0, self.gets_bytes - self.reads_bytes), self.rates.network),
        }
        return {resource: nbytes / rate if rate else 0.0 for resource, (nbytes, rate) in parts.items() if nbytes}


class Prediction(BaseModel):
    """The least time a stage-in can take at the probed rates, and the resource that it hangs on, on which node.

    `fits` says whether it is less than what is left to the job; None where nobody knows what is left.
    """

    seconds: float
    resource: Resource
    node: str
    seconds_left: float | None
    fits: bool | None


class PlanSummary(BaseModel):
    """A plan in numbers."""

    dataset_id: str
    dataset_bytes: int
    is_there: bool
    policy: ChosenPolicy
    copies: int
    nodes: tuple[NodeSummary, ...]
    predicted: Prediction | None


def predict(nodes: Sequence[NodeSummary], seconds_left: float | None) -> Prediction:
    """The bound of a stage-in, in which reads, sends and writes overlap: the longest that any resource of any node takes."""
    seconds, resource, node = max(
        ((seconds, resource, node.name) for node in nodes for resource, seconds in node.seconds().items()),
        default=(0.0, "source", nodes[0].name),
    )
    fits = None if seconds_left is None else seconds < seconds_left
    return Prediction(seconds=seconds, resource=resource, node=node, seconds_left=seconds_left, fits=fits)


@dataclass(frozen=True)
class RankWork:
    """What one rank does.

    position   its node's place in the ring.
    by_origin  chunks that travel its ring and come to this rank, by the place in the ring of the node that reads them, in the
               order in which that one sends them; at `position` those that it reads itself. Empty for a rank outside the rings.
    local      chunks it reads for its own node alone.
    hops       for every chunk of the data set, how many times it is passed on.
    """

    position: int
    by_origin: tuple[Chunks, ...]
    local: Chunks
    hops: Hops

    @property
    def traveling(self) -> Chunks:
        """The chunks that this rank reads and sends to the next node."""
        return self.by_origin[self.position] if self.by_origin else self.local[:0]

    @property
    def reads(self) -> Chunks:
        """The chunks that this rank reads from the source."""
        return np.concatenate([self.traveling, self.local])


def make_plan(
    manifest: Manifest, nodes: Sequence[NodeSpace], policy: Policy = "auto", copies: int | None = None
) -> StagePlan:
    """Choose the files of every node.

    policy  auto: `copies` copies of each shard; without that number as many as there is room for, one for every node at best.
    copies  with the policy auto only: how many nodes get each shard.

    Raises NoSpaceError, naming need, room and node, when the data set does not fit.
    """
    if policy not in ("auto", "replicate", "partition"):
        raise UsageError(f"policy {policy!r} is unknown: choose auto, replicate or partition")
    if copies is not None and (policy != "auto" or not 1 <= copies <= len(nodes)):
        there_are = "there is 1 node" if len(nodes) == 1 else f"there are {len(nodes)} nodes"
        reason = there_are if policy == "auto" else f"they take the place of the policy {policy}"
        raise UsageError(
            f"{copies} copies of each shard cannot be: {reason}; ask for 1 to {len(nodes)}, and for no policy"
        )
    needs = [stored_bytes(entry) for entry in manifest.all_files()]
    short = [node for node in nodes if node.room_bytes < sum(needs)]
    if policy == "replicate" or copies == len(nodes) or (policy == "auto" and copies is None and not short):
        if short:
            _refuse(short[0], sum(needs))
        return _replicated(nodes, len(needs))
    if policy == "partition" or copies is not None:
        return _dealt_out(manifest, nodes, needs, copies or 1)
    return _most_copies(manifest, nodes, needs)


def _replicated(nodes: Sequence[NodeSpace], num_files: int) -> StagePlan:
    ring = tuple(range(len(nodes)))
    return StagePlan("replicate", len(nodes), tuple(nodes), tuple(range(num_files)), ((),) * len(nodes), ring)


def _dealt_out(manifest: Manifest, nodes: Sequence[NodeSpace], needs: list[int], copies: int) -> StagePlan:
    """The plan that puts each shard on exactly `copies` nodes, and the other files on all.

    A record is of use where all of its fields are: the files that hold the same records of different fields stay together.
    """
    num_files, families = len(manifest.shard_files), shard_families(manifest)
    family_bytes = [sum(needs[file] for file in family) for family in families]
    policy: ChosenPolicy = "partition" if copies == 1 else "copies"
    by_room = sorted(range(len(nodes)), key=lambda number: -nodes[number].room_bytes)  # those with room side by side
    for ring in (tuple(range(len(nodes))), tuple(by_room)):
        try:
            dealt = _deal_by_bytes(family_bytes, sum(needs[num_files:]), nodes, copies, ring)
        except NoSpaceError:
            if copies == 1 or ring == tuple(by_room):
                raise
            continue
        first_read = tuple(tuple(sorted(file for each in of_node for file in families[each])) for of_node in dealt)
        shared = tuple(range(num_files, len(needs)))
        return StagePlan(policy, copies, tuple(nodes), shared, first_read, ring)
    raise AssertionError("unreachable")


def shard_families(manifest: Manifest) -> list[tuple[int, ...]]:
    """The shard files, by number, that hold the same records: one of each large field, or one of several."""
    number_of = {shard.file: number for number, shard in enumerate(manifest.shard_files)}
    of_fields = [manifest.shards_of(name) for name in manifest.record_schema.large_fields]
    return [tuple(sorted({number_of[shard.file] for shard in shards})) for shards in zip(*of_fields, strict=True)]


def _most_copies(manifest: Manifest, nodes: Sequence[NodeSpace], needs: list[int]) -> StagePlan:
    """The plan with as many copies of each shard as there is room for, found by halving."""
    plan = _dealt_out(manifest, nodes, needs, 1)
    fits, too_many = 1, len(nodes)
    while too_many - fits > 1:
        copies = (fits + too_many) // 2
        try:
            plan = _dealt_out(manifest, nodes, needs, copies)
            fits = copies
        except NoSpaceError:
            too_many = copies
    return plan


def buffers_within(memory_bytes: int, buffer_bytes: int, num_chunks: int) -> int:
    """How many buffers of one chunk a rank has: what `memory_bytes` holds, but four at least, and no more than are of use."""
    return max(MINIMUM_BUFFERS, min(memory_bytes // buffer_bytes, MAXIMUM_BUFFERS, 2 * num_chunks + 2))


def stored_bytes(entry: FileEntry) -> int:
    """Bytes that a file takes on disk: whole blocks, and one for its name."""
    return -(-entry.nbytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES


def _deal_by_bytes(
    family_bytes: list[int], shared_bytes: int, nodes: Sequence[NodeSpace], copies: int, ring: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Give each family of shards, largest first, to the node that has the fewest bytes to read so far, and to the `copies - 1`
    after it in the ring, among the places where all of these have room for it. Returns by node the families that it reads."""
    for node in nodes:
        if node.room_bytes < shared_bytes:
            _refuse(node, shared_bytes)
    if copies * sum(family_bytes) + shared_bytes * len(nodes) > sum(node.room_bytes for node in nodes):
        _refuse_together(nodes, copies, sum(family_bytes), shared_bytes)
    room_bytes = [nodes[number].room_bytes - shared_bytes for number in ring]
    read: list[list[int]] = [[] for _ in nodes]
    by_load = [(0, position) for position in range(len(ring))]
    for family in sorted(range(len(family_bytes)), key=lambda number: -family_bytes[number]):
        without_room = []
        while by_load:
            load, position = heapq.heappop(by_load)
            owners = [(position + distance) % len(ring) for distance in range(copies)]
            if all(family_bytes[family] <= room_bytes[owner] for owner in owners):
                for owner in owners:
                    room_bytes[owner] -= family_bytes[family]
                read[ring[position]].append(family)
                heapq.heappush(by_load, (load + family_bytes[family], position))
                break
            without_room.append((load, position))
        else:
            _refuse_together(nodes, copies, sum(family_bytes), shared_bytes)
        for entry in without_room:
            heapq.heappush(by_load, entry)
    return tuple(tuple(sorted(numbers)) for numbers in read)


def _refuse(node: NodeSpace, need_bytes: int) -> NoReturn:
    raise NoSpaceError(
        f"the data set needs {need_bytes:,} bytes, but node {node.name} has room for {node.room_bytes:,}: make room there, "
        "choose another destination, or let more nodes share it with the policy partition"
    )


def _refuse_together(nodes: Sequence[NodeSpace], copies: int, shard_bytes: int, shared_bytes: int) -> NoReturn:
    need_bytes = copies * shard_bytes + shared_bytes * len(nodes)
    if len(nodes) == 1:
        _refuse(nodes[0], need_bytes)
    room_bytes = sum(node.room_bytes for node in nodes)
    tightest = min(nodes, key=lambda node: node.room_bytes)
    how = "partitioned" if copies == 1 else f"with {copies} copies"
    raise NoSpaceError(
        f"{how} over {len(nodes)} nodes the data set needs {need_bytes:,} bytes, but they have room for {room_bytes:,} "
        f"(least on node {tightest.name}: {tightest.room_bytes:,}): make room, take more nodes or choose another destination"
    )


def rank_work(plan: StagePlan, table: ChunkTable, world: World, missing_anywhere: Flags) -> RankWork:
    """Deal the chunks that some node misses: each is read by exactly one rank of the whole job.

    Chunk i of the shared files is read on node i mod N, so that the load depends on no file's size; shards are read on the
    first of the nodes that get them. What travels is dealt to the rings, what stays on a node to all of its ranks.
    """
    hops = plan.hops(table)
    position = plan.ring.index(world.node)
    read_by = _readers(plan, table, missing_anywhere)
    read_here = read_by(world.node)
    local = _dealt(read_here[hops[read_here] == 0], world.local_rank, world.local_size)
    if world.nodes == 1 or world.local_rank >= plan.rings:
        return RankWork(position, (), local, hops)
    by_origin = []
    for place, node in enumerate(plan.ring):
        chunks = read_by(node)
        traveling = _dealt(chunks[hops[chunks] > 0], world.local_rank, plan.rings)
        by_origin.append(traveling[hops[traveling] >= (position - place) % world.nodes])
    return RankWork(position, tuple(by_origin), local, hops)


def _readers(plan: StagePlan, table: ChunkTable, missing_anywhere: Flags) -> Callable[[int], Chunks]:
    """A function from a node to the chunks that it reads: its part of the shared files, and its own shards."""
    shared = _whole_first(table, np.flatnonzero(table.of_files(plan.shared) & missing_anywhere))

    def read_by(node: int) -> Chunks:
        own = table.chunks_of(plan.first_read[node])
        own = _whole_first(table, own[missing_anywhere[own]])
        return np.concatenate([_dealt(shared, node, len(plan.nodes)), own])

    return read_by


def _dealt(chunks: Chunks, receiver: int, receivers: int) -> Chunks:
    """What one receiver gets when chunks are dealt in turns."""
    return chunks[receiver::receivers]


def _whole_first(table: ChunkTable, chunks: Chunks) -> Chunks:
    """The chunks, whole ones first, so that dealing them in turns balances bytes; otherwise in file order."""
    return chunks[np.argsort(-table.nbytes[chunks], kind="stable")]
