"""The receipt of a stage-in: what was read, sent, written and checked on which node, and how fast."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from .stage_plan import ChosenPolicy


class NodeReceipt(BaseModel):
    """One node's part.

    Phases are in wall-clock seconds; `read_seconds` and `write_seconds` are what the helper threads of all ranks spent, together.
    `verified_chunks` counts checks at the source and on arrival; `reused_bytes` were on the node already,
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
    read_seconds: float
    write_seconds: float
    prepare_seconds: float
    transfer_seconds: float
    publish_seconds: float

    @property
    def seconds(self) -> float:
        """From the first look at the manifest to READY."""
        return self.prepare_seconds + self.transfer_seconds + self.publish_seconds

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes written to this node over the time of all phases, in 1e9 bytes a second."""
        return self.written_bytes / 1e9 / self.seconds if self.seconds else 0.0


class Receipt(BaseModel):
    """The whole job. `moved_nothing` says that every node had its copy already."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stagein_version: str
    dataset_id: str
    source: str
    policy: ChosenPolicy
    dataset_bytes: int
    moved_nothing: bool
    seconds: float
    nodes: tuple[NodeReceipt, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes read from the source, over all nodes; each byte of a data set is read once."""
        return sum(node.read_bytes for node in self.nodes)

    @property
    def written_bytes(self) -> int:
        return sum(node.written_bytes for node in self.nodes)

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode() + b"\n"
