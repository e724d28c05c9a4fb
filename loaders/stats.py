"""What a loader did: seconds and bytes by phase."""

import threading
from dataclasses import dataclass

import numpy as np


@dataclass
class PhaseTimes:
    """Seconds of work, added up over the threads that did it, and the bytes that it made, by phase.

    read        stored bytes out of files; samples of data sets that are no RecordDataset, whatever their `__getitem__` does.
    decompress  tensors out of stored bytes; nothing where they are inflated on the GPU.
    decode      images out of files.
    transform   samples or rows of the batch: resized, normalised, what the user's function does to a sample, collated.

    DALI does not tell its decoding and its transform apart, nor when it works: for both see `LoaderStats.graph_wait_s`.
    """

    read_s: float = 0.0
    bytes_read: int = 0
    decompress_s: float = 0.0
    bytes_decompressed: int = 0
    decode_s: float = 0.0
    bytes_decoded: int = 0
    transform_s: float = 0.0
    bytes_transformed: int = 0

    def add(self, other: "PhaseTimes") -> None:
        # Spelt out: it is done for every image.
        self.read_s += other.read_s
        self.bytes_read += other.bytes_read
        self.decompress_s += other.decompress_s
        self.bytes_decompressed += other.bytes_decompressed
        self.decode_s += other.decode_s
        self.bytes_decoded += other.bytes_decoded
        self.transform_s += other.transform_s
        self.bytes_transformed += other.bytes_transformed


class DecodeClock:
    """Where readers add the time that they spend on decompressing."""

    def __init__(self) -> None:
        self.nanoseconds = np.zeros(1, np.int64)

    def times(self, seconds: float, bytes_read: int, bytes_decompressed: int) -> PhaseTimes:
        """Those of a batch that took so many seconds to read, and to decompress where this clock says so."""
        decompress_s = int(self.nanoseconds[0]) / 1e9
        if not decompress_s:
            return PhaseTimes(read_s=seconds, bytes_read=bytes_read)
        return PhaseTimes(max(0.0, seconds - decompress_s), bytes_read, decompress_s, bytes_decompressed)


@dataclass
class LoaderStats(PhaseTimes):
    """What a loader did since it was made, on this rank. The phases are those of `PhaseTimes`.

    copy_s, bytes_copied  on the way to the GPU, by its own clock; while DALI copies, it is its secret.
    read_wait_s   seconds that the caller waited for reading, or for workers.
    graph_wait_s  seconds that the caller waited for decoding and the rest of the graph.
    wait_s        both together.
    left_shards   files of the staged copy that turned out to be bad and are read from the source.
    bad_records   distinct records that others took the place of.
    ready_batches  batches that were ready when the caller asked for the next one, added up: by `batches`, the mean depth of
                   the queue. Near 0, the caller waits for data.
    """

    batches: int = 0
    samples: int = 0
    copy_s: float = 0.0
    bytes_copied: int = 0
    read_wait_s: float = 0.0
    graph_wait_s: float = 0.0
    left_shards: int = 0
    bad_records: int = 0
    ready_batches: int = 0

    @property
    def wait_s(self) -> float:
        return self.read_wait_s + self.graph_wait_s


class SharedTimes:
    """`PhaseTimes` that several threads add to."""

    def __init__(self, total: PhaseTimes) -> None:
        self._total, self._lock = total, threading.Lock()

    def add(self, times: PhaseTimes) -> None:
        with self._lock:
            self._total.add(times)
