"""From records to rows of a batch: what one thread of the `image_engine` does.

Rows are made by one call off the GIL for all that a thread takes of a batch; what that cannot make, as files that are no sequential
JPEGs, or all until its machine code is there, is made one by one.
"""

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import gt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import StageinError
from stagein.formats.huge_pages import WorkMemory
from stagein.formats.jpeg.window import WindowDecoder, decode_entry
from stagein.formats.located import LocatedRecords
from stagein.formats.native_code import NativeKernel, frame_of
from stagein.formats.record_reader import PackedRecords

from . import resize
from .batches import RECORD_ERRORS, HostBatch
from .graphs import ImageOutput, ImageViews
from .image_decoder import ImageDecoder
from .row_layout import (
    ALL_TAKEN,
    ARRAY_WORDS,
    ARRAYS,
    CLOCK,
    DECODED,
    EXTENTS,
    IN_MEMORY,
    OUT,
    PIXELS,
    REGION,
    ROW,
    SPENT_WORDS,
    UNDECODED,
    UNREAD,
    WEIGHT_X,
    WEIGHT_Y,
    WINDOW,
)
from .stats import PhaseTimes

_make_rows = NativeKernel(f"{__package__}.row_kernels", "make_rows")
_NONE_DECODED = -1
Records = PackedRecords | LocatedRecords


@dataclass(frozen=True)
class _Places:
    """Where the records of a batch are: see `row_kernels.make_rows`."""

    descriptors: NDArray[np.int32]
    places: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    sums: NDArray[np.uint32]
    piece_bytes: int

    @staticmethod
    def of(records: Records) -> "_Places":
        if isinstance(records, LocatedRecords):
            return _Places(records.descriptors, records.offset, records.nbytes, records.sums, records.piece_bytes)
        count = len(records)
        addresses = records.start + records.buffer.__array_interface__["data"][0]
        return _Places(
            np.full(count, IN_MEMORY, np.int32), addresses, records.nbytes, np.zeros(count, np.uint32), piece_bytes=1
        )


class _Needs(NamedTuple):
    """What the largest of some images need: bytes of a file, pixels of the width and of all of a window, pixels of the height and of the
    width that are resized."""

    nbytes: int
    width: int
    pixels: int
    resized_height: float
    resized_width: float

    @staticmethod
    def of(views: ImageViews, nbytes: NDArray[np.int64]) -> "_Needs":
        heights, widths = views.windows[:, 2], views.windows[:, 3]
        extents = views.regions[:, 2:] - views.regions[:, :2]
        return _Needs(
            int(nbytes.max(initial=0)),
            int(widths.max(initial=0)),
            int((heights * widths).max(initial=0)),
            *extents.max(axis=0, initial=0).tolist(),
        )


_NOTHING_RESERVED = _Needs(-1, -1, -1, -1, -1)
"""Less than an empty batch needs: there are no frames for the kernel yet either."""


class BatchInWork:
    """A batch whose rows are made by several threads, in memory that `take` gives for them.

    by_kernel  whether the kernel makes the rows: in all threads alike, as they share them out.
    failed     the rows that cannot be made, and why: what is wrong with the file, or the error of reading it.
    """

    def __init__(
        self,
        batch: HostBatch,
        views: ImageViews,
        records: Records,
        take: Callable[[], NDArray[np.float32]],
        *,
        by_kernel: bool,
    ) -> None:
        self.batch, self.views, self.records, self._take = batch, views, records, take
        self.failed: list[tuple[int, str | StageinError]] = []
        self.by_kernel = by_kernel
        self.places = _Places.of(records)
        self.needs = _Needs.of(views, self.places.nbytes)
        self.order = np.argsort(-self.places.nbytes[: batch.num_rows], kind="stable")
        """Largest first, so that threads are done at about the same time."""
        self.counter = np.zeros(1, np.int64)
        """Of `order`, how many are taken by threads that call the kernel."""
        self.turns = iter(self.order.tolist())
        """The same for threads without it."""
        self._num_left = batch.num_rows
        self._raised: BaseException | None = None
        self._is_finished, self._taking, self._counting = threading.Event(), threading.Lock(), threading.Lock()

    @property
    def has_memory(self) -> bool:
        return "_rows" in vars(self)

    def claim_rows(self) -> NDArray[np.float32]:
        """All rows. Who asks first waits until there is memory for them."""
        with self._taking:
            return self._rows

    @cached_property
    def _rows(self) -> NDArray[np.float32]:
        return self._take()

    def finish_rows(self, count: int, times: PhaseTimes) -> None:
        """Count rows as made, or failed."""
        with self._counting:
            self.batch.times.add(times)
            self._num_left -= count
            if self._num_left == 0:
                self._is_finished.set()  # once a batch: to wake the caller for every row would cost threads more than it

    def fail(self, error: BaseException) -> None:
        """Have `wait` raise this: it is not the fault of a record."""
        self._raised = error
        self._is_finished.set()

    def abandon(self) -> None:
        """Let no more rows be taken."""
        self.counter[0] = len(self.order)
        self.turns = iter(())

    def wait(self) -> None:
        """Until all rows are made. Raises what a thread met that is not the fault of a record."""
        if self.batch.num_rows:
            self._is_finished.wait()
        if self._raised is not None:
            raise self._raised
        self.failed.sort(key=lambda failure: failure[0])


