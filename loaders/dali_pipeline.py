"""Batches through a DALI pipeline: numpy views in, dicts of torch tensors out, in order, without copies on the way out.

The pipeline is fed by `external_source` and runs ahead of the caller in DALI's own threads. DALI's dynamic executor
(the default) is essential: only it gives each batch memory of its own, which the tensors then own.
"""

import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils.dlpack

from stagein.formats.errors import SourceError, StageinError, UsageError
from stagein.formats.record_reader import PackedRecords

from .batches import HostBatch, RowFailure
from .dali import import_dali
from .engine import Delivered
from .forks import leave_to_parent
from .graphs import Graph

QUEUE_DEPTH = 2
"""Batches that DALI works on at a time: the one that the caller asks for, and those ahead of it."""


class RowsFailedError(Exception):
    """Some rows of a batch cannot be decoded. The batch, and those after it, are not delivered: see `take_back`."""

    def __init__(self, batch: HostBatch, failures: list[RowFailure]) -> None:
        super().__init__(failures[0].error)
        self.batch, self.failures = batch, failures


class GraphPipeline:
    """A graph built for batches like `example`, of at most `max_rows` rows.

    row_place      names a record for errors.
    listed_fields  delivered as lists, one entry a record, where the graph leaves them as they are.
    """

    def __init__(
        self,
        graph: Graph,
        example: HostBatch,
        max_rows: int,
        device: torch.device,
        num_threads: int,
        queue_depth: int,
        row_place: Callable[[HostBatch, int], str],
        listed_fields: Collection[str],
    ) -> None:
        self.max_rows = max_rows
        self.process = os.getpid()
        """That its threads are in."""
        self._graph, self._device, self._row_place = graph, device, row_place
        self._source = _Source(tuple(example.inputs), max_rows, queue_depth)
        self._pipeline, outputs = _build(graph, self._source, device, num_threads)
        self._output_names = tuple(outputs)
        self._listed = {name for name, fed in outputs.items() if fed in listed_fields}
        """Outputs that come as lists, also where the rows of a batch happen to have one shape."""

    def run(self, batches: Iterator[HostBatch]) -> Iterator[Delivered]:
        """Each batch with its tensors, until `batches` ends, fails, or has one of more than `max_rows` rows.

        What was taken of `batches` and not delivered is had from `take_back`. Raises RowsFailedError for records that
        cannot be decoded, UsageError for a field whose rows differ in shape, StageinError for a graph that fails as a whole.
        """
        source = self._source
        source.start(batches)
        self._pipeline.reset()
        while True:
            source.top_up()
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            try:
                outputs = self._pipeline.run(stream)
            except StopIteration:
                return
            except RuntimeError as error:
                cause = error.with_traceback(None)  # its frames would keep the pipeline and its threads alive
                batch = source.in_flight.popleft()
                if failures := self._failures(batch):
                    raise RowsFailedError(batch, failures) from cause
                raise StageinError(
                    f"{batch.task.place}: the graph failed on the batch as a whole: {_reason(cause)}"
                ) from cause
            batch = source.in_flight.popleft()
            named = zip(self._output_names, outputs, strict=True)
            tensors: dict[str, Any] = {name: _as_tensor(output) for name, output in named}
            tensors |= {name: _on_device(value, self._device) for name, value in batch.ready.items()}
            tensors |= {name: list(tensors[name]) for name in self._listed}
            yield batch, {name: tensor[: batch.num_rows] for name, tensor in tensors.items()}

    def take_back(self) -> Iterator[HostBatch]:
        """What `run` took and did not deliver; then the exception of its iterator, if that is how it ended."""
        return self._source.take_back()

    def close(self) -> None:
        """End DALI's threads and forget what is in flight."""
        self._pipeline = None

    def _failures(self, batch: HostBatch) -> list[RowFailure]:
        """DALI says that a batch failed, not which record of it: run them one by one.

        Raises UsageError where it is not the decoder that fails: then the graph is at fault, not the data.
        """
        failures = []
        for row in range(batch.num_rows):
            single = _Source(tuple(batch.inputs), 1, QUEUE_DEPTH)
            inputs = {name: [values[row]] for name, values in batch.inputs.items()}
            single.start(iter([replace(batch, ids=batch.ids[row : row + 1], inputs=inputs)]))
            single.top_up()
            pipeline, _ = _build(self._graph, single, self._device, num_threads=1)
            try:
                pipeline.run()
            except RuntimeError as error:
                place = self._row_place(batch, row)
                if (operator := _failed_operator(error)) is not None and "decode" not in operator:
                    raise UsageError(
                        f"{batch.task.place}: the graph fails on {place}, in {operator}: {_reason(error)}: that is no fault of the data, so "
                        "change the graph"
                    ) from None
                failures.append(RowFailure(row, SourceError(f"{place} cannot be decoded: {_reason(error)}")))
        return failures


