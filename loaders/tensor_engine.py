"""The engine for tensors without a graph: records are read, and decoded, straight into the batch that is delivered."""

import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from stagein.formats.errors import StageinError
from stagein.formats.record_reader import RecordReader

from .batches import BatchTask, HostBatch, RowFailure
from .buffer_ring import BufferRing
from .dataset import RecordDataset, typed
from .engine import CPU, Delivered, EngineOptions, OnFailure
from .stats import DecodeClock

_MAX_IDLE_BATCHES = 8
"""As many as a caller that was slow for a moment leaves behind with two workers: to drop some, and make them anew, cost an eighth."""


def delivers_tensors(dataset: RecordDataset) -> bool:
    """Whether every field asked for has a fixed shape, so that batches need nothing but reading."""
    return all(dataset.records.schema.fields[name].kind == "tensor" for name in dataset.fields)


class TensorEngine:
    """See the module. Raises nothing of its own: `delivers_tensors` says where it fits."""

    delivers_on = CPU

    def __init__(self, dataset: RecordDataset, options: EngineOptions, on_failure: OnFailure) -> None:
        self._dataset, self._options, self._on_failure = dataset, options, on_failure
        self._ring = BufferRing(_MAX_IDLE_BATCHES * max(1, len(self._readers)), pinned=options.pin_memory)

    @property
    def description(self) -> str:
        return "records read straight into the batch"

    @property
    def _readers(self) -> dict[str, RecordReader]:
        """Not kept: a loader can be sent to another process, where its data set opens other ones."""
        return {name: reader for name, reader in self._dataset.records.readers.items() if name in self._dataset.fields}

    def load(self, task: BatchTask) -> HostBatch:
        started = time.perf_counter()
        ids, readers = task.rows.ids, self._readers
        large = {}
        for name, reader in readers.items():
            large[name] = self._ring.take((len(ids), *reader.field.fixed_shape), reader.field.stored_dtype)
        clock = DecodeClock()
        ids = self._fill(task, large, clock)
        fields = self._dataset.records.schema.fields
        ready = {
            name: typed(fields[name], large[name]) if name in large else self._dataset.rows(name, ids)
            for name in self._dataset.fields
        }
        num_bytes = sum(int(reader.index.nbytes[ids].sum()) for reader in readers.values())
        num_decompressed = sum(large[name].nbytes for name, reader in readers.items() if reader.field.codec)
        times = clock.times(time.perf_counter() - started, num_bytes, num_decompressed)
        return HostBatch(task, ids, {}, ready, len(ids), times)

    def transform(self, batches: Iterator[HostBatch]) -> Iterator[Delivered]:
        for batch in batches:
            yield batch, {name: torch.as_tensor(rows) for name, rows in batch.ready.items()}

    def _fill(self, task: BatchTask, large: dict[str, NDArray[np.generic]], clock: DecodeClock) -> NDArray[np.int64]:
        """Read the large fields; the ids of what is in them: those of the task, but for bad ones that were replaced."""
        ids = task.rows.ids
        try:
            for name, reader in self._readers.items():
                reader.read_tensors(ids, large[name], decode_nanoseconds=clock.nanoseconds)
            return ids
        except StageinError:
            while failures := self._read_each(ids, large):
                ids = self._on_failure(task, ids, failures)
        return ids

    def _read_each(self, ids: NDArray[np.int64], large: dict[str, NDArray[np.generic]]) -> list[RowFailure]:
        """Read the samples one by one; those that failed, each with its first error."""
        failures = []
        for row, sample in enumerate(ids.tolist()):
            try:
                for name, reader in self._readers.items():
                    reader.read_tensors([sample], large[name][row : row + 1])
            except StageinError as error:
                failures.append(RowFailure(row, error))
        return failures
