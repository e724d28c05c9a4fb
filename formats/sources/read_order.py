"""Records read in the order in which they lie in their source, and given in the order in which they are wanted.

What can only be read from its start (gzip), or in pieces of many records (row groups of Parquet, chunks of HDF5), is then read
once for a shard, and every file is opened once, however records were shuffled. The records of the shard are kept meanwhile.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stagein.formats.source import RefusedRecord, Room, SourceRecord

Read: TypeAlias = Callable[[NDArray[np.int64], Room], Iterator[SourceRecord | RefusedRecord]]
"""Reads the records of these entries, in this order, into room."""


def read_in_order(
    pieces: NDArray[np.int64], positions: NDArray[np.int64], read: Read, room: Room
) -> Iterator[SourceRecord | RefusedRecord]:
    """The records of the entries 0, 1, … as `read` has them, which is asked for them piece by piece.

    pieces     for each entry the piece of the source in which its record lies: a file, or a part of one.
    positions  where in it; the same for all where it makes no difference.
    """
    if _are_in_order(pieces, positions):
        yield from read(np.arange(len(pieces)), room)
        return
    order = np.lexsort((positions, pieces))
    kept: dict[int, tuple[SourceRecord | RefusedRecord, dict[str, bytearray]]] = {}
    contents: dict[str, bytearray] = {}

    def keep(name: str, nbytes: int) -> memoryview:
        contents[name] = bytearray(nbytes)
        return memoryview(contents[name])

    for entry, record in zip(order.tolist(), read(order, keep), strict=True):
        kept[entry] = record, contents if isinstance(record, SourceRecord) else {}
        contents = {}
    for entry in range(len(pieces)):
        record, filled = kept.pop(entry)
        for name, content in filled.items():
            room(name, len(content))[:] = content
        yield record


def _are_in_order(pieces: NDArray[np.int64], positions: NDArray[np.int64]) -> bool:
    """Whether the records of every piece follow each other, from its start on."""
    is_next_piece = np.diff(pieces) != 0
    is_split = np.count_nonzero(is_next_piece) >= len(np.unique(pieces))
    return not is_split and bool((is_next_piece | (np.diff(positions) >= 0)).all())
