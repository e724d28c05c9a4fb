"""What `iter(loader)` returns: the batches of one epoch, each counted before it is handed over."""

from collections.abc import Iterator, Sized
from typing import Any

from stagein.formats.errors import StageinError, add_note

from .deliveries import Deliveries, Failure
from .frameworks import AccelerateView
from .sampler import Epoch


class LoaderIterator:
    """An iterator over an epoch's batches. What runs for it ends when it is exhausted, closed or dropped.

    len_of  the loader: `len()` of the iterator is that of a whole epoch, as in torch.
    view    is told of each step before its batch is handed over.
    where   rank and node, noted in errors where there are several.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        epoch: Epoch,
        len_of: Sized,
        view: AccelerateView | None = None,
        where: str | None = None,
    ) -> None:
        self._deliveries, self._epoch = deliveries, epoch
        self._len_of, self._view, self._where = len_of, view, where
        self._over = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return len(self._len_of)

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        try:
            step, batch = next(self._deliveries)
        except StopIteration:
            self.close()
            self._epoch.finished()
            raise
        except StageinError as raised:
            self._note_where(raised)
            raise
        if isinstance(batch, Failure):
            error = batch.error
            self._note_where(error)
            del self, batch  # or the traceback would keep the iterator and its threads alive
            try:
                raise error
            finally:
                del error
        self._epoch.delivered(step)
        if self._view is not None:
            self._view.delivering(step.number)
        return batch

    def _note_where(self, error: BaseException) -> None:
        if self._where is not None and not getattr(error, "reported_by_peer", False):
            add_note(error, self._where)

    def close(self) -> None:
        """End the epoch here: threads, processes and pipelines of it are gone when this returns."""
        if not self._over:
            self._over = True
            self._deliveries.close()
            if self._view is not None:
                self._view.end()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> None:
        raise NotImplementedError(
            "an iterator of a DataLoader cannot be pickled: pickle the loader, and its state_dict()"
        )
