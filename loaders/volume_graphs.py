"""Graphs of tensor volumes: a crop of fixed size, flips along each axis, values normalised per channel; the same crop of a mask."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import SourceError, UsageError
from stagein.formats.schema import Field, shape_name

from .augment import random_axis_flips, random_starts, volume_uniforms
from .dali import import_dali
from .graphs import DecodeDevice, HostPlan, Nodes, SampleBatch, as_numbers, is_known_to_dali

Channels = Literal["first", "last"] | None
"""Which axis they are; None: there is no such axis."""
_CHANNEL_AXIS = {"first": 0, "last": -1}
_PLAN = "start_and_flips"


@dataclass(frozen=True)
class VolumeGraph:
    """See `volume_train` and `volume_eval`."""

    field: str
    mask: str | None
    crop: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Channels
    flip: tuple[float, ...]
    is_random: bool

    def plan(self, batch: SampleBatch) -> HostPlan:
        extents = self._extents(batch)
        if self.is_random:
            uniforms = volume_uniforms(batch.seed, batch.epoch, batch.ids)
            start, flips = random_starts(uniforms, extents, self.crop), random_axis_flips(uniforms, self.flip)
        else:
            start = np.subtract(extents, self.crop) // 2
            flips = np.zeros_like(start)
        fed: dict[str, Any] = {_PLAN: np.column_stack([start, flips]).astype(np.int32)}
        ready = dict(batch.columns)
        if self.field in ready:
            fed[self.field] = ready.pop(self.field)
        if self.mask is not None:
            field, masks = batch.schema.fields[self.mask], ready.pop(self.mask)
            channels = self.channels if len(field.shape) > len(self.crop) else None
            self._refuse_other_extents(batch.ids, masks, channels, extents)
            fed[self._bare_mask if channels is None else self.mask] = _known_to_slice(masks, field)
        return HostPlan(fed, ready)

    def build(self, nodes: Nodes, decode_device: DecodeDevice) -> Nodes:
        fn, types = import_dali().fn, import_dali().types
        plan, shape = nodes[_PLAN], [1] * self._num_axes(self.channels)
        if self.channels is not None:
            shape[_CHANNEL_AXIS[self.channels]] = len(self.mean)
        mean, std = (np.array(numbers, np.float32).reshape(shape) for numbers in (self.mean, self.std))
        values = fn.cast(self._cropped(nodes, self.field, self.channels, decode_device), dtype=types.FLOAT)
        values = self._flipped(values, plan, self.channels)
        axes = _spatial_axes(len(self.crop), self.channels)
        built = {self.field: fn.normalize(values, axes=axes, mean=mean, stddev=std)}
        if self.mask is not None:
            name, channels = (self._bare_mask, None) if self._bare_mask in nodes else (self.mask, self.channels)
            built[self.mask] = self._flipped(self._cropped(nodes, name, channels, decode_device), plan, channels)
        return built

    def _cropped(self, nodes: Nodes, name: str, channels: Channels, decode_device: DecodeDevice) -> Any:
        if name not in nodes:  # small fields are read for the plan, but not fed where they are not asked for
            raise _unnamed(name)
        node, num_axes = nodes[name].gpu() if decode_device == "mixed" else nodes[name], len(self.crop)
        axes = _spatial_axes(num_axes, channels)
        return import_dali().fn.slice(node, start=nodes[_PLAN][0:num_axes], shape=list(self.crop), axes=axes)

    def _flipped(self, node: Any, plan: Any, channels: Channels) -> Any:
        if not self.is_random:
            return node
        fn, num_axes = import_dali().fn, len(self.crop)
        names = "DHW"[-num_axes:]
        if channels is None:  # DALI reverses nothing without channels
            node = fn.reshape(node, src_dims=[*range(num_axes), -1], layout=f"{names}C")
        else:
            node = fn.reshape(node, layout=f"C{names}" if channels == "first" else f"{names}C")
        flips = {name: plan[num_axes + axis] for axis, name in enumerate(_FLIP_NAMES[-num_axes:])}
        node = fn.flip(node, **flips)
        return fn.squeeze(node, axes=num_axes) if channels is None else node

    def _num_axes(self, channels: Channels) -> int:
        return len(self.crop) + (channels is not None)

    @property
    def _bare_mask(self) -> str:
        """What a mask without channels is fed as: whether it has any is not known where the graph is built."""
        return f"{self.mask} without channels"

    def _refuse_other_extents(
        self, ids: NDArray[np.int64], masks: Any, channels: Channels, extents: NDArray[np.int64]
    ) -> None:
        """Raise SourceError for a mask that is not as large as its volume."""
        axes = _spatial_axes(len(self.crop), channels)
        for number, mask, expected in zip(ids.tolist(), masks, extents.tolist(), strict=True):
            found = [mask.shape[axis] for axis in axes]
            if found != expected:
                raise SourceError(
                    f"{self.mask!r} of record {number} is {_by(found)}, but {self.field!r} is {_by(expected)}: a mask is as large "
                    "as its volume"
                )

    def _extents(self, batch: SampleBatch) -> NDArray[np.int64]:
        """Of the volumes, along all axes but that of the channels, `[batch, axes]`. Raises UsageError where a crop does not lie in one."""
        field = self._checked(batch)
        if field.has_shapes:
            shapes = np.asarray(batch.columns[shape_name(self.field)])
        elif field.kind == "ragged":
            shapes = np.array([volume.shape for volume in batch.columns[self.field]]).reshape(-1, len(field.shape))
        else:
            shapes = np.tile(np.array(field.fixed_shape, np.int64), (len(batch.ids), 1))
        extents: NDArray[np.int64] = shapes[:, _spatial_axes(len(self.crop), self.channels)]
        too_small = np.less(extents, self.crop).any(axis=1)
        if too_small.any():
            row = int(np.argmax(too_small))
            place = f"of record {batch.ids[row]}, " if field.kind == "ragged" else ""
            raise UsageError(
                f"a crop of {_by(self.crop)} does not lie in {self.field!r} {place}of {_by(shapes[row].tolist())} "
                f"{_with_channels(self.channels)}"
            )
        return extents

    def _checked(self, batch: SampleBatch) -> Field:
        """The field of the volumes. Raises UsageError where this graph does not fit that, or the one of the masks."""
        field = self._loaded(self.field, batch)
        if len(field.shape) != self._num_axes(self.channels):
            raise UsageError(
                f"a crop of {_by(self.crop)} does not lie in {self.field!r} of {_by(field.shape)} "
                f"{_with_channels(self.channels)}"
            )
        num_channels = 1 if self.channels is None else field.shape[_CHANNEL_AXIS[self.channels]]
        if num_channels != len(self.mean):
            found = "any number of" if num_channels is None else num_channels
            raise UsageError(f"{self.field!r} has {found} channels, mean and std are given for {len(self.mean)}")
        if self.mask is not None:
            mask = self._loaded(self.mask, batch)
            if mask.array_dtype == np.float16:
                raise UsageError(
                    f"the mask {self.mask!r} is float16, which DALI does not flip: convert it with numbers of another type"
                )
            if len(mask.shape) not in (len(self.crop), self._num_axes(self.channels)):
                raise UsageError(f"{self.mask!r} of {_by(mask.shape)} is no mask of {self.field!r}: it has other axes")
            if self.mask == batch.schema.primary:
                raise UsageError(
                    f"the mask {self.mask!r} is the primary field: convert with that of the volumes as primary"
                )
        return field

    def _loaded(self, name: str, batch: SampleBatch) -> Field:
        """A field of arrays. Raises UsageError where it is none that this graph takes."""
        fields = batch.schema.fields
        if name not in fields:
            raise UsageError(f"the volume graph needs the field {name!r}: the data set has {', '.join(fields)}")
        if name != batch.schema.primary and name not in batch.columns:
            raise _unnamed(name)
        field = fields[name]
        is_of_numbers = field.array_dtype.kind in "iuf" or (field.array_dtype.kind == "b" and name == self.mask)
        if field.kind not in ("tensor", "ragged") or not is_of_numbers or not is_known_to_dali(field):
            raise UsageError(f"the volume graph takes tensors of whole or real numbers, and {name!r} is {field}")
        return field


_FLIP_NAMES = ("depthwise", "vertical", "horizontal")
"""What DALI calls the axes D, H and W."""


def _spatial_axes(count: int, channels: Channels) -> list[int]:
    first = 1 if channels == "first" else 0
    return list(range(first, first + count))


def _known_to_slice(masks: Any, field: Field) -> Any:
    """The masks, bool as uint8: DALI slices no bool."""
    if field.array_dtype.kind != "b":
        return masks
    return [mask.view(np.uint8) for mask in masks] if isinstance(masks, list) else masks.view(np.uint8)


def _unnamed(name: str) -> UsageError:
    return UsageError(f"the volume graph needs the field {name!r}: name it in the data set's fields=")


def _with_channels(channels: Channels) -> str:
    return "without channels" if channels is None else f"with channels {channels}"


def volume_train(
    crop: Sequence[int],
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    flip: float | Sequence[float] = 0.5,
    channels: Channels = "first",
    field: str = "volume",
    mask: str | None = None,
) -> VolumeGraph:
    """Training on tensors, two- or three-dimensional: a random crop, reversed at random along each axis, normalised.

    crop      extents of the window along each axis but the channels'; any place in the tensor is as likely. Tensors may differ
              in shape, as volumes do, if none is smaller and all have as many channels.
    mean, std  a number for each channel, or the number where there is one: `(value - mean) / std`.
    flip      how likely a reversal is, along every axis, or along each.
    channels  whether they are the first axis, as torch has them, or the last; None: there is no such axis, mean and std are
              one number each. The batch is float32 in the same layout.
    mask      field of masks, of the same window and reversals, in their own dtype, bool as uint8; as large as their volumes, with or
              without an axis of channels in the same place. One that is not so large is a bad record.

    The other fields are delivered as they are. Raises UsageError for numbers that do not fit each other or the data set.
    """
    crop, flips = _extents(crop), as_numbers("flip", flip)
    if not np.iterable(flip):
        flips *= len(crop)
    if len(flips) != len(crop):
        raise UsageError(f"flip is given for {len(flips)} axes, crop for {len(crop)}")
    if not all(0 <= probability <= 1 for probability in flips):
        raise UsageError(f"flip={flip} is not a probability: it is from 0 to 1")
    return _volume_graph(crop, mean, std, channels, field, mask, flips, is_random=True)


def volume_eval(
    crop: Sequence[int],
    *,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    channels: Channels = "first",
    field: str = "volume",
    mask: str | None = None,
) -> VolumeGraph:
    """Evaluation on tensors: the crop at the centre, normalised as in `volume_train`. Give the whole extents to crop nothing."""
    crop = _extents(crop)
    return _volume_graph(crop, mean, std, channels, field, mask, (0.0,) * len(crop), is_random=False)


def _extents(crop: Any) -> tuple[int, ...]:
    try:
        extents = tuple(map(operator.index, crop))
    except TypeError:
        raise UsageError(f"crop={crop!r} is no window: give its extent along each axis") from None
    if len(extents) not in (2, 3) or min(extents) < 1:
        raise UsageError(f"crop={_by(extents)} is no window of two or three extents")
    return extents


def _volume_graph(
    crop: tuple[int, ...],
    mean: float | Sequence[float],
    std: float | Sequence[float],
    channels: Channels,
    field: str,
    mask: str | None,
    flip: tuple[float, ...],
    *,
    is_random: bool,
) -> VolumeGraph:
    means, stds = as_numbers("mean", mean), as_numbers("std", std)
    if len(means) != len(stds) or not means:
        raise UsageError(f"mean is given for {len(means)} channels, std for {len(stds)}: give both for each")
    if not min(stds) > 0:
        raise UsageError(f"std={std!r} divides: it is above 0 for each channel")
    if channels not in ("first", "last", None):
        raise UsageError(f"channels={channels!r} is not known: they are 'first', 'last' or None")
    if mask == field:
        raise UsageError(f"{field!r} cannot be the volume and its mask")
    return VolumeGraph(field, mask, crop, means, stds, channels, flip, is_random)


def _by(extents: Iterable[Any]) -> str:
    return " x ".join("?" if extent is None else str(extent) for extent in extents)
