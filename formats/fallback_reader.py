"""Reading records from a nearer copy of the shards, and from the source where a shard of the copy turns out to be bad."""

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import ChecksumError, SourceError
from .forks import renew_in_forks
from .index import RecordIndex
from .located import LocatedRecords
from .record_reader import PackedRecords, RecordNumbers, RecordReader
from .schema import Field

Result = TypeVar("Result")


class FallbackReader(RecordReader):
    """A `RecordReader` of the files `near`; a shard that is missing, unreadable, cut off or damaged there is left for good,
    with one warning, for its place in `source`. Errors of the source are raised.
    """

    def __init__(self, field: Field, index: RecordIndex, near: Sequence[Path], source: Sequence[Path]) -> None:
        super().__init__(field, index, near)
        self._source = tuple(source)
        self.renew()
        renew_in_forks(self)
        self.left: dict[Path, str] = {}
        """Why each shard was left."""

    def renew(self) -> None:
        """Have a lock that nobody holds."""
        self._changing = threading.Lock()

    def read_packed(
        self, records: RecordNumbers, buffer: memoryview | None = None, *, check: bool = True
    ) -> PackedRecords:
        return self._falling_back(
            records, lambda: super(FallbackReader, self).read_packed(records, buffer, check=check)
        )

    def locate(self, records: RecordNumbers) -> LocatedRecords | None:
        return self._falling_back(records, lambda: super(FallbackReader, self).locate(records))

    def read_tensors(
        self,
        records: RecordNumbers,
        out: NDArray[np.generic] | None = None,
        *,
        threads: int = 1,
        decode_nanoseconds: NDArray[np.int64] | None = None,
    ) -> NDArray[np.generic]:
        def read() -> NDArray[np.generic]:
            return super(FallbackReader, self).read_tensors(
                records, out, threads=threads, decode_nanoseconds=decode_nanoseconds
            )

        return self._falling_back(records, read)

    def read_ranges(
        self,
        records: NDArray[np.int64],
        start: NDArray[np.int64],
        nbytes: NDArray[np.int64],
        before: NDArray[np.uint32],
        after: NDArray[np.uint32],
        buffer: NDArray[np.uint8],
    ) -> None:
        self._falling_back(
            records, lambda: super(FallbackReader, self).read_ranges(records, start, nbytes, before, after, buffer)
        )

    def _falling_back(self, records: RecordNumbers, read: Callable[[], Result]) -> Result:
        while True:
            shards = self._shards
            try:
                return read()
            except (SourceError, ChecksumError):
                # Whole records that are in order say that the fault is not in a shard but in what is known of it.
                if not self._leave_bad_shards(records) or self._shards == shards:
                    raise

    def _leave_bad_shards(self, records: RecordNumbers) -> bool:
        """Whether reading these records again can go better: no error of theirs is one of the source."""
        with self._changing:
            shards = list(self._shards)
            for record in np.unique(np.asarray(records, dtype=np.int64)).tolist():
                shard = int(self.index.shard[record])
                try:
                    RecordReader.read_packed(self, [record])
                except (SourceError, ChecksumError) as error:
                    if self._shards[shard] == self._source[shard]:
                        return False
                    shards[shard] = self._source[shard]
                    self.left.setdefault(self._shards[shard], str(error))
            for path in (near for near, now in zip(self._shards, shards, strict=True) if near != now):
                warnings.warn(
                    f"{self.left[path]}. It is read from the source from now on", RuntimeWarning, stacklevel=2
                )
            # Threads in the middle of a read keep the files that were open before.
            RecordReader.__init__(self, self.field, self.index, shards)
            return True
