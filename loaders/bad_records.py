"""What becomes of records that cannot be read or decoded: an error, or a substitute and a line in the quarantine file."""

import json
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import ChecksumError, StageinError
from stagein.formats.forks import renew_in_forks
from stagein.world import node_name

from .batches import BatchTask, RowFailure
from .dataset import RecordDataset
from .engine import failed_batch


class Replacement:
    """The `OnFailure` that lets another record take the place of a bad one, so that the steps stay as many.

    It is the next good record of the data set, whichever rank meets the bad one, and when: a run that resumes, or has
    another number of ranks, gets the same. So damage is looked for every time, as where a crop window is all that is read of
    a record it may lie outside; records that cannot be read, which is tried for seconds, or not be decoded are remembered.

    error_budget  distinct bad records that this rank lets pass; one more is an error.
    quarantine    a file that gets a line of JSON for each: data set, record, shard, node, reason. Several ranks may write to one
                  file. None: only a warning is given.
    """

    def __init__(self, dataset: RecordDataset, error_budget: int, quarantine: Path | None) -> None:
        self._dataset, self._error_budget, self._quarantine = dataset, error_budget, quarantine
        self._bad: set[int] = set()
        self._remembered: set[int] = set()
        self.renew()
        renew_in_forks(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock: a loader can be sent to another process."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.renew()
        renew_in_forks(self)

    def renew(self) -> None:
        """Have a lock that nobody holds."""
        self._lock = threading.Lock()

    @property
    def num_bad(self) -> int:
        return len(self._bad)

    def __call__(self, task: BatchTask, ids: NDArray[np.int64], failures: Sequence[RowFailure]) -> NDArray[np.int64]:
        with self._lock:
            substituted = ids.copy()
            for failure in failures:
                record = int(ids[failure.row])
                self._note(task, record, failure.error)
                substituted[failure.row] = self._substitute(record + 1)
            return self._good(substituted)

    def good(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same ids, with substitutes for those that are remembered."""
        if not self._remembered:
            return ids
        with self._lock:
            return self._good(ids)

    def _good(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self._substitute(record) for record in ids.tolist()], dtype=np.int64)

    def _substitute(self, record: int) -> int:
        """The first record from this one on that is not remembered as bad."""
        samples = len(self._dataset)
        others = (other % samples for other in range(record, record + samples))
        return next(other for other in others if other not in self._remembered)

    def _note(self, task: BatchTask, record: int, error: StageinError) -> None:
        if record in self._bad:
            return
        if len(self._bad) >= min(self._error_budget, len(self._dataset) - 1):
            sentence = f"{error}. It is bad record number {len(self._bad) + 1}, error_budget={self._error_budget} lets no more pass"
            raise failed_batch(task, type(error)(sentence)) from error
        self._bad.add(record)
        if not isinstance(error, ChecksumError):
            self._remembered.add(record)
        records = self._dataset.records
        line = {
            "dataset": records.manifest.id,
            "record": record,
            "shard": records.manifest.shards[int(records.index.shard[record])].file,
            "node": node_name(),
            "reason": str(error),
        }
        if self._quarantine is not None:
            _append(self._quarantine, json.dumps(line) + "\n")
        warnings.warn(f"{error}. Record {self._substitute(record + 1)} takes its place", RuntimeWarning, stacklevel=2)


def _append(path: Path, line: str) -> None:
    """One write: lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
