"""Graphs of tensor volumes: a crop of fixed size, flips along each axis, values normalised per channel."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import UsageError
from stagein.formats.schema import Field, shape_name

from .augment import random_axis_flips, random_starts, volume_uniforms
from .dali import import_dali
from .graphs import DecodeDevice, HostPlan, Nodes, SampleBatch

_PLAN = "start_and_flips"


@dataclass(frozen=True)
class VolumeGraph:
    """See `volume_train` and `volume_eval`."""

    field: str
    crop: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Literal["first", "last"]
    flip: tuple[float, ...]
    is_random: bool

    def plan(self, batch: SampleBatch) -> HostPlan:
        shapes = self._spatial_shapes(self._checked(batch), batch)
        if self.is_random:
            uniforms = volume_uniforms(batch.seed, batch.epoch, batch.ids)
            start, flips = random_starts(uniforms, shapes, self.crop), random_axis_flips(uniforms, self.flip)
        else:
            start = np.subtract(shapes, self.crop) // 2
            flips = np.zeros_like(start)
        fed = {_PLAN: np.column_stack([start, flips]).astype(np.int32)}
        if self.field in batch.columns:
            fed[self.field] = batch.columns[self.field]
        return HostPlan(fed, ready={name: rows for name, rows in batch.columns.items() if name != self.field})

    def build(self, nodes: Nodes, decode_device: DecodeDevice) -> Nodes:
        fn, types = import_dali().fn, import_dali().types
        volume = nodes[self.field].gpu() if decode_device == "mixed" else nodes[self.field]
        num_axes, plan = len(self.crop), nodes[_PLAN]
        cropped = fn.slice(volume, start=plan[0:num_axes], shape=list(self.crop), axes=self._spatial_axes)
        values = fn.reshape(fn.cast(cropped, dtype=types.FLOAT), layout=self._layout)
        if self.is_random:
            flips = {name: plan[num_axes + axis] for axis, name in enumerate(_FLIP_NAMES[-num_axes:])}
            values = fn.flip(values, **{"horizontal": 0, **flips})
        shape = [1] * (num_axes + 1)
        shape[0 if self.channels == "first" else -1] = len(self.mean)
        mean, std = (np.array(numbers, np.float32).reshape(shape) for numbers in (self.mean, self.std))
        return {self.field: fn.normalize(values, axes=self._spatial_axes, mean=mean, stddev=std)}

    @property
    def _spatial_axes(self) -> list[int]:
        first = 1 if self.channels == "first" else 0
        return list(range(first, first + len(self.crop)))

    @property
    def _layout(self) -> str:
        axes = "DHW"[-len(self.crop) :]
        return f"C{axes}" if self.channels == "first" else f"{axes}C"

    def _spatial_shapes(self, field: Field, batch: SampleBatch) -> NDArray[np.int64]:
        """Extents of the volumes but for their channels, `[batch, axes]`. Raises UsageError where a crop does not lie in one."""
        if field.has_shapes:
            shapes = np.asarray(batch.columns[shape_name(self.field)])
        else:
            shapes = np.tile(np.array(field.fixed_shape, np.int64), (len(batch.ids), 1))
        spatial = shapes[:, 1:] if self.channels == "first" else shapes[:, :-1]
        too_small = np.less(spatial, self.crop).any(axis=1)
        if too_small.any():
            row = int(np.argmax(too_small))
            place = f"of record {batch.ids[row]}, " if field.has_shapes else ""
            raise UsageError(
                f"a crop of {_by(self.crop)} does not lie in {self.field!r} {place}of {_by(shapes[row].tolist())} with channels "
                f"{self.channels}"
            )
        return spatial

    def _checked(self, batch: SampleBatch) -> Field:
        """The field. Raises UsageError for one that this graph does not fit."""
        fields, name = batch.schema.fields, self.field
        if name not in fields:
            raise UsageError(f"the volume graph needs the field {name!r}: the data set has {', '.join(fields)}")
        if name != batch.schema.primary and name not in batch.columns:
            raise UsageError(f"the volume graph needs the field {name!r}: name it in the data set's fields=")
        field = fields[name]
        has_known_shapes = field.kind == "tensor" or field.has_shapes
        if not has_known_shapes or field.array_dtype.kind not in "iuf" or field.array_dtype_name == "bfloat16":
            raise UsageError(f"the volume graph takes tensors of whole or real numbers, and {name!r} is {field}")
        if len(field.shape) != len(self.crop) + 1:
            shape = _by("?" if extent is None else extent for extent in field.shape)
            raise UsageError(
                f"a crop of {_by(self.crop)} does not lie in {name!r} of {shape} with channels {self.channels}"
            )
        num_channels = field.shape[0 if self.channels == "first" else -1]
        if num_channels != len(self.mean):
            found = "any number of" if num_channels is None else num_channels
            raise UsageError(f"{name!r} has {found} channels, mean and std are given for {len(self.mean)}")
        return field


_FLIP_NAMES = ("depthwise", "vertical", "horizontal")
"""What DALI calls the axes D, H and W."""


def volume_train(
    crop: Sequence[int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    flip: float | Sequence[float] = 0.5,
    channels: Literal["first", "last"] = "first",
    field: str = "volume",
) -> VolumeGraph:
    """Training on tensors, two- or three-dimensional: a random crop, reversed at random along each axis, normalised.

    crop      extents of the window along each axis but the channels'; any place in the tensor is as likely. Tensors may differ
              in shape, as volumes do, if none is smaller and all have as many channels.
    mean, std  one for each channel: `(value - mean) / std`.
    flip      how likely a reversal is, along every axis, or along each.
    channels  whether they are the first axis, as torch has them, or the last. The batch is float32 in the same layout.

    The other fields are delivered as they are. Raises UsageError for numbers that do not fit each other or the data set.
    """
    crop = tuple(crop)
    flips = (float(flip),) * len(crop) if isinstance(flip, int | float) else tuple(map(float, flip))
    if len(flips) != len(crop):
        raise UsageError(f"flip is given for {len(flips)} axes, crop for {len(crop)}")
    if not all(0 <= probability <= 1 for probability in flips):
        raise UsageError(f"flip={flip} is not a probability: it is from 0 to 1")
    return _volume_graph(crop, mean, std, channels, field, flips, is_random=True)


def volume_eval(
    crop: Sequence[int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    channels: Literal["first", "last"] = "first",
    field: str = "volume",
) -> VolumeGraph:
    """Evaluation on tensors: the crop at the centre, normalised as in `volume_train`. Give the whole extents to crop nothing."""
    return _volume_graph(tuple(crop), mean, std, channels, field, (0.0,) * len(crop), is_random=False)


def _volume_graph(
    crop: tuple[int, ...],
    mean: Sequence[float],
    std: Sequence[float],
    channels: Literal["first", "last"],
    field: str,
    flip: tuple[float, ...],
    *,
    is_random: bool,
) -> VolumeGraph:
    if len(crop) not in (2, 3) or min(crop) < 1:
        raise UsageError(f"crop={_by(crop)} is no window of two or three extents")
    if len(mean) != len(std) or not len(mean):
        raise UsageError(f"mean is given for {len(mean)} channels, std for {len(std)}: give both for each")
    if min(std) <= 0:
        raise UsageError(f"std={list(std)} divides: it is above 0 for each channel")
    if channels not in ("first", "last"):
        raise UsageError(f"channels={channels!r} is not known: they are 'first' or 'last'")
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    return VolumeGraph(field, crop, mean, std, channels, flip, is_random)


def _by(extents: Iterable[Any]) -> str:
    return " x ".join(map(str, extents))
