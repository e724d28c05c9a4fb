"""The file of a shard while its payload is written: piece by piece, each summed while it is in the processor's caches."""

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .checksums import Buffer, chunk_sums, pread_exactly, pwrite_all, record_sums

_READ_BYTES = 512 << 10
"""Read and summed at a time: it is in the second-level cache."""
_WORTHWHILE_BYTES = 32 << 20
"""A smaller payload is not worth calls off the GIL."""


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

    def append(self, pieces: Sequence[Buffer], nbytes: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Write pieces, in which records of these sizes lie one behind the other, then perhaps padding; the crc32c of the records."""
        if not self._by_kernels:
            for piece in pieces:
                pwrite_all(self._descriptor, piece, int(self._progress[0]))
                self._progress[0] += len(piece)
            return record_sums(pieces, nbytes)
        from .write_kernels import write_and_sum  # numba takes a third of a second to load

        arrays = [np.frombuffer(piece, np.uint8) for piece in pieces if len(piece)]
        addresses, sizes = np.array([array.ctypes.data for array in arrays], np.int64), _sizes(arrays)
        sums = np.empty(len(nbytes), np.uint32)
        behind = int(self._progress[0]) % self._chunk_bytes + int(sizes.sum())
        full_sums = np.empty((behind // self._chunk_bytes, 2), np.uint64)
        trouble, full = write_and_sum(
            self._descriptor, addresses, sizes, nbytes, sums, self._chunk_bytes, self._progress, full_sums
        )
        if trouble:
            raise OSError(trouble, os.strerror(trouble))
        self._sums.append(full_sums[:full].astype(">u8").tobytes())
        return sums

    def finish(self, head: Buffer, tail: Buffer) -> bytes:
        """Write what stands before the payload and what stands behind it; returns the sums of all chunks of the file."""
        self.append([tail], np.empty(0, np.uint32))
        pwrite_all(self._descriptor, head, 0)
        nbytes = int(self._progress[0])
        summed_from = min(self._summed_from, nbytes) if self._by_kernels else nbytes
        self.close()
        return b"".join((*first_sums(self._descriptor, summed_from, self._chunk_bytes), *self._sums))

    def close(self) -> None:
        """End: nothing is written any more. May be called again."""
        if self._progress[3]:
            from .write_kernels import end_sums

            last = end_sums(self._progress)
            if self._progress[0] > self._summed_from and self._progress[0] % self._chunk_bytes:
                self._sums.append(np.array(last, ">u8").tobytes())


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
