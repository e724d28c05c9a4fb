"""The file of a shard while its payload is written: piece by piece, each summed while it is in the processor's caches."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checksums import Buffer, chunk_sums, pread_exactly, pwrite_all, record_sums
from .native_code import NativeKernel

_write_and_sum = NativeKernel(f"{__package__}.write_kernels", "write_and_sum")

_READ_BYTES = 512 << 10
"""Read and summed at a time: it is in the second-level cache."""
_WORTHWHILE_BYTES = 32 << 20
"""A smaller payload is not worth calls off the GIL."""
_MOST_PARTS = 64
"""Gathered for one call of the system, at most: pieces of records may be small."""
_NO_RECORDS = np.empty(0, np.uint32)


class PayloadFile:
    """Writes the payload of a shard file from `payload_offset` on, then what stands before it and behind it.

    descriptor   of the file, to read and to write; it stays the caller's.
    nbytes       of the whole payload.
    chunk_bytes  are summed each, by xxh3_128.

    Raises OSError as the file system does. To be closed in the end.
    """

    def __init__(self, descriptor: int, payload_offset: int, nbytes: int, chunk_bytes: int) -> None:
        self.payload_offset = payload_offset
        self._descriptor = descriptor
        self._chunk_bytes = chunk_bytes
        self._by_kernels = nbytes >= _WORTHWHILE_BYTES
        self._summed_from = -(-payload_offset // chunk_bytes) * chunk_bytes
        """The first byte of the first chunk that has nothing from before the payload."""
        self._progress = np.array([payload_offset, self._summed_from, payload_offset, 0])
        self._sums: list[bytes] = []
        """Of the chunks from there on."""
        self._parts = np.empty((_MOST_PARTS, 2), np.int64)
        if self._by_kernels:
            _write_and_sum.prepare(*_some_arguments())  # while the first records are read

    def append(self, pieces: Sequence[Buffer], nbytes: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Write pieces, in which records of these sizes lie one behind the other, then perhaps padding; the crc32c of the records."""
        if not self._by_kernels:
            for piece in pieces:
                pwrite_all(self._descriptor, piece, int(self._progress[0]))
                self._progress[0] += len(piece)
            return record_sums(pieces, nbytes)
        sums = np.empty(len(nbytes), np.uint32)
        trouble = self._write(pieces, nbytes, sums)
        if trouble:
            raise OSError(trouble, os.strerror(trouble))
        return sums

    def finish(self, head: Buffer, tail: Buffer) -> bytes:
        """Write what stands before the payload and what stands behind it; returns the sums of all chunks of the file."""
        self.append([tail], _NO_RECORDS)
        pwrite_all(self._descriptor, head, 0)
        nbytes = int(self._progress[0])
        summed_from = min(self._summed_from, nbytes) if self._by_kernels else nbytes
        self.close()
        return b"".join((*first_sums(self._descriptor, summed_from, self._chunk_bytes), *self._sums))

    def close(self) -> None:
        """End: nothing is written any more. May be called again."""
        if self._progress[3]:
            self._write((), _NO_RECORDS, _NO_RECORDS, ends=True)

    def _write(
        self, pieces: Sequence[Buffer], nbytes: NDArray[np.uint32], sums: NDArray[np.uint32], *, ends: bool = False
    ) -> int:
        """`append` by the kernel, into `sums`; returns 0 or an error number. When it `ends`, the last chunk is summed."""
        arrays = [np.frombuffer(piece, np.uint8) for piece in pieces if len(piece)]
        addresses, sizes = np.array([array.ctypes.data for array in arrays], np.int64), _sizes(arrays)
        behind = int(self._progress[0]) % self._chunk_bytes + int(sizes.sum())
        found = np.empty((behind // self._chunk_bytes + 1, 2), np.uint64)
        trouble: int
        trouble, summed = _write_and_sum(
            self._descriptor,
            addresses,
            sizes,
            nbytes,
            sums,
            self._chunk_bytes,
            self._progress,
            found,
            self._parts,
            ends,
        )
        self._sums.append(found[:summed].astype(">u8").tobytes())
        return trouble


def _some_arguments() -> tuple[Any, ...]:
    """Of the kinds that the kernel is called with."""
    places, pairs = np.empty(0, np.int64), np.empty((0, 2), np.int64)
    return 0, places, places, _NO_RECORDS, _NO_RECORDS, 0, places, pairs.view(np.uint64), pairs, False


def _sizes(arrays: Iterable[NDArray[np.uint8]]) -> NDArray[np.int64]:
    return np.array([len(array) for array in arrays], np.int64)


def first_sums(descriptor: int, nbytes: int, chunk_bytes: int) -> Iterator[bytes]:
    """The xxh3_128 of every chunk of the first `nbytes` of a file. Raises OSError."""
    return chunk_sums(_pieces(descriptor, nbytes), chunk_bytes)


def _pieces(descriptor: int, nbytes: int) -> Iterator[memoryview]:
    """The first `nbytes` of a file; each piece until the next one is taken."""
    buffer = memoryview(bytearray(min(_READ_BYTES, nbytes)))
    for start in range(0, nbytes, _READ_BYTES):
        piece = buffer[: nbytes - start]
        pread_exactly(descriptor, piece, start)
        yield piece
