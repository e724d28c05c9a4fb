"""Graphs of pairs of an image and a mask of class numbers: the views of `image_train` and `image_eval`, and the same of the mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import SourceError, UsageError
from stagein.formats.schema import Schema

from .dali import import_dali
from .graphs import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DecodeDevice,
    HostPlan,
    ImageGraph,
    Nodes,
    SampleBatch,
    ViewNodes,
    decode_window,
    image_eval,
    image_train,
)
from .label_png import grey_labels

_MASK_DTYPES = ("uint8", "uint16", "int16")
"""The whole numbers that DALI resizes."""


@dataclass(frozen=True)
class SegmentationPair:
    """See `segmentation_train` and `segmentation_eval`. It is no `ImageGraph`: DALI does it, on the CPU too."""

    images: ImageGraph
    mask: str

    def plan(self, batch: SampleBatch) -> HostPlan:
        output = self.images.output
        self._refuse_fields(batch.schema)
        if self.mask not in batch.columns:
            raise UsageError(f"the segmentation graph needs the field {self.mask!r}: name it in the data set's fields=")
        sizes, masks = output.heights_and_widths(batch.columns), batch.columns[self.mask]
        plan = self.images.plan(batch)
        ready = {name: column for name, column in plan.ready.items() if name not in (output.field, self.mask)}
        if batch.schema.fields[self.mask].kind == "tensor":
            _refuse_other_sizes(batch.ids, [masks.shape[1:]] * len(sizes), sizes)
            return HostPlan({**plan.fed, self.mask: masks}, ready)
        return HostPlan({**plan.fed, self._file_node: _grey_files(batch.ids, masks, sizes)}, ready)

    def build(self, nodes: Nodes, decode_device: DecodeDevice) -> Nodes:
        view = self.images.view_nodes(nodes)
        image = self.images.output.build(nodes, view, decode_device)
        return {**image, self.mask: self._build_mask(nodes, view, decode_device)}

    @property
    def _file_node(self) -> str:
        return f"{self.mask} file"

    def _build_mask(self, nodes: Nodes, view: ViewNodes, decode_device: DecodeDevice) -> Any:
        """Class numbers `[size, size]`: each that of the pixel nearest to its middle."""
        dali = import_dali()
        if self._file_node in nodes:
            window = decode_window(nodes[self._file_node], view.window, decode_device, dali.types.GRAY)
        else:
            mask = nodes[self.mask].gpu() if decode_device == "mixed" else nodes[self.mask]
            numbers = dali.fn.slice(mask, view.window[0:2], view.window[2:4], axes=(0, 1))
            window = dali.fn.reshape(numbers, src_dims=(0, 1, -1), layout="HWC")
        size = self.images.output.size
        resized = dali.fn.resize(
            window, size=(size, size), interp_type=dali.types.INTERP_NN, antialias=False, **view.region
        )
        mirrored = resized if view.mirror is None else dali.fn.flip(resized, horizontal=view.mirror, vertical=0)
        return dali.fn.squeeze(mirrored, axes=2)

    def _refuse_fields(self, schema: Schema) -> None:
        """Raise UsageError for fields that are not an image file, which the data set is about, and a mask of it."""
        image, fields = self.images.output.field, schema.fields
        for name in (image, self.mask):
            if name not in fields:
                raise UsageError(
                    f"the segmentation graph needs the field {name!r}: the data set has {', '.join(fields)}"
                )
        if fields[image].kind != "encoded" or image != schema.primary:
            raise UsageError(
                f"the segmentation graph needs image files in the primary field, not {fields[image]} in {image!r}: "
                "volume_train crops tensors"
            )
        mask = fields[self.mask]
        is_tensor = mask.kind == "tensor" and len(mask.shape) == 2 and mask.dtype in _MASK_DTYPES
        if mask.kind != "encoded" and not is_tensor:
            raise UsageError(
                f"the field {self.mask!r} is {mask}, no mask: masks are PNG files, or tensors [height, width] of "
                f"{', '.join(_MASK_DTYPES)}"
            )


def _grey_files(ids: NDArray[np.int64], masks: Any, sizes: NDArray[np.int32]) -> list[NDArray[np.uint8]]:
    """The masks, one file after the other, as files whose grey levels are the class numbers. Raises SourceError for what is no mask of its image."""
    files, mask_sizes = [], []
    for number, stored in zip(ids.tolist(), masks, strict=True):
        try:
            file, size = grey_labels(np.asarray(stored))
        except ValueError as error:
            raise SourceError(f"the mask of record {number} cannot be used: {error}") from None
        files.append(file)
        mask_sizes.append(size)
    _refuse_other_sizes(ids, mask_sizes, sizes)
    return files


def _refuse_other_sizes(
    ids: NDArray[np.int64], mask_sizes: Sequence[tuple[int, ...]], sizes: NDArray[np.int32]
) -> None:
    for number, mask, image in zip(ids.tolist(), mask_sizes, sizes.tolist(), strict=True):
        if list(mask) != image:
            raise SourceError(
                f"the mask of record {number} has {mask[0]} x {mask[1]} pixels, its image {image[0]} x {image[1]}"
            )


def segmentation_train(
    size: int = 512,
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    area: tuple[float, float] = (0.25, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    antialias: bool = True,
    field: str = "image",
    mask: str = "mask",
    size_column: str = "hw",
) -> SegmentationPair:
    """Training of semantic segmentation: the same random window and flip of an image and its mask of class numbers.

    The image is that of `image_train`. The mask is resized to the nearest pixel, so that no number appears that is not in
    it: `[batch, size, size]` under `mask`, uint8 for PNG files (grey, or the palette's numbers, 8 bits), else as stored
    (tensors `[height, width]` of whole numbers). It has the size of its image, in `size_column`. Raises UsageError for fields
    that are none of these; a record whose mask does not fit its image is a bad record.
    """
    images = image_train(
        size,
        mean=mean,
        std=std,
        area=area,
        ratio=ratio,
        flip=flip,
        antialias=antialias,
        field=field,
        size_column=size_column,
    )
    return SegmentationPair(images, mask)


def segmentation_eval(
    size: int = 512,
    *,
    resize: int = 512,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    antialias: bool = True,
    field: str = "image",
    mask: str = "mask",
    size_column: str = "hw",
) -> SegmentationPair:
    """Evaluation of semantic segmentation: the view of `image_eval`, of an image and its mask. See `segmentation_train`."""
    images = image_eval(
        size, resize=resize, mean=mean, std=std, antialias=antialias, field=field, size_column=size_column
    )
    return SegmentationPair(images, mask)
