"""The engine for DALI graphs: a user's on any device, the ready ones where there is a GPU."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch

from stagein.formats.errors import UsageError

from .batches import BatchReader, BatchTask, HostBatch
from .dali import import_dali
from .dali_pipeline import QUEUE_DEPTH, GraphPipeline, RowsFailedError
from .dataset import RecordDataset
from .engine import Delivered, EngineOptions, OnFailure
from .graphs import Graph, is_known_to_dali
from .inflate import InflateOnGpu


class DaliEngine:
    """Runs batches through a DALI pipeline. Raises UsageError where there is no DALI, or none for the primary field."""

    def __init__(
        self, dataset: RecordDataset, graph: Graph, seed: int, options: EngineOptions, on_failure: OnFailure
    ) -> None:
        import_dali()
        _refuse_unknown_type(dataset)
        self._dataset, self._graph, self._options = dataset, graph, options
        self._reader = BatchReader(dataset, graph, seed, on_failure, read_for_empty=True)
        self._idle_pipeline: GraphPipeline | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what runs: a loader can be sent to another process."""
        return {**vars(self), "_idle_pipeline": None}

    @property
    def delivers_on(self) -> torch.device:
        return self._options.device

    @property
    def description(self) -> str:
        inflates = ", lz4 inflated on the GPU" if isinstance(self._graph, InflateOnGpu) else ""
        return f"DALI with {self._options.decode_threads} threads{inflates}"

    def load(self, task: BatchTask) -> HostBatch:
        return self._reader.read(task)

    def transform(self, batches: Iterator[HostBatch]) -> Iterator[Delivered]:
        """Through one pipeline, and through a larger one from a batch on that has more rows than any before."""
        pipeline, self._idle_pipeline = self._idle_pipeline, None
        if pipeline is not None and pipeline.process != os.getpid():
            pipeline = None  # it would wait for its threads for ever
        try:
            while (first := next(batches, None)) is not None:
                if pipeline is None or pipeline.max_rows < len(first.ids):
                    if pipeline is not None:
                        pipeline.close()
                    pipeline = self._build(first)
                try:
                    yield from pipeline.run(itertools.chain([first], batches))
                    repaired = []
                except RowsFailedError as failed:
                    repaired = [self._reader.repair(failed.batch, failed.failures)]
                batches = itertools.chain(repaired, pipeline.take_back(), batches)
                if repaired:
                    pipeline.close()  # in an unknown state
                    pipeline = None
            if self._options.keep_between_epochs:
                self._idle_pipeline, pipeline = pipeline, None
        finally:
            if pipeline is not None:
                pipeline.close()

    def _build(self, example: HostBatch) -> GraphPipeline:
        options, dataset = self._options, self._dataset

        def row_place(batch: HostBatch, row: int) -> str:  # no method: pipeline and engine would keep each other alive
            return dataset.place(int(batch.ids[row]))

        depth = QUEUE_DEPTH if options.device.type == "cpu" else 1 + options.prefetch_to_device
        return GraphPipeline(
            self._graph,
            example,
            len(example.ids),
            options.device,
            options.decode_threads,
            depth,
            row_place,
            dataset.listed_fields,
        )


def _refuse_unknown_type(dataset: RecordDataset) -> None:
    schema = dataset.records.schema
    field = schema.primary_field
    if not is_known_to_dali(field):
        raise UsageError(
            f"DALI has no type for {'text' if field.kind == 'text' else field.dtype}, so that no graph takes {schema.primary!r}: leave transform= out, or "
            "give PerSample(function)"
        )
