"""Samples into batches, and batches back into samples: the structures users meet."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import default_collate, default_convert

from stagein.formats.errors import UsageError

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class RecordCollate:
    """A batch of a RecordDataset's samples: a tensor `[batch, ...]` a field; a list, one entry a sample, for those `listed`.

    shaped  what is made of the dict at last.

    Samples that a transform made no dicts of are collated as torch does it. Raises UsageError where the samples of a field
    that is not listed differ in shape.
    """

    listed: frozenset[str]
    shaped: Callable[[dict[str, Any]], Any]

    def __call__(self, samples: Sequence[Any]) -> Any:
        if not isinstance(samples[0], Mapping):
            return default_collate(list(samples))
        batch = {
            name: [_as_tensor(sample[name]) for sample in samples]
            if name in self.listed
            else _stacked(name, [sample[name] for sample in samples])
            for name in samples[0]
        }
        return self.shaped(batch)


def _stacked(name: str, values: list[Any]) -> Any:
    shapes = {value.shape for value in values if hasattr(value, "shape")}
    if len(shapes) > 1:
        first, second, *_ = sorted(shapes)
        raise UsageError(
            f"the samples of {name!r} differ in shape, {first} and {second}: let a transform resize or pad them, give a "
            "collate_fn, or leave the field out"
        )
    return default_collate(list(map(_without_scalars, values)))


@dataclass(frozen=True)
class RecordConvert:
    """A sample of a RecordDataset that is delivered by itself: tensors in place of arrays and numbers."""

    shaped: Callable[[dict[str, Any]], Any]

    def __call__(self, sample: Any) -> Any:
        if not isinstance(sample, Mapping):
            return default_convert(sample)  # type: ignore[no-untyped-call]
        fields = {name: _without_scalars(value) for name, value in sample.items()}
        return default_convert(self.shaped(fields))  # type: ignore[no-untyped-call]


def _without_scalars(value: Any) -> Any:
    """torch takes no number of numpy's uint64 above 2**63, but an array of one."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def rows_as_samples(batch: Mapping[str, Any], num_rows: int) -> list[dict[str, Any]]:
    """Each row of a batch as a sample of its own: views, where fields are tensors."""
    return [{name: rows[row] for name, rows in batch.items()} for row in range(num_rows)]


def without_rows(batch: Any) -> Any:
    """The same structure with no row in any tensor: what a rank gets that has no sample in a step."""
    return map_tensors(lambda tensor: tensor[:0], batch, of_lists=lambda _: [])


def without_records(batch: Any) -> Any:
    """The same for a batch of records, a dict or a tuple of fields, where a list has one entry a record."""
    if type(batch) is tuple:
        return tuple(map(_without_entries, batch))
    return (
        {name: _without_entries(value) for name, value in batch.items()} if type(batch) is dict else without_rows(batch)
    )


def _without_entries(field: Any) -> Any:
    return [] if isinstance(field, list) else without_records(field)


def map_tensors(
    function: Callable[[torch.Tensor], Any], batch: Any, of_lists: Callable[[list[Any]], list[Any]] | None = None
) -> Any:
    """`function` of every tensor in a batch: in mappings, lists, tuples and named tuples; whatever else stays as it is.

    of_lists  what becomes of a list that holds no tensors, such as strings; None: it stays.
    """
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        items = {name: map_tensors(function, value, of_lists) for name, value in batch.items()}
        return items if type(batch) is dict else _same_type(batch, items)
    if isinstance(batch, PackedSequence):  # the sizes of its batches stay on the CPU
        orders = [None if each is None else function(each) for each in (batch.sorted_indices, batch.unsorted_indices)]
        return PackedSequence(function(batch.data), batch.batch_sizes, *orders)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value, of_lists) for value in batch))
    if (
        isinstance(batch, list)
        and of_lists is not None
        and not any(isinstance(each, torch.Tensor | Mapping) for each in batch)
    ):
        return of_lists(batch)
    if isinstance(batch, list | tuple):
        values = [map_tensors(function, value, of_lists) for value in batch]
        return values if type(batch) is list else _same_type(batch, values)
    return batch


def tensors_in(batch: Any) -> Iterator[torch.Tensor]:
    """All tensors in a batch; each container is looked into once."""
    left, seen = [batch], set()
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, Mapping | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            left += each.values() if isinstance(each, Mapping) else each


def tensor_bytes(batch: Any) -> int:
    """The bytes of all dense tensors in a batch."""
    return sum(tensor.nbytes for tensor in tensors_in(batch) if tensor.layout is torch.strided)


def _same_type(batch: Any, values: Any) -> Any:
    """`values`, a dict or a list, in a container like `batch`: a copy of it where it can be filled anew, as torch does where it pins one;
    plain where neither that can be done nor its type takes them."""
    try:
        if isinstance(batch, MutableMapping):
            filled = copy.copy(batch)
            filled.update(values)
            return filled
        if isinstance(batch, list):
            of_list = copy.copy(batch)
            of_list[:] = values
            return of_list
        return type(batch)(values)
    except (TypeError, AttributeError, ValueError):
        return tuple(values) if isinstance(batch, tuple) else values


def _as_tensor(value: Any) -> Any:
    return value if isinstance(value, str | bytes) else torch.as_tensor(value)