class RowMaker:
    """Makes rows of the batches given to it. For one thread at a time: what it needs memory for is used again."""

    def __init__(self, output: ImageOutput) -> None:
        self._output = output
        self._scale, self._offset = output.scale_and_offset()
        self._others = ImageDecoder()
        self._decoded_window = np.zeros(4, np.int64)
        self._arrays = np.zeros((ARRAYS, ARRAY_WORDS), np.int64)
        self._arrays[:, 2] = _address(self._arrays) + 8 * (ARRAY_WORDS * np.arange(ARRAYS) + EXTENTS)
        self._reserved = _NOTHING_RESERVED

    def make(self, work: BatchInWork) -> None:
        """Make rows that no other thread makes, until there are none."""
        try:
            if work.by_kernel:
                self._make_by_kernel(work)
            else:
                for row in work.turns:
                    self._make_row(work, row)
        except BaseException as raised:  # whatever it is, it belongs to the caller
            work.fail(raised)

    def _make_by_kernel(self, work: BatchInWork) -> None:
        row, matter = _NONE_DECODED, DECODED
        if any(map(gt, work.needs, self._reserved)):
            self._reserve(work.needs)
        while matter != ALL_TAKEN:
            rows = work.claim_rows() if row != _NONE_DECODED or work.has_memory else None
            spent = np.zeros(SPENT_WORDS, np.int64)
            row, matter = self._call(work, 0 if rows is None else _address(rows), row, spent)
            self._count(work, spent)
            if matter in (UNREAD, UNDECODED):
                is_read = matter == UNDECODED and isinstance(work.records, LocatedRecords)
                self._make_row(work, row, self._content[: work.places.nbytes[row]] if is_read else None)
                row = _NONE_DECODED

    def _count(self, work: BatchInWork, spent: NDArray[np.int64]) -> None:
        """Add up what the kernel says that it did."""
        count, read_ns, read_bytes, decode_ns, decoded_bytes, transform_ns = spent[:CLOCK].tolist()
        row_bytes = 3 * self._output.size**2 * np.dtype(np.float32).itemsize
        work.finish_rows(
            count,
            PhaseTimes(
                read_s=read_ns / 1e9,
                bytes_read=read_bytes,
                decode_s=decode_ns / 1e9,
                bytes_decoded=decoded_bytes,
                transform_s=transform_ns / 1e9,
                bytes_transformed=count * row_bytes,
            ),
        )

    def _reserve(self, needs: _Needs) -> None:
        """Have memory for images that need so much, all of it anew: it lies close together, and what there was before is gone."""
        self._reserved = most = _Needs._make(map(max, self._reserved, needs))
        size, antialias = self._output.size, self._output.antialias
        taps_y, taps_x = (resize.taps(extent, size, antialias) for extent in (most.resized_height, most.resized_width))
        memory = WorkMemory()
        self._content = memory.zeros(np.uint8, most.nbytes)
        self._weights_y, self._weights_x = (memory.zeros(np.float32, size * taps) for taps in (taps_y, taps_x))
        self._first = memory.zeros(np.int64, 2, size)
        self._blended = memory.zeros(np.float32, 3 * (most.width + taps_x))
        self._windows = WindowDecoder(memory)  # the kernel's own: what its frame says of this memory stays true
        self._windows.reserve(most.nbytes, most.width, most.pixels)
        self._frames = self._make_frames()

    def _make_frames(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of the kernels that decode and resize, with what all rows have in common."""
        size, arrays = self._output.size, self._arrays
        for number, memory in (
            (PIXELS, self._windows.pixels),
            (WEIGHT_Y, self._weights_y),
            (WEIGHT_X, self._weights_x),
            (ROW, self._blended),
        ):
            arrays[number, 0] = _address(memory)
        arrays[[WINDOW, REGION], EXTENTS] = 4
        arrays[[WEIGHT_Y, WEIGHT_X], EXTENTS] = size
        arrays[OUT, EXTENTS:] = 3, size, size
        words = (_address(arrays) + 8 * ARRAY_WORDS * np.arange(ARRAYS)).tolist()
        resizing = frame_of(
            words[PIXELS],
            self._decoded_window,
            words[REGION],
            self._output.antialias,
            False,
            self._scale,
            self._offset,
            self._first,
            words[WEIGHT_Y],
            words[WEIGHT_X],
            words[ROW],
            words[OUT],
        )
        return self._windows.frame(), resizing

    def _call(self, work: BatchInWork, rows_address: int, row: int, spent: NDArray[np.int64]) -> tuple[int, int]:
        places, views = work.places, work.views
        decode, resizing = _entries()
        assert decode is not None and resizing is not None
        decode_frame, resize_frame = self._frames
        return _make_rows(  # type: ignore[no-any-return]
            work.counter,
            work.order,
            places.descriptors,
            places.places,
            places.nbytes,
            places.sums,
            places.piece_bytes,
            views.windows,
            views.regions,
            views.mirrored.view(np.uint8),
            rows_address,
            row,
            self._output.size,
            self._output.antialias,
            decode,
            decode_frame,
            resizing,
            resize_frame,
            self._arrays,
            self._content,
            self._windows.block,
            self._decoded_window,
            self._blended,
            spent,
        )

    def _make_row(self, work: BatchInWork, row: int, record: NDArray[np.uint8] | None = None) -> None:
        """Make one row without the kernel, of its record, where that was read already."""
        window, region, times = work.views.windows[row], work.views.regions[row], PhaseTimes()
        try:
            if record is None:
                record = self._record(work, row, times)
            began = time.perf_counter()
            pixels, window = self._others.decode(record, window)
            decoded = time.perf_counter()
            if not _lies_in(window, pixels):
                raise ValueError(f"it has {len(pixels)} rows of {pixels.shape[1] // 3} pixels, less than its size says")
            mirror, out = bool(work.views.mirrored[row]), work.claim_rows()[row]
            began_transform = time.perf_counter()
            antialias = self._output.antialias
            resize.resize_into(pixels, window, region, antialias, mirror, self._scale, self._offset, out)
            times.add(
                PhaseTimes(
                    decode_s=decoded - began,
                    bytes_decoded=pixels.nbytes,
                    transform_s=time.perf_counter() - began_transform,
                    bytes_transformed=out.nbytes,
                )
            )
        except RECORD_ERRORS as error:
            work.failed.append((row, error))
        except ValueError as reason:
            work.failed.append((row, " ".join(str(reason).split())))
        work.finish_rows(1, times)

    @staticmethod
    def _record(work: BatchInWork, row: int, times: PhaseTimes) -> NDArray[np.uint8]:
        """Its bytes. What it takes to read them is added to `times`."""
        began = time.perf_counter()
        record = work.records[row]
        if isinstance(work.records, LocatedRecords):
            times.add(PhaseTimes(read_s=time.perf_counter() - began, bytes_read=record.nbytes))
        return record


class RowMakers:
    """A maker for each thread, lent and given back: their memory is used again. In another process it begins without any."""

    def __init__(self, output: ImageOutput) -> None:
        self._output = output
        self._idle: list[RowMaker] = []
        self._are_ready = False
        resize.prepare()

    def __reduce__(self) -> tuple[type["RowMakers"], tuple[ImageOutput]]:
        return RowMakers, (self._output,)

    def are_ready(self) -> bool:
        """Whether there is machine code of all kernels that make rows; who asks first has it compiled meanwhile."""
        self._are_ready = self._are_ready or (None not in _entries() and _make_rows.is_ready(*_some_arguments()))
        return self._are_ready

    def take(self, count: int) -> list[RowMaker]:
        lent, self._idle = self._idle[:count], self._idle[count:]
        return lent + [RowMaker(self._output) for _ in range(count - len(lent))]

    def give_back(self, makers: list[RowMaker]) -> None:
        self._idle += makers


@functools.cache
def _some_arguments() -> tuple[Any, ...]:
    """Of the kernel."""
    words, numbers = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
    descriptors, sums, content = np.zeros(1, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.uint8)
    regions, mirrored, block = np.zeros((1, 1)), np.zeros(1, np.uint8), np.zeros(1, np.int16)
    blended = np.zeros(1, np.float32)
    records = numbers, numbers, descriptors, numbers, numbers, sums, 1
    views = words, regions, mirrored
    return *records, *views, 0, 0, 1, True, 0, numbers, 0, numbers, words, content, block, numbers, blended, numbers


def _entries() -> tuple[int | None, int | None]:
    """Where the machine code is that decodes, and that which resizes."""
    return decode_entry(), resize.entry()


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _lies_in(window: NDArray[np.int64], pixels: NDArray[np.uint8]) -> bool:
    top, left, height, width = window.tolist()
    return bool(min(top, left) >= 0 and top + height <= len(pixels) and 3 * (left + width) <= pixels.shape[1])