class _Source:
    """What DALI calls for its next batch. It holds what is in flight: DALI reads the records where they lie.

    Batches are taken from the caller's iterator outside the call, so that an exception never passes through DALI.
    """

    def __init__(self, names: tuple[str, ...], max_rows: int, queue_depth: int) -> None:
        self.names = names
        self.queue_depth = queue_depth
        self.max_rows = max_rows
        self.in_flight: deque[HostBatch] = deque()
        self._failure: Exception | None = None
        """Raised by `batches`; due once the batches before it are delivered."""
        self._too_large: HostBatch | None = None
        self._waiting: deque[HostBatch] = deque()
        self._batches: Iterator[HostBatch] = iter(())

    def start(self, batches: Iterator[HostBatch]) -> None:
        self._batches = batches

    def take_back(self) -> Iterator[HostBatch]:
        batches = [*self.in_flight, *self._waiting, *filter(None, [self._too_large])]
        failure, self._failure, self._too_large = self._failure, None, None
        self.in_flight.clear()
        self._waiting.clear()
        return _then_raise(batches, failure)

    def top_up(self) -> None:
        """Have as many batches waiting as DALI asks for when it runs next; none after the last one."""
        while len(self._waiting) + len(self.in_flight) < self.queue_depth and not self._failure and not self._too_large:
            try:
                batch = next(self._batches)
            except StopIteration:
                return
            except Exception as error:
                self._failure = error
                return
            if len(batch.ids) > self.max_rows:
                self._too_large = batch
                return
            self._waiting.append(batch)

    def __call__(self) -> tuple[Any, ...]:
        if not self._waiting:
            raise StopIteration
        batch = self._waiting.popleft()
        self.in_flight.append(batch)
        values = [batch.inputs[name] for name in self.names]
        return tuple(list(value) if isinstance(value, PackedRecords) else value for value in values)


def _build(graph: Graph, source: _Source, device: torch.device, num_threads: int) -> tuple[Any, dict[str, str | None]]:
    """A DALI pipeline fed by `source`, and its outputs, see `define_pipeline`."""
    pipeline, outputs = define_pipeline(
        graph, source, source.names, source.max_rows, device, num_threads, source.queue_depth
    )
    with warnings.catch_warnings():
        # A user's graph is offered every small field; DALI would warn of each that it does not use.
        warnings.filterwarnings("ignore", message="The external source node")
        pipeline.build()
    leave_to_parent(pipeline)
    return pipeline, outputs


def define_pipeline(
    graph: Graph,
    source: Callable[[], Sequence[Any]],
    names: Sequence[str],
    max_rows: int,
    device: torch.device,
    num_threads: int,
    queue_depth: int = QUEUE_DEPTH,
) -> tuple[Any, dict[str, str | None]]:
    """The pipeline of `graph`, not built yet, which takes no GPU; and its outputs, all on `device`, by name: each with the name
    of the input that it is, None for one that the graph makes.

    `source` gives batches of the inputs `names`, of at most `max_rows` rows.
    """
    dali = import_dali()
    on_gpu = device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size=max_rows,
        num_threads=num_threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=queue_depth,
    )
    with pipeline:
        # On the CPU, DALI reads the records where they lie, and copies what passes through to an output. For a GPU it
        # copies them first: outputs are handed out before the GPU is done with the batch, which then ends here.
        nodes = dali.fn.external_source(source, num_outputs=len(names), no_copy=not on_gpu)
        inputs = dict(zip(names, nodes, strict=True))
        outputs = graph.build(dict(inputs), "mixed" if on_gpu else "cpu")
        pipeline.set_outputs(*(node.gpu() if on_gpu else node for node in outputs.values()))
    return pipeline, {
        name: next((fed for fed, input_node in inputs.items() if input_node is node), None)
        for name, node in outputs.items()
    }


def _then_raise(batches: list[HostBatch], failure: Exception | None) -> Iterator[HostBatch]:
    yield from batches
    if failure is not None:
        raise failure


def _as_tensor(output: Any) -> torch.Tensor | list[torch.Tensor]:
    """A DALI output as a tensor on the same memory; a list of them, one a row, where rows differ in shape."""
    if output.is_dense_tensor():
        return torch.utils.dlpack.from_dlpack(output.as_tensor())
    return [torch.utils.dlpack.from_dlpack(output[row]).clone() for row in range(len(output))]


def _on_device(value: Any, device: torch.device) -> Any:
    """A field that went past DALI: a tensor, or a list of what cannot be one."""
    if isinstance(value, list):
        return [each if isinstance(each, str) else _on_device(each, device) for each in value]
    return torch.as_tensor(value).to(device)


def _failed_operator(error: RuntimeError) -> str | None:
    """The function of DALI's that failed, as the graph calls it; None where the message does not say."""
    named = re.search(r"operator `([^`]+)`", str(error))
    return None if named is None else named[1].removeprefix("nvidia.dali.")


def _reason(error: RuntimeError) -> str:
    """What went wrong, out of DALI's message, which also has a traceback of the graph and the advice to give up."""
    said = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    return " ".join(said.partition("C++ context")[0].split())
