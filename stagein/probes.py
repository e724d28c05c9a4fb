"""Short probes of what bounds a stage-in: how fast a node reads the source, hears from its neighbour, and writes to its disk.

All nodes probe the same thing at the same time, as they will use it. Nothing stays behind.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagein.formats.checksums import pwrite_all
from stagein.formats.errors import StageinError, WatchdogError, destination_error

from .chunk_io import ChunkReader
from .chunk_threads import READER_THREADS
from .stage_plan import Chunks, ChunkTable
from .world import Communicator, World

if TYPE_CHECKING:
    from mpi4py import MPI

_MESSAGE_BYTES = 8 << 20
_SYNCED_BYTES = 8 * _MESSAGE_BYTES
"""What is written between two calls of fdatasync: the rate is that of the disk, not of the page cache."""

_CLEAR_MARGIN = 1.2
"""What was written through the page cache is still there when it is read for the first time: to go past it must pay."""

_POLL_SECONDS = 50e-6
_MORE, _LAST = 0, 1


def probe_source(reader: ChunkReader, table: ChunkTable, chunks: Chunks, seconds: float) -> float:
    """Bytes a second at which this rank reads and checks these chunks, for `seconds` or until the last of them.

    Raises what `ChunkReader.read` raises.
    """
    start, lock, waiting = time.monotonic(), threading.Lock(), iter(chunks.tolist())
    read_bytes, failures = [0] * READER_THREADS, list[StageinError]()

    def read_some(number: int) -> None:
        buffer = memoryview(bytearray(table.longest_bytes))
        while time.monotonic() - start < seconds and not failures:
            with lock:
                chunk = next(waiting, None)
            if chunk is None:
                break
            try:
                reader.read(chunk, buffer[: table.nbytes[chunk]])
            except StageinError as error:
                failures.append(error)
            read_bytes[number] += int(table.nbytes[chunk])
        reader.close()

    threads = [threading.Thread(target=read_some, args=(number,), daemon=True) for number in range(READER_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(read_bytes) / (time.monotonic() - start)


def probe_disk(folder: Path, seconds: float, most_bytes: int, *, direct: bool = False) -> float:
    """Bytes a second that the disk below `folder` takes for good, written for `seconds` or until `most_bytes`; 0.0 without room.

    direct  past the page cache; 0.0 where the file system cannot do that.

    The file has no name and is gone afterwards. Raises what `destination_error` makes of a failure.
    """
    content = mmap.mmap(-1, _MESSAGE_BYTES)  # whole pages, as O_DIRECT asks for
    content.write(os.urandom(_MESSAGE_BYTES))
    start, written = time.monotonic(), 0
    try:
        with _unnamed_file(folder, os.O_DIRECT if direct else 0) as file:
            while time.monotonic() - start < seconds and written + _SYNCED_BYTES <= most_bytes:
                for _ in range(_SYNCED_BYTES // _MESSAGE_BYTES):
                    pwrite_all(file.fileno(), memoryview(content), written)
                    written += len(content)
                os.fdatasync(file.fileno())
            return written / (time.monotonic() - start)
    except OSError as error:
        if direct and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return 0.0
        raise destination_error(error, "probing", folder) from None


def direct_is_faster(folder: Path, seconds: float, most_bytes: int) -> bool:
    """Whether the disk below `folder` takes more a second past the page cache than through it, by a clear margin."""
    through, past = (probe_disk(folder, seconds, most_bytes, direct=direct) for direct in (False, True))
    return past > _CLEAR_MARGIN * through


def _unnamed_file(folder: Path, flags: int) -> io.FileIO:
    descriptor, name = tempfile.mkstemp(dir=folder)
    os.close(descriptor)
    try:
        return io.FileIO(os.open(name, os.O_RDWR | flags), "r+")
    finally:
        Path(name).unlink()


def probe_network(communicator: Communicator, mpi: MPI.Comm, ring: Sequence[World], seconds: float) -> float:
    """Bytes a second that come from the rank before this one in `ring` while it sends as fast to the next, for `seconds`.

    Every rank of the ring calls it. Raises WatchdogError when a neighbour is not heard of within the communicator's limit.
    """
    from mpi4py import MPI

    place = [world.rank for world in ring].index(communicator.world.rank)
    left, right = ring[place - 1].rank, ring[(place + 1) % len(ring)].rank
    outgoing, incoming, status = bytearray(_MESSAGE_BYTES), bytearray(_MESSAGE_BYTES), MPI.Status()
    start, received, heard = time.monotonic(), 0, time.monotonic()
    sending: MPI.Request | None = mpi.Isend([outgoing, MPI.BYTE], dest=right, tag=_MORE)
    receiving: MPI.Request | None = mpi.Irecv([incoming, MPI.BYTE], source=left)
    sent_last = False
    while sending is not None or receiving is not None:
        now = time.monotonic()
        moved = False
        if sending is not None and sending.Test():
            moved, tag = True, _LAST if now - start > seconds else _MORE
            sending = None if sent_last else mpi.Isend([outgoing, MPI.BYTE], dest=right, tag=tag)
            sent_last = sent_last or tag == _LAST
        if receiving is not None and receiving.Test(status):
            moved, received = True, received + _MESSAGE_BYTES
            receiving = None if status.Get_tag() == _LAST else mpi.Irecv([incoming, MPI.BYTE], source=left)
        if moved:
            heard = now
        elif now - heard > communicator.timeout_seconds:
            raise WatchdogError(f"ranks {left} and {right} do not answer a probe of the network: look at their nodes")
        else:
            time.sleep(_POLL_SECONDS)
    return received / (time.monotonic() - start)
