"""One rank of a stage-in under test: `staging_rank.py SOURCE TO [OPTIONS]`, with the faults that a test asks for.

The last line of output of rank 0 is a JSON object: the receipt, the bytes that all ranks read by read calls, and by how many
bytes the memory of each rank has grown at most.
"""

import argparse
import errno
import itertools
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from staged import flip_byte, preadv_refusing
from synthetic import CHUNK_BYTES

from stagein import chunk_io, neighbours, ring
from stagein.cache import Store
from stagein.formats.errors import StageinError
from stagein.node_copy import NodeCopy
from stagein.staging import stage
from stagein.world import Communicator, connect

HANG_SECONDS = 1000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("to")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--copies", type=int)
    parser.add_argument("--timeout-seconds", type=float, default=30)
    parser.add_argument("--memory-bytes", type=int, default=1 << 20)
    parser.add_argument("--signal", help="signal that a rank sends to itself in the middle")
    parser.add_argument("--hang-reading", action="store_true", help="reads of the source never end")
    parser.add_argument(
        "--flip-arrivals", type=int, help="damage every so many of the chunks that come over the network"
    )
    parser.add_argument(
        "--disk-gets-full", action="store_true", help="the room that the plan saw is gone when it is used"
    )
    parser.add_argument("--damage-source", action="store_true", help="as soon as all files were found to be there")
    parser.add_argument("--unreadable", help="name of a file of the source that this rank may not read")
    parser.add_argument("--on-rank", type=int, default=0, help="the rank that has the fault")
    parser.add_argument("--slow-alone", action="store_true", help="--slow-seconds are for that rank only")
    parser.add_argument(
        "--slow-seconds", type=float, default=0, help="on every rank, each chunk read takes this much longer"
    )
    return parser.parse_args()


def plant_faults(arguments: argparse.Namespace) -> None:
    if arguments.hang_reading:
        chunk_io.ChunkReader.read = lambda *_: time.sleep(HANG_SECONDS)
    if arguments.disk_gets_full:
        Store.free_bytes = lambda self: 1 << 40
        os.posix_fallocate = lambda descriptor, offset, nbytes: os.ftruncate(descriptor, nbytes)
    if arguments.damage_source:
        find_missing = NodeCopy.find_missing
        NodeCopy.find_missing = lambda *words: (damage_source(arguments.source / "shards"), find_missing(*words))[1]
    if arguments.unreadable:
        os.preadv = preadv_refusing([arguments.unreadable], errno.EACCES)
    if arguments.flip_arrivals:
        after_arrival, arrivals = ring.Engine._after_arrival, itertools.count()

        def flip(engine: ring.Engine, arrival: neighbours.Arrival) -> None:
            if next(arrivals) % arguments.flip_arrivals == 0:
                engine._buffers.view(arrival.buffer)[0] ^= 1
            after_arrival(engine, arrival)

        ring.Engine._after_arrival = flip


def damage_source(shards: Path) -> None:
    (shards / "00000.h5").unlink()
    os.truncate(shards / "00001.h5", 10)
    flip_byte(shards / "00003.h5", 9 * CHUNK_BYTES)


def read_slowly(pause_seconds: float) -> None:
    read = chunk_io.ChunkReader.read
    chunk_io.ChunkReader.read = lambda *words: (time.sleep(pause_seconds), read(*words))


def send_signal_in_the_middle(name: str, done_bytes: int, total_bytes: int) -> None:
    if done_bytes > total_bytes // 2:
        os.kill(os.getpid(), getattr(signal, name))


def read_call_bytes() -> int:
    """Bytes that this process has got from read calls so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def peak_memory_bytes() -> int:
    """The most memory that this process has had so far."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def main() -> None:
    arguments = parse()
    communicator: Communicator = connect()
    faulty = communicator.world.rank == arguments.on_rank
    if arguments.slow_seconds and (faulty or not arguments.slow_alone):
        read_slowly(arguments.slow_seconds)
    if faulty:
        plant_faults(arguments)
    before, memory_before, views = read_call_bytes(), peak_memory_bytes(), []
    try:
        receipt = stage(
            arguments.source,
            arguments.to,
            policy=arguments.policy,
            copies=arguments.copies,
            world=communicator,
            memory_bytes=arguments.memory_bytes,
            timeout_seconds=arguments.timeout_seconds,
            progress=(lambda done, total: send_signal_in_the_middle(arguments.signal, done, total))
            if faulty and arguments.signal
            else None,
            watch=views.append,
        )
    except StageinError as error:
        if not error.reported_by_peer:
            print(f"stagein: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    read_bytes = sum(communicator.gather_all(read_call_bytes() - before))
    grown_bytes = communicator.gather_all(peak_memory_bytes() - memory_before)
    if communicator.world.rank == 0:
        report = {"receipt": receipt.model_dump(), "read_call_bytes": read_bytes, "grown_bytes": grown_bytes}
        print(json.dumps(report | {"views": [asdict(view) for view in views]}), flush=True)


if __name__ == "__main__":
    main()
