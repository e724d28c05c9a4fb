"""The samples of a RecordDataset one by one, with others in place of bad ones where that is wanted."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import StageinError

from .batches import BatchTask, RowFailure
from .engine import OnFailure, raise_first
from .fetching import FetchSamples
from .order import RankBatch, record_numbers
from .sampler import Step
from .stats import PhaseTimes


@dataclass(frozen=True)
class FetchRecords(FetchSamples):
    """`FetchSamples` of records: what becomes of bad ones is up to `on_failure`."""

    on_failure: OnFailure = raise_first

    def fetch(self, step: Step, indices: list[Any], times: PhaseTimes) -> Any:
        ids = record_numbers(indices)
        try:
            return self.dataset.read(ids.tolist(), times)
        except StageinError:
            task = BatchTask(step.epoch, step.number, RankBatch(ids, step.num_valid))
            while failures := self._failures(ids):
                ids = self.on_failure(task, ids, failures)
            return self.dataset.read(ids.tolist(), times)

    def _failures(self, ids: NDArray[np.int64]) -> list[RowFailure]:
        failures = []
        for row, sample in enumerate(ids.tolist()):
            try:
                self.dataset.read([sample])
            except StageinError as error:
                failures.append(RowFailure(row, error))
        return failures
