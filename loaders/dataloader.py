"""`DataLoader`: torch's, with batches that DALI makes, an order that does not depend on ranks, and state that resumes."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.utils.data
from torch.utils.data import IterableDataset, Sampler

from stagein.formats.errors import UsageError
from stagein.world import find_rank, ranks_on_this_node

from .batches import tasks_of
from .dali import import_dali
from .dataset import RecordDataset
from .fastpath import Batch, FastPath, FastPathOptions, LoaderStats
from .graphs import Graph, Nodes, as_graph
from .sampler import GlobalBatchSampler, GlobalOrder, Progress

Distributed = bool | tuple[int, int] | None
_DEFAULT_PREFETCH_FACTOR = 2


class DataLoader(torch.utils.data.DataLoader[Any]):
    """torch's DataLoader, with the same arguments; over a `RecordDataset` with a `transform` it takes the fast path.

    The fast path: `num_workers` reader threads (0: the caller) read records ahead, `prefetch_factor` batches each; DALI
    decodes and transforms whole batches in `decode_threads` threads or on the GPU; batches are dicts of tensors.
    Without `transform`, and over any other data set, torch's own iterator does the work.

    batch_size    samples a rank and step. A global batch is `batch_size` x ranks.
    transform     a graph (`image_train()`, `image_eval()`), or a function from a dict of DALI nodes to such a dict.
    device        where batches are delivered; by default the current CUDA device where there is one, else the CPU.
    seed          of the order and of the graph's random numbers.
    distributed   True: this rank's share, rank and world from torch.distributed or MPI; (rank, world): these; False:
                  everything. None is an error where there is more than one rank and no sampler: each would load all.
    tail          "share": the last samples are shared out, so a rank's last batch can be smaller, even empty; "pad":
                  batches are filled up, and `valid` (bool [batch]) says which rows count. `drop_last` drops them.
    decode_threads  DALI's threads; by default the cores of this process, divided by the ranks of this node.

    Over a RecordDataset, and over any map-style data set when distributed, the order is that of `order.py`: the same
    global batches whatever the number of ranks, each sample once an epoch, equally many steps on every rank.
    `iter()` is a new epoch. Batches come in order whatever `in_order` says; `persistent_workers` keeps the DALI pipeline
    between epochs; `timeout` limits the wait for reading. Raises UsageError for what cannot be honoured, and ValueError
    where torch does.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        transform: Graph | Callable[[Nodes], Nodes] | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        distributed: Distributed = None,
        tail: Literal["share", "pad"] = "share",
        decode_threads: int | None = None,
    ) -> None:
        users_order = sampler is not None or batch_sampler is not None or batch_size is None
        rank, world_size = _find_share(distributed, dataset, users_order)
        graph = None if transform is None else as_graph(transform)
        self._order: GlobalOrder | None = None
        if not users_order and (isinstance(dataset, RecordDataset) or world_size > 1):
            self._order = GlobalOrder(
                samples=len(dataset),  # type: ignore[arg-type]
                batch_size=_positive(batch_size),
                rank=rank,
                world_size=world_size,
                seed=seed,
                shuffle=bool(shuffle),
                tail="drop" if drop_last else tail,
            )
        _refuse_misplaced(dataset, graph, self._order, drop_last, tail, seed, device, decode_threads)
        batching: dict[str, Any] = {
            "batch_size": batch_size,
            "shuffle": shuffle,
            "sampler": sampler,
            "batch_sampler": batch_sampler,
            "drop_last": drop_last,
        }
        if self._order is not None:
            self._batches = GlobalBatchSampler(self._order)
            batching = {"batch_sampler": self._batches}
        super().__init__(
            dataset,
            **batching,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            generator=generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        if self._order is not None:  # as the caller gave them: torch forgets them beside a batch_sampler
            object.__setattr__(self, "batch_size", batch_size)
            object.__setattr__(self, "drop_last", drop_last)
        self.seed = seed
        self._progress = Progress()
        self._at_start = True
        """Whether the next iterator takes up `_progress`; otherwise it begins the epoch after it."""
        self._fast_path: FastPath | None = None
        if graph is not None:
            assert isinstance(dataset, RecordDataset)
            _refuse_not_yet_honoured(
                {
                    "batch_size=None": batch_size is None,
                    "collate_fn=": collate_fn is not None,
                    "worker_init_fn=": worker_init_fn is not None,
                    "multiprocessing_context=": multiprocessing_context is not None,
                    "generator=": generator is not None,
                    "pin_memory_device=": bool(pin_memory_device),
                    "timeout= without num_workers": timeout > 0 and num_workers == 0,
                }
            )
            import_dali()
            device = _delivery_device(device)
            options = FastPathOptions(
                num_readers=num_workers,
                batches_per_reader=_DEFAULT_PREFETCH_FACTOR if prefetch_factor is None else prefetch_factor,
                read_timeout_s=timeout,
                decode_threads=_decode_threads(decode_threads),
                device=device,
                pin_memory=pin_memory and device.type == "cpu" and torch.cuda.is_available(),
                keep_pipeline=persistent_workers,
            )
            self._fast_path = FastPath(dataset, graph, seed, options)

    def check_worker_number_rationality(self) -> None:
        """torch's warning about more workers than cores; here workers are threads that wait for files."""
        if not isinstance(self.dataset, RecordDataset):
            super().check_worker_number_rationality()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        progress = self._begin_epoch()
        if self._fast_path is not None:
            return self._run_fast_path(self._fast_path, progress)
        if self._order is not None:
            self._batches.progress = replace(progress)
            return self._count(super().__iter__(), self._order, progress)
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next one, from its start; without effect where a loaded state is about to go on with it."""
        if not (self._at_start and self._progress.epoch == epoch):
            self._progress, self._at_start = Progress(epoch), True
        for sampler in (self.sampler, self.batch_sampler):
            tell_epoch = getattr(sampler, "set_epoch", None)  # DistributedSampler has it
            if tell_epoch is not None:
                tell_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """How many samples all ranks together were given in which epoch: the same on every rank after the same step.

        Raises UsageError where the order is not the loader's own.
        """
        return {**self._identity(), "epoch": self._progress.epoch, "samples_delivered": self._progress.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator go on where `state_dict` was called, with any number of ranks and any batch size.

        Raises UsageError for the state of another data set, seed or order.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UsageError(
                    f"the loader cannot go on from this state: its {name} is {state.get(name)!r}, the loader's is {value!r}; "
                    "use the data set and the settings of the run that wrote it"
                )
        self._progress = Progress(int(state["epoch"]), int(state["samples_delivered"]))
        self._at_start = True

    def stats(self) -> LoaderStats:
        """Seconds, batches, samples and bytes so far, on this rank. Raises UsageError where torch's own iterator does the work."""
        if self._fast_path is None:
            raise UsageError("stats() needs a RecordDataset with a transform: torch's own iterator does not count")
        return replace(self._fast_path.stats)

    def explain(self) -> str:
        """What this loader does, in a few lines: who decides the order, who does the work."""
        if self._order is None:
            order = "order: by torch's samplers"
        else:
            order = (
                f"order: the loader's own, seed {self._order.seed}, {'shuffled' if self._order.shuffle else 'not shuffled'}, "
                f"rank {self._order.rank} of {self._order.world_size}, global batch {self._order.global_batch}, tail: {self._order.tail}"
            )
        if self._fast_path is None:
            return f"{order}\nwork: by torch's own iterator, {self.num_workers} worker processes"
        options = self._fast_path.options
        return (
            f"{order}\nwork: {options.num_readers} reader threads, DALI with {options.decode_threads} threads, "
            f"batches on {options.device}"
        )

    def _begin_epoch(self) -> Progress:
        if not self._at_start:
            self._progress = Progress(self._progress.epoch + 1)
        self._at_start = False
        return self._progress

    def _end_epoch(self, progress: Progress) -> None:
        """After the last batch; an iterator that was given up in favour of a newer one has no say any more."""
        if progress is self._progress:
            self._progress, self._at_start = Progress(progress.epoch + 1), True

    def _run_fast_path(self, fast_path: FastPath, progress: Progress) -> Iterator[Batch]:
        epoch = progress.epoch
        if self._order is None:
            tasks = tasks_of(epoch, 0, self.batch_sampler)  # type: ignore[arg-type]
        else:
            first = progress.samples // self._order.global_batch
            tasks = tasks_of(epoch, first, self._order.batches(progress))
        for task, batch in fast_path.run(tasks):
            if self._order is not None:
                if self._order.tail == "pad":
                    rows = torch.arange(len(task.rows.ids), device=fast_path.options.device)
                    batch["valid"] = rows < task.rows.num_valid
                self._order.advance(progress)
            yield batch
        self._end_epoch(progress)

    def _count(self, iterator: Iterator[Any], order: GlobalOrder, progress: Progress) -> Iterator[Any]:
        for batch in iterator:
            order.advance(progress)
            yield batch
        self._end_epoch(progress)

    def _identity(self) -> dict[str, Any]:
        """What two runs must share for the state of one to make sense to the other."""
        if self._order is None:
            raise UsageError(
                "state_dict and load_state_dict need the loader's own order: a RecordDataset and no sampler"
            )
        return {
            "dataset": self.dataset.records.manifest.id if isinstance(self.dataset, RecordDataset) else None,
            "samples": self._order.samples,
            "seed": self._order.seed,
            "shuffle": self._order.shuffle,
        }


def _find_share(distributed: Distributed, dataset: object, users_order: bool) -> tuple[int, int]:
    """Rank and world size that the samples are divided by; (0, 1): they are not divided."""
    if isinstance(distributed, tuple):
        rank, world_size = distributed
        if not 0 <= rank < world_size:
            raise UsageError(f"distributed={distributed!r} is not (rank, world size) with 0 <= rank < world size")
    elif distributed is False or (distributed is None and (users_order or isinstance(dataset, IterableDataset))):
        return 0, 1
    else:
        rank, world_size = find_rank()
        if distributed is None and world_size > 1:
            raise UsageError(
                f"this is rank {rank} of {world_size}, and every rank would load all samples: say distributed=True for a share each, "
                "distributed=False for all, or give a sampler"
            )
    if users_order and distributed:
        raise UsageError(
            "distributed= divides the loader's own batches: leave it out beside sampler, batch_sampler and batch_size=None"
        )
    if world_size > 1 and isinstance(dataset, IterableDataset):
        raise UsageError(
            "distributed= cannot divide an IterableDataset: let it yield this rank's samples, and leave distributed out"
        )
    return rank, world_size


def _positive(batch_size: int | None) -> int:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size <= 0:
        raise ValueError(f"batch_size should be a positive integer value, but got batch_size={batch_size}")
    return batch_size


def _refuse_misplaced(
    dataset: object,
    graph: Graph | None,
    order: GlobalOrder | None,
    drop_last: bool,
    tail: str,
    seed: int,
    device: object,
    decode_threads: int | None,
) -> None:
    """Raise UsageError for arguments of ours that have no meaning for this data set, transform or sampler."""
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed={seed} is not a seed: it is from 0 to 2**64 - 1")
    if graph is not None and not isinstance(dataset, RecordDataset):
        raise UsageError(
            f"transform= needs a RecordDataset, not a {type(dataset).__name__}: transform its samples in __getitem__"
        )
    if tail not in ("share", "pad"):
        raise UsageError(f"tail={tail!r} is not known: it is 'share' or 'pad'; drop_last=True drops the last samples")
    if graph is None:
        given = {
            "device": device is not None,
            "decode_threads": decode_threads is not None,
            "tail='pad'": tail == "pad",
        }
        for name in (name for name, present in given.items() if present):
            raise UsageError(f"{name} needs a RecordDataset with a transform: torch's own iterator cannot honour it")
    if tail == "pad" and order is None:
        raise UsageError("tail='pad' fills up the loader's own batches: leave it out beside sampler and batch_sampler")
    if tail == "pad" and drop_last:
        raise UsageError("tail='pad' keeps the last samples and drop_last=True drops them: leave one of them out")


def _refuse_not_yet_honoured(arguments: Mapping[str, bool]) -> None:
    """Raise UsageError for the first argument of torch's that was given: the fast path never ignores one."""
    for name, given in arguments.items():
        if given:
            raise UsageError(f"{name} is not honoured yet beside transform=: leave one of the two out")


def _decode_threads(asked: int | None) -> int:
    """DALI's threads; by default the cores this process may use, divided by the ranks of the node that share them."""
    if asked is None:
        return max(1, len(os.sched_getaffinity(0)) // ranks_on_this_node())
    if asked < 1:
        raise UsageError(f"decode_threads={asked} is not a number of threads: it is at least 1")
    return asked


def _delivery_device(device: torch.device | str | None) -> torch.device:
    """`device` with its index; by default the current CUDA device where there is one, else the CPU."""
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type not in ("cpu", "cuda"):
        raise UsageError(f"device={str(wanted)!r} is not supported: batches are delivered on 'cpu' or on 'cuda'")
    if wanted.type == "cuda" and wanted.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return wanted
