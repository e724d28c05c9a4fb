"""What `transform=` may be, told apart, and torchvision's Compose translated into a ready graph where there is one for it.

torchvision is never imported: its classes are known by module, name and attributes.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from stagein.formats.errors import UsageError

from .dataset import RecordDataset
from .graphs import FunctionGraph, Graph, image_eval, image_train


@dataclass(frozen=True)
class PerSample:
    """A function that is called for every sample by itself, in the worker threads, before samples are collated.

    field  None: it takes the sample, a dict of fields, and returns what takes its place, which torch's `default_collate`
           takes where it is no dict; else the value of this field.
    as_pil  it takes the image of that field as a PIL image.

    Arrays of which several extents differ from sample to sample, such as volumes, come in their own shapes, and have to leave in
    one, cropped or padded, so that batches are tensors. Where the first extent alone differs, as that of boxes does, batches
    stay lists; what has one shape then makes a tensor under another name.
    """

    function: Callable[[Any], Any]
    field: str | None = None
    as_pil: bool = False

    def __call__(self, sample: Any) -> Any:
        if self.field is None:
            return self.function(sample)
        value = sample[self.field]
        return {**sample, self.field: self.function(_pil_image(value) if self.as_pil else value)}


@dataclass(frozen=True)
class Translation:
    """A transform as the loader runs it: by a graph, per sample, or not at all; `lines` say why, for `explain`."""

    graph: Graph | None = None
    per_sample: Callable[[Any], Any] | None = None
    lines: tuple[str, ...] = ()


def understand(transform: Any, dataset: Any) -> Translation:
    """What `transform` is. Raises UsageError for what is nothing that can be applied to this data set.

    Over a RecordDataset a graph, or a plain function, which makes a DALI graph of DALI's nodes; a Compose of torchvision's,
    translated if it can be; any other callable takes samples. Over any other data set every callable takes samples.
    """
    if transform is None:
        return Translation()
    if not isinstance(dataset, RecordDataset):
        if isinstance(transform, Graph) or not callable(transform):
            instead = "give a function of one sample"
            if isinstance(dataset, Subset) and isinstance(dataset.dataset, RecordDataset):
                instead = "give the whole of it, and sampler=SubsetRandomSampler(subset.indices), or subset.indices in their order"
            raise UsageError(
                f"transform={type(transform).__name__} needs a RecordDataset, not a {type(dataset).__name__}: {instead}"
            )
        return Translation(per_sample=transform, lines=(f"{_name(transform)}: called for every sample",))
    name = getattr(transform, "__name__", "")
    if inspect.isfunction(transform) and transform is getattr(import_module(__package__), name, None):
        raise UsageError(f"transform={name} is what makes a graph: call it, transform={name}(…)")
    if isinstance(transform, Graph):
        return Translation(graph=transform, lines=(f"{type(transform).__name__}: a graph",))
    if isinstance(transform, PerSample):
        return Translation(per_sample=transform, lines=(f"{_name(transform.function)}: called for every sample",))
    if _is_torchvisions(transform):
        return _translate(transform, dataset.records.schema.primary)
    if inspect.isroutine(transform) or isinstance(transform, functools.partial | type):
        return Translation(
            graph=FunctionGraph(transform), lines=(f"{_name(transform)}: a function of DALI's nodes, makes the graph",)
        )
    if callable(transform):
        return Translation(per_sample=PerSample(transform), lines=(f"{_name(transform)}: called for every sample",))
    raise UsageError(f"transform={transform!r} is not a graph and cannot be called")


class _HasNoCounterpartError(Exception):
    """Why a Compose is not translated; the text continues "<name>: "."""


def _translate(compose: Any, field: str) -> Translation:
    steps = list(_flat(compose))
    try:
        graph, lines = _as_graph(steps, field)
    except _HasNoCounterpartError as reason:
        return Translation(
            per_sample=PerSample(compose, field, as_pil=True),
            lines=(str(reason), f"{_name(compose)}: called for every sample, on a PIL image"),
        )
    return Translation(graph=graph, lines=lines)


def _as_graph(steps: list[Any], field: str) -> tuple[Graph, tuple[str, ...]]:
    """The ready graph that does what `steps` do, and what each became."""
    names = [_kind(step) for step in steps]
    by_kind = dict(zip(names, steps, strict=True))
    for step, kind in zip(steps, names, strict=True):
        if kind is None:
            raise _HasNoCounterpartError(f"{_name(step)}: has no counterpart in the ready graphs")
        if names.count(kind) > 1:
            raise _HasNoCounterpartError(f"{_name(step)}: occurs twice")
    kinds = [kind for kind in names if kind not in ("to_image", None)]
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    lines = []
    if "normalize" in by_kind:
        mean, std = (_triple(getattr(by_kind["normalize"], name), name) for name in ("mean", "std"))
        lines.append(f"Normalize: part of the last step, mean {mean}, std {std}")
    if "to_float" not in by_kind:
        raise _HasNoCounterpartError("it does not end in ToTensor, or ToDtype(float32, scale=True)")
    tail = ["to_float", "normalize"] if "normalize" in by_kind else ["to_float"]
    body = [kind for kind in kinds if kind not in tail]
    if [kind for kind in kinds if kind in tail] != tail or ("normalize" in by_kind and kinds[-1] != "normalize"):
        raise _HasNoCounterpartError("Normalize: does not come last, after the conversion to float")
    lines.append("conversion to float: part of the last step, values are divided by 255")
    if sorted(body) in (["random_resized_crop"], ["flip", "random_resized_crop"]):
        crop = by_kind["random_resized_crop"]
        _check_filter(crop)
        flip = float(by_kind["flip"].p) if "flip" in by_kind else 0.0
        size, area, ratio = _square(crop), _pair(crop.scale), _pair(crop.ratio)
        lines = [
            f"RandomResizedCrop: window {area} of the area, ratio {ratio}, decoded and resized to {size} x {size}",
            f"RandomHorizontalFlip: probability {flip:g}",
            *lines,
        ]
        return image_train(size, mean=mean, std=std, area=area, ratio=ratio, flip=flip, field=field), tuple(lines)
    if body == ["resize", "center_crop"]:
        _check_filter(by_kind["resize"])
        resize, size = _shorter_side(by_kind["resize"]), _square(by_kind["center_crop"])
        if size > resize:
            raise _HasNoCounterpartError(f"CenterCrop({size}): pads an image resized to {resize}")
        lines = [f"Resize, CenterCrop: shorter side {resize}, only the centre {size} x {size} is decoded", *lines]
        return image_eval(size, resize=resize, mean=mean, std=std, field=field), tuple(lines)
    known = "RandomResizedCrop [+ RandomHorizontalFlip], or Resize + CenterCrop"
    raise _HasNoCounterpartError(
        f"the sequence {', '.join(map(_name, steps))}: no ready graph does it, there are {known}"
    )


_KINDS = {
    "RandomResizedCrop": "random_resized_crop",
    "RandomHorizontalFlip": "flip",
    "Resize": "resize",
    "CenterCrop": "center_crop",
    "ToTensor": "to_float",
    "Normalize": "normalize",
    "ToImage": "to_image",
    "ToImageTensor": "to_image",
    "PILToTensor": "to_image",
    "ToPureTensor": "to_image",
}


def _kind(step: Any) -> str | None:
    """What a step is in the terms of the ready graphs; None where it is nothing of theirs."""
    if not _is_torchvisions(step):
        return None
    name = type(step).__name__
    if name in ("ToDtype", "ConvertImageDtype", "ConvertDtype"):
        scales = getattr(step, "scale", True)  # ConvertImageDtype always does
        return "to_float" if step.dtype is torch.float32 and scales else None
    return _KINDS.get(name)


def _is_torchvisions(step: Any) -> bool:
    module = type(step).__module__
    is_sequence_of = isinstance(step, torch.nn.Sequential) and all(_is_torchvisions(each) for each in step)
    return module == "torchvision" or module.startswith("torchvision.") or (is_sequence_of and len(step) > 0)


def _flat(step: Any) -> Iterator[Any]:
    """The steps of a Compose, or of an nn.Sequential, also of those inside it."""
    if type(step).__name__ == "Compose":
        for each in step.transforms:
            yield from _flat(each)
    elif isinstance(step, torch.nn.Sequential):
        for each in step:
            yield from _flat(each)
    else:
        yield step


def _check_filter(step: Any) -> None:
    """The ready graphs resize with an antialiased linear filter, as PIL does."""
    mode = getattr(step.interpolation, "value", step.interpolation)
    if mode not in ("bilinear", 2):
        raise _HasNoCounterpartError(f"{_name(step)}: interpolation {mode!r} is not bilinear")
    if getattr(step, "max_size", None) is not None:
        raise _HasNoCounterpartError(f"{_name(step)}: max_size is not honoured by the ready graphs")


def _square(step: Any) -> int:
    height, width = (step.size, step.size) if isinstance(step.size, int) else (step.size[0], step.size[-1])
    if height != width:
        raise _HasNoCounterpartError(f"{_name(step)}: {height} x {width} is not square")
    return int(height)


def _shorter_side(step: Any) -> int:
    size = step.size
    if not isinstance(size, int) and len(size) != 1:
        raise _HasNoCounterpartError(f"{_name(step)}: {tuple(size)} changes the aspect ratio")
    return int(size if isinstance(size, int) else size[0])


def _triple(values: Any, name: str) -> tuple[float, float, float]:
    numbers = [float(value) for value in np.ravel(values)]
    if len(numbers) != 3:
        raise _HasNoCounterpartError(
            f"Normalize: its {name} has {len(numbers)} values, not one for each of red, green, blue"
        )
    return numbers[0], numbers[1], numbers[2]


def _pair(values: Any) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", None) or type(thing).__name__


def _pil_image(pixels: Any) -> Any:
    """An image `[height, width, 3]`, uint8, as PIL has it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            f"a transform on PIL images needs Pillow, which cannot be imported ({error}): install `pillow`"
        ) from error
    return Image.fromarray(np.asarray(pixels))
