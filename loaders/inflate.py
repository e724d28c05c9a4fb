"""LZ4 inflate on the GPU: compressed records cross the bus, and DALI hands graphs what they are.

Records of the codec `lz4` are blocks that are equally long when inflated (`formats.codecs`), which is what DALI's
`decoders.inflate` takes: it makes uint8 `[blocks, block bytes]` of each record, read then as what it is. On the CPU, and
for what DALI has no type for, records are decoded as they are read, to the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stagein.formats.codecs import lz4_block_bytes
from stagein.formats.errors import UsageError
from stagein.formats.schema import Field

from .dali import import_dali
from .dataset import RecordDataset
from .graphs import Columns, DecodeDevice, Graph, HostPlan, Nodes, SampleBatch, is_known_to_dali

MAX_BLOCK_BYTES = 16 << 20
"""The longest block that nvCOMP's LZ4, on which DALI builds, inflates."""


@dataclass(frozen=True)
class AsStored:
    """The graph that leaves records as they are."""

    field: str

    def plan(self, batch: SampleBatch) -> HostPlan:
        return HostPlan({}, ready={name: rows for name, rows in batch.columns.items() if name != self.field})

    def build(self, nodes: Nodes, decode_device: DecodeDevice) -> Nodes:
        return {self.field: nodes[self.field]}


@dataclass(frozen=True)
class InflateOnGpu:
    """`graph`, fed with compressed records of the field `name`."""

    graph: Graph
    name: str
    field: Field

    def plan(self, batch: SampleBatch) -> HostPlan:
        return self.graph.plan(batch)

    def block_table(self, stored: list[NDArray[np.uint8]], place: Callable[[int], str]) -> Columns:
        """What to feed beside the stored records: where the blocks of each begin, and how long they are. Raises ChecksumError
        for a record without such blocks, which `place` names by its row."""
        from stagein.formats.lz4_blocks import find_lz4_blocks  # its kernel takes numba, half a second to load

        blocks = find_lz4_blocks(stored, self.field.record_bytes, place)
        return {self._offset: blocks.offset, self._nbytes: blocks.nbytes}

    def build(self, nodes: Nodes, decode_device: DecodeDevice) -> Nodes:
        assert decode_device == "mixed"
        others = {name: node for name, node in nodes.items() if name not in (self._offset, self._nbytes)}
        blocks = import_dali().fn.decoders.inflate(
            nodes[self.name].gpu(),
            chunk_offsets=nodes[self._offset],
            chunk_sizes=nodes[self._nbytes],
            shape=[lz4_block_bytes(self.field.record_bytes)],
        )
        return self.graph.build({**others, self.name: as_tensors(blocks, self.field)}, decode_device)

    @property
    def _offset(self) -> str:
        return f"{self.name} block offset"

    @property
    def _nbytes(self) -> str:
        return f"{self.name} block bytes"


def as_tensors(blocks: object, field: Field) -> object:
    """The node of records of `field`, on the same memory as `blocks`: uint8 `[blocks, block bytes]` each."""
    dali = import_dali()
    dtype = dali.types.to_dali_type(field.array_dtype.name)
    return dali.fn.reinterpret(blocks, shape=list(field.fixed_shape), dtype=dtype)


def inflating(graph: Graph | None, dataset: RecordDataset) -> InflateOnGpu:
    """`graph`, or none, over the records of the primary field as the GPU inflates them."""
    schema = dataset.records.schema
    return InflateOnGpu(graph or AsStored(schema.primary), schema.primary, schema.primary_field)


def why_not_inflated(dataset: RecordDataset, device: torch.device) -> str | None:
    """Why the records of the primary field are decoded on the CPU; None: they can be inflated on `device`."""
    records = dataset.records
    field, name = records.schema.primary_field, records.schema.primary
    if field.codec is None or name not in dataset.fields:
        return "there is nothing to decompress"
    if field.codec.name != "lz4":
        return f"no GPU decoder takes {field.codec.name}, only lz4"
    if device.type != "cuda":
        return f"batches are delivered on {device}"
    return why_unfit(field, records.manifest.container) or _why_no_dali()


def why_unfit(field: Field, container: str) -> str | None:
    """Why lz4 records of `field` in such shards are nothing for a GPU; None: they are."""
    if container == "foreign":
        return "files of others have LZ4 blocks of any size"
    if not is_known_to_dali(field):
        return f"DALI has no type for {field.dtype}"
    if not 0 < lz4_block_bytes(field.record_bytes) <= MAX_BLOCK_BYTES:
        return f"records of {field.record_bytes} bytes are no blocks of at most {MAX_BLOCK_BYTES} bytes"
    return None


def _why_no_dali() -> str | None:
    try:
        import_dali()
    except UsageError:
        return "NVIDIA DALI cannot be imported"
    return None
