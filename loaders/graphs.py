"""What is done to the records of a batch, as DALI graphs: one definition for the CPU and for the GPU.

A graph says two things: which values the host works out for each sample (`plan`), and how DALI's operators turn
records and values into the fields of a batch (`build`). Random numbers are always the host's, so that a sample looks
the same whichever rank loads it, and after a resume.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from stagein.formats.errors import UsageError
from stagein.formats.schema import BFLOAT16, Field, Schema

from .augment import centre_crops, random_flips, random_resized_crops, refuse_odd_draws, train_uniforms
from .dali import import_dali
from .order import is_count

Columns = dict[str, NDArray[Any]]
"""Values of the samples of a batch by name: arrays `[batch, ...]`."""
Nodes = dict[str, Any]
"""DALI graph nodes (`DataNode`) by the name of the field they stand for."""
DecodeDevice = Literal["cpu", "mixed"]
"""Where images are decoded: on the CPU, or from host memory into the memory of the GPU."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_CHANNELS = 3


@dataclass(frozen=True)
class SampleBatch:
    """What the host knows of a batch before its records are read: who is in it, what a record holds, and their small fields;
    also other fields that were asked for, and records of which only that says how large they are (`ragged`)."""

    seed: int
    epoch: int
    ids: NDArray[np.int64]
    schema: Schema
    columns: Columns


@dataclass(frozen=True)
class HostPlan:
    """What the host has worked out for a batch, `[batch, ...]` each: values to feed to DALI, and fields that are ready.

    Few inputs are better than many: DALI has a thread for each, and three small ones more cost 3 % on two cores.
    """

    fed: dict[str, Any]
    ready: Columns


@runtime_checkable
class Graph(Protocol):
    """What a `transform` of `DataLoader` offers. A plain function of the nodes will do where the host has nothing to plan."""

    def plan(self, batch: SampleBatch) -> HostPlan:
        """What to feed to DALI beside the records themselves, and which fields to deliver beside DALI's."""

    def build(self, nodes: Nodes, decode_device: DecodeDevice) -> Nodes:
        """The fields of a batch, from the node of the records (under the primary field's name) and those fed."""


@dataclass(frozen=True)
class FunctionGraph:
    """A user's function from nodes to nodes; it is given all fields that DALI has a type for, the others go past it."""

    function: Callable[[Nodes], Nodes]

    def plan(self, batch: SampleBatch) -> HostPlan:
        fed = {name: rows for name, rows in batch.columns.items() if has_dali_type(rows)}
        return HostPlan(fed, ready={name: rows for name, rows in batch.columns.items() if name not in fed})

    def build(self, nodes: Nodes, decode_device: DecodeDevice) -> Nodes:
        try:
            built = self.function(nodes)
        except KeyError as error:
            raise UsageError(
                f"the transform asks for field {error}, DALI was given {', '.join(nodes)}: it has no text, bfloat16 and complex"
            ) from error
        node_type = import_dali().DataNode
        if not isinstance(built, dict) or not all(isinstance(node, node_type) for node in built.values()):
            kinds = (
                {name: type(node).__name__ for name, node in built.items()}
                if isinstance(built, dict)
                else type(built).__name__
            )
            raise UsageError(
                f"the transform, a function of DALI's nodes, returns a dict of nodes by the name of their field, not {kinds}; "
                "PerSample(function) is for functions of samples"
            )
        return built


def is_known_to_dali(field: Field) -> bool:
    """Whether DALI has a type for records of a field: files as bytes, arrays of most numbers."""
    has_type = has_dali_type(np.empty(0, field.array_dtype)) and field.array_dtype_name != BFLOAT16
    return has_type and field.kind != "text"


def has_dali_type(rows: Any) -> bool:
    """DALI reads complex numbers as if they were real, has no text, and no bfloat16 that numpy could hand it."""
    if isinstance(rows, list):
        return all(map(has_dali_type, rows))
    return isinstance(rows, np.ndarray) and rows.dtype.kind in "biuf"


def as_numbers(name: str, value: Any) -> tuple[float, ...]:
    """The numbers given for `name`; one alone stands for itself. Raises UsageError for what is none."""
    try:
        return tuple(map(float, value if np.iterable(value) else [value]))
    except (TypeError, ValueError):
        raise UsageError(f"{name}={value!r} is neither a number nor several") from None


