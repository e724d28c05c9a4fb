"""Records that are not read yet: where they lie, for kernels that read each when they come to it."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .record_reader import PackedRecords, RecordReader


@dataclass(frozen=True)
class LocatedRecords:
    """Record i is the `nbytes[i]` bytes from `offset[i]` on of the file `descriptors[i]`, and has the crc32c `sums[i]`. The files stay open
    as long as this is there.

    An entry is read when it is asked for, past what a retry can heal: that raises ChecksumError or SourceError, naming shard and record.

    piece_bytes  to read at a time.
    """

    numbers: NDArray[np.int64]
    descriptors: NDArray[np.int32]
    offset: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    sums: NDArray[np.uint32]
    piece_bytes: int
    _reader: "RecordReader"
    _use: ExitStack = field(repr=False)

    def read(self) -> "PackedRecords":
        """All of them."""
        return self._reader.read_packed(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        (record,) = self._reader.read_packed(self.numbers[number : number + 1])
        return record

    def __del__(self) -> None:
        self._use.close()
