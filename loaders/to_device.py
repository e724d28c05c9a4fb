"""Batches on their way to the GPU: copied on a stream of their own, ahead of the caller, from page-locked memory."""

import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils.data._utils.pin_memory import pin_memory as pin_structure

from .collate import map_tensors, tensors_in
from .deliveries import Deliveries, Delivery, Failure, Passed
from .stats import LoaderStats


class Shipment(Protocol):
    """A batch on its way. Whoever holds it keeps the memory it is copied from alive."""

    num_bytes: int

    @property
    def has_arrived(self) -> bool: ...

    def receive(self) -> Any:
        """The batch on the device. What the caller's stream does from now on waits until it is there; the caller does not."""

    def wait(self) -> float:
        """Until it has arrived; returns the seconds that the copy took."""


class ToDevice(Passed):
    """The same deliveries, on the device, in the same order.

    send       begins to copy a batch.
    num_ahead  batches sent ahead of the one that the caller asks for; only those that are ready: nobody waits for them.

    A batch is let go of on the host when its copy is done, also where the epoch ends in the middle: what lies in a ring of buffers
    is not filled anew before.
    """

    def __init__(
        self, deliveries: Deliveries, send: Callable[[Any], Shipment], num_ahead: int, stats: LoaderStats
    ) -> None:
        super().__init__(deliveries)
        self._send, self._num_ahead, self._stats = send, num_ahead, stats
        self._sent: deque[tuple[Any, Shipment | Failure]] = deque()
        """Not delivered yet; a failure stands for a batch that could not be made."""
        self._under_way: deque[Shipment] = deque()
        """Delivered, and perhaps not there yet: the caller's stream waits for them."""
        self._late: Exception | None = None
        """What ended the deliveries, or interrupted them; due after the batches before it."""

    @property
    def next_is_ready(self) -> bool:
        return bool(self._sent) or super().next_is_ready

    def __next__(self) -> Delivery:
        self._let_go(only_arrived=True)
        if not self._sent and self._late is None:
            self._send_next()
        while self._late is None and len(self._sent) <= self._num_ahead and self._deliveries.next_is_ready:
            self._send_next()
        if not self._sent:
            late, self._late = self._late, None
            assert late is not None
            raise late
        step, shipment = self._sent.popleft()
        if isinstance(shipment, Failure):
            return step, shipment
        batch = shipment.receive()
        self._under_way.append(shipment)
        return step, batch

    def close(self) -> None:
        super().close()
        if not sys.is_finalizing():  # CUDA may be gone then, and nobody fills memory anew
            self._under_way.extend(shipment for _, shipment in self._sent if not isinstance(shipment, Failure))
            self._let_go(only_arrived=False)
        self._sent.clear()
        self._under_way.clear()

    def _send_next(self) -> None:
        try:
            step, batch = next(self._deliveries)
        except Exception as error:  # StopIteration too
            self._late = error
            return
        self._sent.append((step, batch if isinstance(batch, Failure) else self._send(batch)))

    def _let_go(self, *, only_arrived: bool) -> None:
        while self._under_way and (self._under_way[0].has_arrived or not only_arrived):
            shipment = self._under_way.popleft()
            self._stats.copy_s += shipment.wait()
            self._stats.bytes_copied += shipment.num_bytes


class ToCpu(Passed):
    """The same deliveries, on the CPU, whatever device the data set's tensors are on."""

    def __next__(self) -> Delivery:
        step, batch = super().__next__()
        is_there = isinstance(batch, Failure) or all(tensor.device.type == "cpu" for tensor in tensors_in(batch))
        return step, batch if is_there else map_tensors(torch.Tensor.cpu, batch)


class CudaSender:
    """Sends batches to a CUDA device on one stream of its own, so that copies overlap with what the caller's streams do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Any) -> "CudaShipment":
        return CudaShipment(batch, self._device, self._stream)


class CudaShipment:
    """See `Shipment`. Tensors that are on some device already are moved when the batch is received, on the caller's stream."""

    def __init__(self, batch: Any, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._on_host = pin_structure(batch)  # type: ignore[no-untyped-call]  # what is pinned already stays where it is
        self._copies: list[torch.Tensor] = []
        self.num_bytes = 0
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            self._began.record(stream)
            self._batch = map_tensors(self._copy, self._on_host)
            self._ended.record(stream)

    @property
    def has_arrived(self) -> bool:
        return bool(self._ended.query())  # type: ignore[no-untyped-call]

    def receive(self) -> Any:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._ended)
        for copy in self._copies:
            copy.record_stream(current)  # its memory belongs to the side stream, which must not have it back too early
        batch = map_tensors(lambda tensor: tensor.to(self._device), self._batch)
        self._copies, self._batch = [], None
        return batch

    def wait(self) -> float:
        self._ended.synchronize()
        self._on_host = None
        return float(self._began.elapsed_time(self._ended)) / 1e3

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu":
            return tensor
        copy = tensor.to(self._device, non_blocking=True)
        self._copies.append(copy)
        self.num_bytes += tensor.nbytes
        return copy
