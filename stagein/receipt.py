"""The receipt of a stage-in: what was read, sent, written and checked on which node, and how fast."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from .stage_plan import ChosenPolicy, Resource

_AS_LONG = 1.05
"""A send takes as long as its receiver lets it wait: the network is the cause only when it was busy for longer than the rest."""


class NodeReceipt(BaseModel):
    """One node's part.

    Phases are in wall-clock seconds. `source_seconds`, `network_seconds` and `disk_seconds` are those of the transfer in which a
    read, a send or a write was under way, of the rank where that was longest. `verified_chunks` counts checks at the source
    and on arrival, `damaged_chunks` those that came damaged and were read from the source instead; `reused_bytes` were on the node already,
    `evicted_bytes` of other data sets made room.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    node: str
    path: str
    ranks: int
    files: int
    nbytes: int
    read_bytes: int
    sent_bytes: int
    received_bytes: int
    written_bytes: int
    reused_bytes: int
    evicted_bytes: int
    verified_chunks: int
    damaged_chunks: int
    source_seconds: float
    network_seconds: float
    disk_seconds: float
    prepare_seconds: float
    transfer_seconds: float
    publish_seconds: float

    @property
    def seconds(self) -> float:
        """From the first look at the manifest to READY."""
        return self.prepare_seconds + self.transfer_seconds + self.publish_seconds

    @property
    def bytes_per_second(self) -> float:
        """Bytes written to this node over the time of all phases."""
        return self.written_bytes / self.seconds if self.seconds else 0.0


class Bound(BaseModel):
    """What the time of a stage-in hung on: the resource that was busy for longest, and where.

    At the rate at which it served, nothing could have been faster than `seconds`; `percent` is the share of them in the time
    of transfer and publication. The disk is busy too while files are made durable.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resource: Resource
    node: str
    seconds: float
    percent: float


class Receipt(BaseModel):
    """The whole job. `moved_nothing` says that no node lacked a byte of its files; there is no bound then."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stagein_version: str
    dataset_id: str
    source: str
    policy: ChosenPolicy
    copies: int
    dataset_bytes: int
    moved_nothing: bool
    seconds: float
    bound: Bound | None
    nodes: tuple[NodeReceipt, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes read from the source, over all nodes; each byte of a data set is read once."""
        return sum(node.read_bytes for node in self.nodes)

    @property
    def written_bytes(self) -> int:
        return sum(node.written_bytes for node in self.nodes)

    @property
    def slowest(self) -> NodeReceipt:
        """The node that took longest."""
        return max(self.nodes, key=lambda node: node.seconds)

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode() + b"\n"


def find_bound(nodes: Sequence[NodeReceipt]) -> Bound | None:
    """The resource that was busy for longest, None when nothing was moved."""
    seconds = max(node.transfer_seconds + node.publish_seconds for node in nodes)
    if not seconds or not any(node.written_bytes for node in nodes):
        return None
    busy: list[tuple[float, Resource, str]] = []
    for node in nodes:
        busy.append((node.disk_seconds + node.publish_seconds, "disk", node.node))
        busy.append((node.source_seconds, "source", node.node))
        busy.append((node.network_seconds / _AS_LONG, "network", node.node))
    longest, resource, where = max(busy, key=lambda entry: entry[0])
    return Bound(resource=resource, node=where, seconds=longest, percent=100 * longest / seconds)
