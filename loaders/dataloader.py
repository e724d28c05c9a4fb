"""`DataLoader`: torch's, with batches that DALI makes, an order that does not depend on ranks, and state that resumes."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, SupportsIndex

import torch
import torch.utils.data
from torch.utils.data import IterableDataset, Sampler, default_collate, default_convert

from stagein.failure_board import join_board
from stagein.formats.errors import UsageError
from stagein.launchers import ranks_on_this_node

from .bad_records import Replacement
from .collate import RecordCollate, RecordConvert, without_records, without_rows
from .dataset import RecordDataset, SamplesAsDicts
from .deliveries import Deliveries
from .devices import delivery_device
from .engine import CPU, EngineOptions, raise_first
from .fastpath import FastPath, ReadOptions
from .fetching import FedSteps, FetchSamples, TransformedCollate
from .frameworks import GraphCollate, view_for_accelerate
from .graphs import Graph
from .in_step import InStep, next_loader_number
from .inflate import why_not_inflated
from .iterable_order import IterableOrder
from .iteration import LoaderIterator
from .order import is_count
from .paths import LoadingPath, RecordPath, SamplePath, TorchPath
from .record_fetching import FetchRecords
from .sampler import GlobalOrder, Order, OwnOrder, OwnSampler, framework_sampler
from .sampler_order import SamplerOrder
from .share import Distributed, Share, divides_already, find_share, refuse_undivided
from .stats import LoaderStats
from .tensor_engine import delivers_tensors
from .to_device import CudaSender, ToCpu, ToDevice
from .transforms import understand
from .worker_info import MAX_SEED

_DEFAULT_PREFETCH_FACTOR = 2
_DEFAULT_PREFETCH_TO_DEVICE = 1
_MAY_BE_SET_LATER = {
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "in_order",
}
"""Attributes that, as in torch, count from the next iterator on when they are exchanged, as frameworks do it."""
_OURS = {
    "transform",
    "device",
    "seed",
    "distributed",
    "tail",
    "decode_threads",
    "prefetch_to_device",
    "on_error",
    "error_budget",
    "quarantine",
}


class DataLoader(torch.utils.data.DataLoader[Any]):
    """torch's DataLoader, with the same arguments; over a `RecordDataset` it takes the fast path.

    The fast path: `num_workers` reader threads (0: the caller) read records ahead, `prefetch_factor` batches each; DALI
    decodes and transforms whole batches in `decode_threads` threads or on the GPU; batches are dicts of tensors.
    Any other map-style data set is loaded by `num_workers` threads, or by worker processes where
    `multiprocessing_context` is given; an IterableDataset by torch's own iterator.

    batch_size    samples a rank and step. A global batch is `batch_size` x ranks.
    transform     over a RecordDataset: a graph (`image_train()`, `image_eval()`); a function from a dict of DALI nodes to such
                  a dict; a Compose of torchvision's, which becomes a graph if it can; `PerSample(function)`, or any object
                  that can be called, for samples one by one. Over any other data set: a function of one sample.
    device        where batches are delivered; by default, for a RecordDataset, the current CUDA device where there is one, else the
                  CPU. `pin_memory` is for batches that are delivered on the CPU; those for a GPU are pinned by themselves.
    prefetch_to_device  batches made on the GPU, or copied there on a stream of their own, ahead of the one that the caller works
                  on; by default 1. Without a GPU it has no effect, and says so as `pin_memory` does.
    seed          of the order and of the graph's random numbers.
    distributed   True: this rank's share, rank and world from torch.distributed, MPI or Slurm; (rank, world): these; one dimension
                  of a device mesh: ranks along it divide the samples, the others get the same; False: everything. None is
                  an error where there is more than one rank and no sampler: each would load all.
    tail          "share": the last samples are shared out, so a rank's last batch can be smaller, even empty; "pad":
                  batches are filled up, and `valid` (bool [batch]) says which rows count. `drop_last` drops them.
    decode_threads  DALI's threads; by default the cores of this process, divided by the ranks of this node.
    on_error      what a record that cannot be read or decoded does: "raise", or "replace": the next good record of the data set
                  takes its place, so that steps stay as many. At most `error_budget` records on this rank; each gets a
                  warning and a line of JSON in the file `quarantine` (shard, record, node, reason).

    Over a RecordDataset without `generator`, and over any map-style data set that is divided, the order is that of
    `order.py`: the same global batches whatever the number of ranks, each sample once an epoch, equally many steps on
    every rank. Else it is torch's, index by index. `iter()` is a new epoch. `collate_fn` gets samples as the data set has
    them, or what the transform makes of them: after a graph, rows of its batch. `persistent_workers` keeps threads and the
    DALI pipeline between epochs; over a RecordDataset in the order of `order.py` they go on with the next epoch, whose first
    batches so are there when they are asked for. Raises UsageError for what cannot be honoured, and ValueError where torch does.
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
        transform: Graph | Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        distributed: Distributed = None,
        tail: Literal["share", "pad"] = "share",
        decode_threads: int | None = None,
        prefetch_to_device: int | None = None,
        on_error: Literal["raise", "replace"] = "raise",
        error_budget: int = 100,
        quarantine: os.PathLike[str] | str | None = None,
    ) -> None:
        # As they were given, under the names of the arguments: frameworks make loaders anew from such attributes.
        self.transform, self.device, self.seed, self.distributed = transform, device, seed, distributed
        self.tail, self.decode_threads, self.prefetch_to_device = tail, decode_threads, prefetch_to_device
        self.on_error, self.error_budget, self.quarantine = on_error, error_budget, quarantine
        self._translation = understand(transform, dataset)
        _refuse_misplaced(self, dataset, drop_last)
        if self._translation.graph is not None and collate_fn is None:
            collate_fn = GraphCollate()
        own = _own_order(
            dataset, batch_size, shuffle, sampler, batch_sampler, drop_last, generator, seed, distributed, tail
        )
        if own is not None:
            sampler, shuffle = framework_sampler(own, dataset), None
        super().__init__(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            sampler=sampler,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            drop_last=drop_last,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            generator=generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        self._own = own
        divides_itself = sampler is not None or batch_sampler is not None or isinstance(dataset, IterableDataset)
        self._may_be_undivided = distributed is None and (own is not None or not divides_itself)
        self._order: Order = own or self._others_order()
        self._ordered_by = self._index_sampler
        if own is not None and self.batch_sampler is not None:
            self.batch_sampler.set_epoch = own.set_epoch  # type: ignore[attr-defined]  # HF Trainer tells it, not the loader
        self._is_accelerate_prepared = own is not None
        """Accelerate's `prepare` takes a loader apart unless it has this; one of our own order is divided and placed."""
        self._number = next_loader_number() if own is not None and own.order.world_size > 1 else None
        self._replacement = _replacement(self, dataset)
        self._delivery = _delivery(dataset, device)
        """None: wherever the data set and its collate_fn leave batches, as torch does."""
        self._chosen_path = self._choose_path()
        self._is_outdated = False

    def __setattr__(self, name: str, value: object) -> None:
        is_made = "_is_outdated" in vars(self)
        if is_made and name in _OURS and type(self) is DataLoader:  # a subclass may have its own of that name
            raise ValueError(f"{name} attribute should not be set after DataLoader is initialized")
        super().__setattr__(name, value)
        if is_made and name in _MAY_BE_SET_LATER:
            self._is_outdated = True
            if name in vars(self._order):
                setattr(self._order, name, value)

    @property
    def _path(self) -> LoadingPath:
        """The way to load, chosen anew where attributes were exchanged since; it counts on."""
        if self._is_outdated:
            so_far = self._chosen_path.stats
            self._chosen_path, self._is_outdated = self._choose_path(), False
            vars(self._chosen_path.stats).update(vars(so_far))
        return self._chosen_path

    def __class_getitem__(cls, batch: Any) -> GenericAlias:
        """`DataLoader[Batch]`, as scripts annotate torch's."""
        return GenericAlias(cls, batch)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._may_be_undivided:
            refuse_undivided()
        if self._index_sampler is not self._ordered_by:
            self._take_order_of_another_sampler()
        epoch = self._order.begin()
        self._warn_of_what_has_no_effect()
        deliveries = self._delivered(self._path.start(epoch, self._draw_base_seed))
        if self._number is not None and (board := join_board()) is not None:
            deliveries = InStep(deliveries, board, self._number, epoch.number)
        # Accelerate learns of our own order only from here: its `prepare` leaves such a loader as it is.
        view = view_for_accelerate(None if self._own is None else len(self))
        where = None if self._own is None or self._number is None else f"on {self._own.place}"
        return LoaderIterator(deliveries, epoch, len_of=self, view=view, where=where)

    def __len__(self) -> int:
        if self._own is not None:
            return len(self._own.order)
        if isinstance(self._path, TorchPath) and self._path.fed is None:
            return len(
                self._path.loader
            )  # there torch notes that it was asked, and warns of an IterableDataset that lied
        return super().__len__()

    def check_worker_number_rationality(self) -> None:
        """torch's warning about more workers than cores; threads that wait for files may be more."""
        if self.multiprocessing_context is not None or isinstance(self.dataset, IterableDataset):
            super().check_worker_number_rationality()

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next one, from its start; without effect where a loaded state is about to go on with it."""
        self._order.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What was delivered to the caller so far, whatever was read ahead; the same on every rank after the same step.

        Where the order is the loader's own, it counts samples, and any number of ranks can go on from it. Else it counts
        batches, and knows where the sampler's generators began; what cannot be gone on from says so under `refused`.
        """
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator go on where `state_dict` was called; in the loader's own order with any number of ranks and
        any batch size. Raises UsageError for the state of another data set, seed or order, or one that is `refused`."""
        if not isinstance(state, Mapping):
            raise UsageError(f"the loader cannot go on from {state!r}: give what state_dict() returned")
        self._order.load_state_dict(state)

    def stats(self) -> LoaderStats:
        """Seconds, batches, samples and bytes so far, on this rank."""
        dataset, replacement = self.dataset, self._replacement
        return replace(
            self._path.stats,
            left_shards=len(dataset.records.left_shards) if isinstance(dataset, RecordDataset) else 0,
            bad_records=0 if replacement is None else replacement.num_bad,
        )

    def explain(self) -> str:
        """What this loader does, in a few lines: who decides the order, who does the work."""
        transform = [f"transform: {line}" for line in self._translation.lines]
        reads = [f"reads: {self.dataset.description}"] if isinstance(self.dataset, RecordDataset) else []
        work = f"work: {self._path.description}, {self._why()}"
        return "\n".join(
            [self._order.description, *reads, *self._decompression(), *transform, work, self._device_line()]
        )

    def _decompression(self) -> list[str]:
        """Who decompresses the primary field, where it is compressed and asked for."""
        if not isinstance(self.dataset, RecordDataset):
            return []
        schema = self.dataset.records.schema
        codec = schema.primary_field.codec
        if codec is None or schema.primary not in self.dataset.fields:
            return []
        reason = why_not_inflated(self.dataset, self._delivery or CPU)
        if reason is None and not isinstance(self._path, RecordPath):
            reason = "samples come one by one"
        return [f"decompression: {codec.name} " + ("on the GPU" if reason is None else f"on the CPU, because {reason}")]

    def _device_line(self) -> str:
        """Where batches are delivered, and how they come there."""
        pinned = ", in page-locked memory" if self._pins else ""
        if self._delivery is None:
            return f"device: batches are left where the data set has them{pinned}, because no device= is given"
        if self._delivery.type == "cpu":
            why = "device= says so" if self.device is not None else "there is no CUDA device"
            return f"device: batches are delivered on the CPU{pinned}, because {why}"
        ahead = f"{self._num_prefetched} ahead of the caller"
        if isinstance(self._path, RecordPath) and self._path.delivers_on == self._delivery:
            return f"device: batches are made on {self._delivery} by DALI, {ahead}"
        return (
            f"device: batches are copied to {self._delivery} from page-locked memory on a stream of their own, {ahead}"
        )

    def _why(self) -> str:
        """Why the work is done so."""
        if isinstance(self.dataset, IterableDataset):
            return "because an IterableDataset says itself what comes next"
        if isinstance(self._path, TorchPath):
            return "because multiprocessing_context asks for processes"
        if not isinstance(self.dataset, RecordDataset):
            return "because a data set that is no RecordDataset is asked for one sample after the other"
        if isinstance(self._path, SamplePath):
            if self._translation.per_sample:
                return "because the transform takes samples: a graph would make whole batches"
            if delivers_tensors(self.dataset):
                return "because collate_fn takes samples: without it, batches are made whole"
            return "because there is no graph, and not all fields are tensors: a graph would make whole batches"
        return "whole batches at once"

    def _take_order_of_another_sampler(self) -> None:
        """What subclasses put in place of the sampler when the loader was made, such as one that never ends, says what comes next."""
        if self._own is not None:
            _refuse_pad_without_own_order(self.tail)
            self._own.goes_by_sampler = True
            self._own, self._number = None, None
        self._order, self._ordered_by = self._others_order(), self._index_sampler

    def _others_order(self) -> Order:
        if isinstance(self.dataset, IterableDataset):
            return IterableOrder(self.dataset, self.num_workers)
        samples = None
        if hasattr(self.dataset, "__len__"):
            with contextlib.suppress(NotImplementedError, TypeError):  # with a sampler, nobody has to know it
                samples = len(self.dataset)
        return SamplerOrder(
            self._index_sampler, self._auto_collation, samples, self.in_order, self.dataset, self.num_workers
        )

    @property
    def _pins(self) -> bool:
        """Whether batches are put into page-locked memory."""
        on_cpu = self._delivery is None or self._delivery.type == "cpu"
        return torch.accelerator.is_available() and (self.pin_memory or not on_cpu)

    def _choose_path(self) -> LoadingPath:
        is_default = self.collate_fn in (None, default_collate if self._auto_collation else default_convert)
        collate_fn = None if is_default or isinstance(self.collate_fn, GraphCollate) else self.collate_fn
        graph, per_sample = self._translation.graph, self._translation.per_sample
        if graph is not None or (per_sample is None and collate_fn is None and self._needs_only_reading()):
            return self._record_path(graph, collate_fn)
        dataset, batched, collate = self.dataset, self._auto_collation, self.collate_fn
        if isinstance(dataset, RecordDataset):
            if collate_fn is not None:
                collate = TransformedCollate(dataset.shaped, collate, batched)
            else:
                listed = dataset.listed_fields if per_sample is None else dataset.listed_after_transform
                collate = RecordCollate(listed, dataset.shaped) if batched else RecordConvert(dataset.shaped)
            dataset = SamplesAsDicts(dataset)
        by_torch = collate if per_sample is None else TransformedCollate(per_sample, collate, batched)
        if isinstance(dataset, IterableDataset):
            batching: dict[str, Any] = {"batch_size": self.batch_size, "drop_last": self.drop_last}
            return TorchPath(self._torchs_loader(dataset, by_torch, **batching), fed=None)
        if self.multiprocessing_context is not None:
            threads_only = {"tail='pad'": self.tail == "pad", "on_error='replace'": self._replacement is not None}
            for name in (name for name, given in threads_only.items() if given):
                raise UsageError(f"{name} is honoured in threads, not in processes: leave multiprocessing_context out")
            fed = FedSteps()
            batching = {"batch_sampler": fed} if batched else {"batch_size": None, "sampler": fed}
            return TorchPath(self._torchs_loader(dataset, by_torch, **batching), fed)
        if self.timeout > 0 and not self.num_workers:
            raise UsageError("timeout= limits the wait for workers: give num_workers, or leave it out")
        if dataset is self.dataset:
            may_be_empty = collate_fn is None and self._own is not None
            fetch = FetchSamples(dataset, collate, batched, without_rows if may_be_empty else None, per_sample)
        else:
            fetch = FetchRecords(
                dataset,
                collate,
                batched,
                empty_of=without_records if collate_fn is None else None,
                transform=per_sample,
                with_valid=self.tail == "pad",
                on_failure=self._replacement or raise_first,
            )
        return SamplePath(
            fetch,
            self.num_workers,
            self.prefetch_factor or 1,
            self.timeout,
            self.in_order,
            self.persistent_workers,
            self.worker_init_fn,
            self._pins,
        )

    def _needs_only_reading(self) -> bool:
        """Whether records are batches as they are, and threads may read them."""
        dataset = self.dataset
        return isinstance(dataset, RecordDataset) and delivers_tensors(dataset) and self.multiprocessing_context is None

    def _record_path(self, graph: Graph | None, collate_fn: Callable[[Any], Any] | None) -> RecordPath:
        """The fast path. Raises UsageError for arguments that it cannot honour."""
        assert isinstance(self.dataset, RecordDataset)
        if self.multiprocessing_context is not None:
            raise UsageError(
                "multiprocessing_context= is not honoured beside a graph, which runs in threads: leave it out"
            )
        if self.timeout > 0 and not self.num_workers:
            raise UsageError("timeout= limits the wait for workers: give num_workers, or leave it out")
        assert self._delivery is not None
        reading = ReadOptions(
            self.num_workers, self.prefetch_factor or _DEFAULT_PREFETCH_FACTOR, self.timeout, self.worker_init_fn
        )
        options = EngineOptions(
            decode_threads=_decode_threads(self.decode_threads),
            device=self._delivery,
            pin_memory=self._pins,
            keep_between_epochs=self.persistent_workers,
            prefetch_to_device=self._num_prefetched,
        )
        on_failure = self._replacement or raise_first
        return RecordPath(
            FastPath(self.dataset, graph, self.seed, reading, options, on_failure),
            collate_fn,
            self._auto_collation,
            with_valid=self.tail == "pad",
            shaped=self.dataset.shaped,
            replacement=self._replacement,
            listed_fields=self.dataset.listed_fields,
            pin_memory=self._pins and self._delivery.type == "cpu",
            persistent=self.persistent_workers,
        )

    def _torchs_loader(
        self, dataset: Any, collate: Callable[[Any], Any], **batching: Any
    ) -> torch.utils.data.DataLoader[Any]:
        """A loader of torch's that does the work of this one."""
        # An order of our own draws nothing from torch's global generator, and neither do its workers' seeds.
        generator = self.generator if self._own is None else torch.Generator().manual_seed(self.seed & MAX_SEED)
        return torch.utils.data.DataLoader(
            dataset,
            **batching,
            collate_fn=collate,
            pin_memory=self._pins,
            num_workers=self.num_workers,
            timeout=self.timeout,
            worker_init_fn=self.worker_init_fn,
            multiprocessing_context=self.multiprocessing_context,
            generator=generator,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            in_order=self.in_order,
        )

    def _draw_base_seed(self) -> int:
        """What the workers' seeds start from: drawn as torch draws it, or following from the seed of an order of our own."""
        if self._own is not None:
            return self.seed & MAX_SEED
        return int(torch.empty((), dtype=torch.int64).random_(generator=self.generator).item())

    def _delivered(self, deliveries: Deliveries) -> Deliveries:
        """The same where they are wanted."""
        if self._delivery is None or (isinstance(self._path, RecordPath) and self._path.delivers_on == self._delivery):
            return deliveries
        if self._delivery.type == "cpu":
            return ToCpu(deliveries)
        return ToDevice(deliveries, CudaSender(self._delivery), self._num_prefetched, self._path.stats)

    @property
    def _num_prefetched(self) -> int:
        return _DEFAULT_PREFETCH_TO_DEVICE if self.prefetch_to_device is None else self.prefetch_to_device

    def _warn_of_what_has_no_effect(self) -> None:
        """torch's warnings about page-locked memory, and the like of ours."""
        if self.pin_memory and self.pin_memory_device:
            warnings.warn(
                f"pin_memory_device is deprecated: {self.pin_memory_device!r} is ignored for the current accelerator",
                stacklevel=3,
            )
        if self.pin_memory and not torch.accelerator.is_available():
            warnings.warn("pin_memory=True has no effect: there is no accelerator", stacklevel=3)
        if self.prefetch_to_device and (self._delivery is None or self._delivery.type == "cpu"):
            reason = "batches are delivered on the CPU" if torch.cuda.is_available() else "there is no accelerator"
            warnings.warn(f"prefetch_to_device={self.prefetch_to_device} has no effect: {reason}", stacklevel=3)


def _own_order(
    dataset: Any,
    batch_size: int | None,
    shuffle: bool | None,
    sampler: Iterable[Any] | None,
    batch_sampler: Iterable[Any] | None,
    drop_last: bool,
    generator: torch.Generator | None,
    seed: int,
    distributed: Distributed,
    tail: Literal["share", "pad"],
) -> OwnOrder | None:
    """The loader's own order; None where it is torch's, or the data set's. Raises UsageError for what fits neither."""
    if isinstance(dataset, IterableDataset):
        if find_share(distributed).world_size > 1:
            raise UsageError(
                "distributed= cannot divide an IterableDataset: let it yield this rank's samples, and say distributed=False"
            )
        _refuse_pad_without_own_order(tail)
        return None
    is_divided = distributed is not None and distributed is not False
    if isinstance(sampler, OwnSampler) and batch_sampler is None:
        is_divided = True
        # Some framework makes this loader anew, with the sampler that it found in another.
        order = sampler.own.order
        share = Share(order.rank, order.world_size, sampler.own.said_by)
        seed, shuffle = order.seed, order.shuffle
    elif sampler is not None or batch_sampler is not None:
        if is_divided and not divides_already(sampler, batch_sampler):
            raise UsageError(
                "distributed= divides the loader's own batches: leave it out beside sampler and batch_sampler"
            )
        _refuse_pad_without_own_order(tail)
        return None
    else:
        share = find_share(distributed)
    # Divided among one rank, it is the same order still: a run on several ranks can go on there.
    if not is_divided and (not isinstance(dataset, RecordDataset) or generator is not None):
        _refuse_pad_without_own_order(tail)
        return None
    if generator is not None:
        raise UsageError(
            "generator= cannot order samples that ranks divide: their order follows from seed=, leave it out"
        )
    order = GlobalOrder(
        samples=len(dataset),
        batch_size=1 if batch_size is None else _positive(batch_size),
        rank=share.rank,
        world_size=share.world_size,
        seed=seed,
        shuffle=bool(shuffle),
        tail="drop" if drop_last else tail,
    )
    dataset_id = dataset.records.manifest.id if isinstance(dataset, RecordDataset) else None
    return OwnOrder(order, dataset_id, batch_size is not None, share.said_by)


def _refuse_pad_without_own_order(tail: str) -> None:
    if tail == "pad":
        raise UsageError(
            "tail='pad' fills up batches of the loader's own order, over a RecordDataset or distributed, without sampler, "
            "batch_sampler and generator: leave it out"
        )


def _positive(batch_size: int) -> int:
    if not is_count(batch_size) or batch_size == 0:
        raise ValueError(f"batch_size should be a positive integer value, but got batch_size={batch_size}")
    return batch_size


def _refuse_misplaced(loader: DataLoader, dataset: object, drop_last: bool) -> None:
    """Raise UsageError for arguments of ours that have no meaning for this data set or transform."""
    seed, tail = loader.seed, loader.tail
    if not isinstance(seed, SupportsIndex) or not 0 <= seed < 2**64:
        raise UsageError(f"seed={seed!r} is not a seed: it is from 0 to 2**64 - 1")
    if tail not in ("share", "pad"):
        raise UsageError(f"tail={tail!r} is not known: it is 'share' or 'pad'; drop_last=True drops the last samples")
    if tail == "pad" and drop_last:
        raise UsageError("tail='pad' keeps the last samples and drop_last=True drops them: leave one of them out")
    if tail == "pad" and not isinstance(dataset, RecordDataset):
        raise UsageError("tail='pad' needs a RecordDataset: only its batches have a place for `valid`")
    ahead = loader.prefetch_to_device
    if ahead is not None and not is_count(ahead):
        raise UsageError(f"prefetch_to_device={ahead!r} is not a number of batches: it is at least 0")
    if loader.decode_threads is not None and loader._translation.graph is None:
        raise UsageError("decode_threads= needs a graph: everything else is decoded by the workers, see num_workers")


def _replacement(loader: DataLoader, dataset: object) -> Replacement | None:
    """What replaces bad records; None where they are errors. Raises UsageError for arguments that do not fit together."""
    if loader.on_error not in ("raise", "replace"):
        raise UsageError(f"on_error={loader.on_error!r} is not known: it is 'raise' or 'replace'")
    if loader.on_error == "raise":
        if loader.quarantine is not None:
            raise UsageError("quarantine= lists records that were replaced: give on_error='replace', or leave it out")
        return None
    if not isinstance(dataset, RecordDataset):
        raise UsageError(
            "on_error='replace' needs a RecordDataset: only its records can be told from errors of a script"
        )
    if not is_count(loader.error_budget):
        raise UsageError(f"error_budget={loader.error_budget!r} is not a number of records: it is at least 0")
    return Replacement(dataset, loader.error_budget, None if loader.quarantine is None else Path(loader.quarantine))


def _decode_threads(asked: int | None) -> int:
    """DALI's threads; by default the cores this process may use, divided by the ranks of the node that share them."""
    if asked is None:
        return max(1, len(os.sched_getaffinity(0)) // ranks_on_this_node())
    if not is_count(asked) or asked == 0:
        raise UsageError(f"decode_threads={asked!r} is not a number of threads: it is at least 1")
    return asked


def _delivery(dataset: object, device: torch.device | str | None) -> torch.device | None:
    """Where batches are delivered; None where nobody says so."""
    return None if device is None and not isinstance(dataset, RecordDataset) else delivery_device(device)