@dataclass(frozen=True)
class ImageOutput:
    """How a decoded window becomes a tensor: float32 `[3, size, size]`, RGB, `(value / 255 - mean) / std` per channel."""

    field: str
    size_column: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool

    def __post_init__(self) -> None:
        if not is_count(self.size) or self.size < 1:
            raise UsageError(f"size={self.size!r} is no number of pixels that an image could be resized to")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(as_numbers(name, numbers)) != _CHANNELS:
                raise UsageError(f"{name}={numbers!r} is not one number for each of red, green and blue")
        if not min(self.std) > 0:
            raise UsageError(f"std={self.std!r} divides: it is above 0 for each channel")

    def heights_and_widths(self, columns: Columns) -> NDArray[np.int32]:
        """The sizes of the images, int32 `[batch, 2]`. Raises UsageError where the data set does not know them."""
        if self.size_column not in columns:
            raise UsageError(
                f"the image graph needs the size of each image, but the data set has no field {self.size_column!r}: "
                f"it has {', '.join(columns) or 'none but the images'}"
            )
        sizes = columns[self.size_column]
        if not isinstance(sizes, np.ndarray) or sizes.ndim != 2 or sizes.shape[1] != 2:
            raise UsageError(
                f"{self.size_column!r} is not the size of each image, (height, width): name the field that is with size_column="
            )
        return sizes

    def ready_columns(self, columns: Columns) -> Columns:
        """The fields delivered as they are: all but the size of the stored image, which is not that of the image delivered."""
        return {name: column for name, column in columns.items() if name != self.size_column}

    def scale_and_offset(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What a value of 0 … 255 is multiplied by, and what is added then: float32 `[3]` each."""
        mean, std = np.array(self.mean), np.array(self.std)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)

    def build(self, nodes: Nodes, view: "ViewNodes", decode_device: DecodeDevice) -> Nodes:
        """The field of a batch that these views of its images are."""
        if self.field not in nodes:
            raise UsageError(
                f"there is no field {self.field!r} with images: DALI was given {', '.join(nodes)}; name the right one with field="
            )
        window = decode_window(nodes[self.field], view.window, decode_device, import_dali().types.RGB)
        mirror = {} if view.mirror is None else {"mirror": view.mirror}
        return {self.field: self.normalise(self.resize(window, **view.region), **mirror)}

    def resize(self, image: Any, **region: Any) -> Any:
        """`size` x `size` pixels, linear; `region` is `roi_start` and `roi_end`, the whole image without it."""
        dali = import_dali()
        return dali.fn.resize(
            image, size=(self.size, self.size), interp_type=dali.types.INTERP_LINEAR, antialias=self.antialias, **region
        )

    def normalise(self, image: Any, **mirror: Any) -> Any:
        dali = import_dali()
        return dali.fn.crop_mirror_normalize(
            image,
            dtype=dali.types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in self.mean],
            std=[255 * value for value in self.std],
            **mirror,
        )


def decode_window(records: Any, window: Any, decode_device: DecodeDevice, output_type: Any) -> Any:
    """A window of each image, height x width x channel; only what it needs is decoded.

    window       int32 `[batch, 4]` and longer: y, x, height, width.
    output_type  of DALI's, such as `types.RGB`.
    """
    return import_dali().fn.decoders.image_slice(
        records,
        start=window[0:2],
        shape=window[2:4],
        axis_names="HW",
        device=decode_device,
        output_type=output_type,
        adjust_orientation=False,  # sizes and windows are those of the image as stored
    )


@dataclass(frozen=True)
class ImageViews:
    """What is seen of each image of a batch.

    windows   int64 `[batch, 4]`: top, left, height, width of the pixels that count, in the image as stored.
    regions   float64 `[batch, 4]`: top, left, bottom, right inside the window of what is resized to the whole output.
    mirrored  bool `[batch]`: left to right, after that.
    """

    windows: NDArray[np.int64]
    regions: NDArray[np.float64]
    mirrored: NDArray[np.bool_]


@dataclass(frozen=True)
class ViewNodes:
    """What is seen of each image, as DALI's operators take it.

    window  int32 `[batch, 4]` and longer: top, left, height, width of what is decoded.
    region  `roi_start` and `roi_end` of what is resized to the whole output, in pixels of the window; empty: all of it.
    mirror  int32 `[batch]`, 1: left to right, after that; None: none is.
    """

    window: Any
    region: Nodes
    mirror: Any | None


@runtime_checkable
class ImageGraph(Graph, Protocol):
    """A ready graph of images, which an engine without DALI can do too."""

    @property
    def output(self) -> ImageOutput:
        """How what is seen becomes a tensor."""

    def views(self, fed: Columns) -> ImageViews:
        """What `plan` planned, from the values to feed to DALI."""

    def view_nodes(self, nodes: Nodes) -> ViewNodes:
        """The same, from the nodes of these values."""

    def moved(self, fed: Columns, origin: NDArray[np.int64]) -> Columns:
        """The values to feed for images of which the part from `origin` `[batch, 2]` (top, left) on was read."""


@dataclass(frozen=True)
class ImageTrain:
    """See `image_train`."""

    output: ImageOutput
    area: tuple[float, float]
    ratio: tuple[float, float]
    flip: float

    def plan(self, batch: SampleBatch) -> HostPlan:
        uniforms = train_uniforms(batch.seed, batch.epoch, batch.ids)
        sizes = self.output.heights_and_widths(batch.columns)
        windows = random_resized_crops(uniforms, sizes, self.area, self.ratio)
        window_and_mirror = np.column_stack([windows.start, windows.extent, random_flips(uniforms, self.flip)])
        return HostPlan({"window_and_mirror": window_and_mirror}, self.output.ready_columns(batch.columns))

    def views(self, fed: Columns) -> ImageViews:
        windows, mirror = fed["window_and_mirror"][:, :4], fed["window_and_mirror"][:, 4]
        regions = np.column_stack([np.zeros_like(windows[:, 2:]), windows[:, 2:]])
        return ImageViews(windows.astype(np.int64), regions.astype(np.float64), mirror != 0)

    def moved(self, fed: Columns, origin: NDArray[np.int64]) -> Columns:
        return {**fed, "window_and_mirror": _moved(fed["window_and_mirror"], origin)}

    def view_nodes(self, nodes: Nodes) -> ViewNodes:
        plan = nodes["window_and_mirror"]
        return ViewNodes(plan, {}, plan[4])

    def build(self, nodes: Nodes, decode_device: DecodeDevice) -> Nodes:
        return self.output.build(nodes, self.view_nodes(nodes), decode_device)


@dataclass(frozen=True)
class ImageEval:
    """See `image_eval`."""

    output: ImageOutput
    shorter_side: int

    def plan(self, batch: SampleBatch) -> HostPlan:
        crops = centre_crops(self.output.heights_and_widths(batch.columns), self.output.size, self.shorter_side)
        window = np.column_stack([crops.windows.start, crops.windows.extent])
        region = np.column_stack([crops.region_start, crops.region_end])
        return HostPlan({"window": window, "region": region}, self.output.ready_columns(batch.columns))

    def views(self, fed: Columns) -> ImageViews:
        windows, regions = fed["window"].astype(np.int64), fed["region"].astype(np.float64)
        return ImageViews(windows, regions, np.zeros(len(windows), np.bool_))

    def moved(self, fed: Columns, origin: NDArray[np.int64]) -> Columns:
        return {**fed, "window": _moved(fed["window"], origin)}

    def view_nodes(self, nodes: Nodes) -> ViewNodes:
        region = nodes["region"]
        return ViewNodes(nodes["window"], {"roi_start": region[0:2], "roi_end": region[2:4]}, None)

    def build(self, nodes: Nodes, decode_device: DecodeDevice) -> Nodes:
        return self.output.build(nodes, self.view_nodes(nodes), decode_device)


def _moved(windows: NDArray[np.int32], origin: NDArray[np.int64]) -> NDArray[np.int32]:
    """Windows whose first two columns, top and left, count from `origin` on."""
    moved = windows.copy()
    moved[:, :2] -= origin.astype(np.int32)
    return moved


def image_train(
    size: int = 224,
    *,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    antialias: bool = True,
    field: str = "image",
    size_column: str = "hw",
) -> ImageTrain:
    """Training of an image classifier: a random window resized to `size` x `size`, flipped at random, normalised.

    The window and the flip follow torchvision's RandomResizedCrop(size, area, ratio) and RandomHorizontalFlip(flip).
    `mean` and `std` are those of values scaled to 0 … 1. The batch has float32 `[batch, 3, size, size]` under `field`,
    and the other small fields as they are. `size_column` holds (height, width) of each stored image. Raises UsageError for
    ranges of `area` and `ratio`, and a `flip`, that nothing can be drawn from.
    """
    refuse_odd_draws(area, ratio, flip)
    return ImageTrain(ImageOutput(field, size_column, size, mean, std, antialias), area, ratio, flip)


def image_eval(
    size: int = 224,
    *,
    resize: int = 256,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    antialias: bool = True,
    field: str = "image",
    size_column: str = "hw",
) -> ImageEval:
    """Evaluation of an image classifier: shorter side to `resize`, the centre `size` x `size` of it, normalised.

    As torchvision's Resize(resize) and CenterCrop(size), but only what the centre needs is decoded and resized. Raises
    UsageError where `size` exceeds `resize`. The batch is that of `image_train`.
    """
    if not is_count(resize):
        raise UsageError(f"resize={resize!r} is no number of pixels that an image could be resized to")
    if is_count(size) and size > resize:
        raise UsageError(
            f"image_eval cannot keep a centre of {size} pixels of images resized to {resize}: size is at most resize"
        )
    return ImageEval(ImageOutput(field, size_column, size, mean, std, antialias), resize)
