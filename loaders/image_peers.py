"""Other loaders of images, to measure ours against: random crop, resize, flip, normalise on the CPU, done their way.

Each takes an `ImageWork` and yields batches for ever. What needs its own format converts the folder when it is made.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
import torch.utils.dlpack

from .augment import random_flips, random_resized_crops, train_uniforms
from .dali import import_dali
from .dali_pipeline import QUEUE_DEPTH
from .engine import Batch
from .graphs import IMAGENET_MEAN, IMAGENET_STD, ImageTrain, image_train

_PREFETCH = 2


@dataclass(frozen=True)
class ImageWork:
    """What every contestant does. `folder` is for files of its own, `images` a folder of class folders of JPEGs."""

    images: Path
    folder: Path
    batch_size: int
    size: int
    threads: int
    antialias: bool
    is_shuffled: bool = True
    area: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5

    @property
    def graph(self) -> ImageTrain:
        return image_train(self.size, area=self.area, flip=self.flip, antialias=self.antialias)

    @property
    def paths(self) -> list[Path]:
        return sorted(path for path in self.images.rglob("*") if path.is_file())


def dali_file_reader(work: ImageWork) -> Iterator[Batch]:
    """DALI's own loader over an image folder: its file reader, random-crop decoder, resize and normalisation."""
    dali = import_dali()
    pipeline = dali.Pipeline(
        batch_size=work.batch_size, num_threads=work.threads, device_id=None, prefetch_queue_depth=QUEUE_DEPTH, seed=0
    )
    with pipeline:
        encoded, label = dali.fn.readers.file(file_root=str(work.images), random_shuffle=work.is_shuffled)
        pipeline.set_outputs(dali_image(work, encoded), label)
    pipeline.build()
    while True:
        image, label = (torch.utils.dlpack.from_dlpack(each.as_tensor()) for each in pipeline.run())
        yield {"image": image, "label": label}


def dali_image(work: ImageWork, encoded: Any) -> Any:
    """The work as DALI's operators do it; windows and flips are drawn by DALI, the same in every pipeline."""
    dali, output = import_dali(), work.graph.output
    image = dali.fn.decoders.image_random_crop(
        encoded, output_type=dali.types.RGB, adjust_orientation=False, random_area=work.area, seed=0
    )
    mirror = dali.fn.random.coin_flip(probability=work.flip, seed=1)
    return output.normalise(output.resize(image), mirror=mirror)


class _Decode:
    """One JPEG to a row of a batch, as scripts for torch do it: whole image, crop, resize, flip, normalise."""

    def __init__(self, work: ImageWork, *, by_pillow: bool) -> None:
        self._work, self._by_pillow, self._count = work, by_pillow, 0
        scale, offset = work.graph.output.scale_and_offset()
        self._scale, self._offset = scale, offset

    def __call__(self, content: bytes) -> torch.Tensor:
        image = (self._pillow if self._by_pillow else self._simplejpeg)(content)
        normalised = image.astype(np.float32) * self._scale + self._offset
        return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))

    def _window(self, height: int, width: int) -> tuple[int, int, int, int, bool]:
        self._count += 1
        uniforms = train_uniforms(0, 0, np.array([self._count]))
        windows = random_resized_crops(uniforms, np.array([[height, width]], np.int32), self._work.area)
        flip = bool(random_flips(uniforms, self._work.flip)[0])
        (y, x), (h, w) = windows.start[0].tolist(), windows.extent[0].tolist()
        return y, x, h, w, flip

    def _pillow(self, content: bytes) -> Any:
        import io

        from PIL import Image

        image = Image.open(io.BytesIO(content)).convert("RGB")
        y, x, height, width, flip = self._window(image.height, image.width)
        size = (self._work.size, self._work.size)
        pixels = np.asarray(image.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.BILINEAR))
        return pixels[:, ::-1] if flip else pixels

    def _simplejpeg(self, content: bytes) -> Any:
        import cv2
        import simplejpeg

        cv2.setNumThreads(0)
        image = simplejpeg.decode_jpeg(content, colorspace="RGB", strict=False)
        y, x, height, width, flip = self._window(*image.shape[:2])
        how = cv2.INTER_AREA if self._work.antialias else cv2.INTER_LINEAR
        pixels = cv2.resize(image[y : y + height, x : x + width], (self._work.size, self._work.size), interpolation=how)
        return pixels[:, ::-1] if flip else pixels


class _Files(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, paths: list[Path], decode: Callable[[bytes], torch.Tensor]) -> None:
        self._paths, self._decode = paths, decode

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._decode(self._paths[index].read_bytes()), "label": index}


def torch_pillow(work: ImageWork) -> Iterator[Batch]:
    """torch's DataLoader in worker processes, decoding and resizing with Pillow."""
    return _torch_files(work, by_pillow=True)


def torch_simplejpeg(work: ImageWork) -> Iterator[Batch]:
    """torch's DataLoader in worker processes, decoding with libjpeg-turbo, resizing with OpenCV."""
    return _torch_files(work, by_pillow=False)


def _torch_files(work: ImageWork, *, by_pillow: bool) -> Iterator[Batch]:
    files = _Files(work.paths, _Decode(work, by_pillow=by_pillow))
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        files,
        work.batch_size,
        shuffle=work.is_shuffled,
        num_workers=work.threads,
        persistent_workers=True,
        prefetch_factor=_PREFETCH,
        drop_last=True,
    )
    while True:
        yield from loader


def webdataset(work: ImageWork) -> Iterator[Batch]:
    """WebDataset over a tar file, in worker processes, decoding with libjpeg-turbo, resizing with OpenCV."""
    import io
    import tarfile

    import webdataset as wds  # type: ignore[import-not-found, unused-ignore]

    for part in range(work.threads):
        with tarfile.open(work.folder / f"{part}.tar", "w") as tar:
            for number, path in list(enumerate(work.paths))[part :: work.threads]:
                content = path.read_bytes()
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    decode = _Decode(work, by_pillow=False)
    shards = str(work.folder / f"{{0..{work.threads - 1}}}.tar")
    shuffle = 1000 if work.is_shuffled else 0
    dataset = wds.WebDataset(shards, shardshuffle=False, empty_check=False).repeat().shuffle(shuffle)
    dataset = dataset.to_tuple("jpg").map_tuple(decode).batched(work.batch_size)
    for (images,) in wds.WebLoader(dataset, batch_size=None, num_workers=work.threads, prefetch_factor=_PREFETCH):
        yield {"image": images}


class _StreamedImages:
    """A StreamingDataset whose samples are decoded; made late, since its class is another package's."""

    @staticmethod
    def make(folder: Path, work: ImageWork) -> Any:
        import streaming  # type: ignore[import-not-found, unused-ignore]

        decode = _Decode(work, by_pillow=False)

        class Images(streaming.StreamingDataset):  # type: ignore[misc, unused-ignore]
            def __getitem__(self, index: Any) -> dict[str, Any]:
                return {"image": decode(super().__getitem__(index)["image"])}

        return Images(local=str(folder), shuffle=work.is_shuffled, batch_size=work.batch_size)


def mosaic_streaming(work: ImageWork) -> Iterator[Batch]:
    """MosaicML Streaming over MDS shards, in worker processes, decoding with libjpeg-turbo, resizing with OpenCV."""
    import streaming  # type: ignore[import-not-found, unused-ignore]

    with streaming.MDSWriter(out=str(work.folder / "mds"), columns={"image": "bytes"}) as writer:
        for path in work.paths:
            writer.write({"image": path.read_bytes()})
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _StreamedImages.make(work.folder / "mds", work),
        work.batch_size,
        num_workers=work.threads,
        persistent_workers=True,
        prefetch_factor=_PREFETCH,
        drop_last=True,
    )
    while True:
        yield from loader


class _LitImage:
    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __call__(self, number: int) -> dict[str, bytes]:
        return {"image": self._paths[number].read_bytes()}


class _LitDecode:
    def __init__(self, decode: Callable[[bytes], torch.Tensor]) -> None:
        self._decode = decode

    def __call__(self, item: dict[str, bytes]) -> dict[str, torch.Tensor]:
        return {"image": self._decode(item["image"])}


def litdata(work: ImageWork) -> Iterator[Batch]:
    """LitData over its own chunks, in worker processes, decoding with libjpeg-turbo, resizing with OpenCV."""
    import litdata as lit  # type: ignore[import-not-found, unused-ignore]

    chunks, decode = str(work.folder / "chunks"), _Decode(work, by_pillow=False)
    paths = work.paths
    lit.optimize(_LitImage(paths), list(range(len(paths))), chunks, chunk_bytes="64MB", num_workers=1)

    loader = lit.StreamingDataLoader(
        lit.StreamingDataset(chunks, shuffle=work.is_shuffled, drop_last=True, transform=_LitDecode(decode)),
        batch_size=work.batch_size,
        num_workers=work.threads,
        persistent_workers=True,
        prefetch_factor=_PREFETCH,
    )
    while True:
        yield from loader


def spdl(work: ImageWork) -> Iterator[Batch]:
    """SPDL's pipeline of threads over files, decoding with libjpeg-turbo, resizing with OpenCV: its own decoder needs FFmpeg."""
    from spdl.pipeline import PipelineBuilder  # type: ignore[import-not-found, unused-ignore]

    decode = _Decode(work, by_pillow=False)
    builder = (
        PipelineBuilder()
        .add_source(_endless(work))
        .pipe(lambda path: decode(path.read_bytes()), concurrency=work.threads, output_order="input")
        .aggregate(work.batch_size)
        .pipe(torch.stack)
        .add_sink(_PREFETCH)
    )
    with (pipeline := builder.build(num_threads=work.threads)).auto_stop():
        for images in pipeline:
            yield {"image": images}


def _endless(work: ImageWork) -> Iterator[Path]:
    paths, random = work.paths, np.random.default_rng(0)
    while True:
        yield from (
            paths[number] for number in (random.permutation(len(paths)) if work.is_shuffled else range(len(paths)))
        )


def ffcv(work: ImageWork) -> Iterator[Batch]:
    """FFCV over its own file of the same JPEGs; it resizes by areas."""
    from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found, unused-ignore]
    from ffcv.fields.rgb_image import (  # type: ignore[import-not-found, unused-ignore]
        RandomResizedCropRGBImageDecoder,
    )
    from ffcv.loader import Loader, OrderOption  # type: ignore[import-not-found, unused-ignore]
    from ffcv.transforms import (  # type: ignore[import-not-found, unused-ignore]
        NormalizeImage,
        RandomHorizontalFlip,
        ToTensor,
        ToTorchImage,
    )
    from ffcv.writer import DatasetWriter  # type: ignore[import-not-found, unused-ignore]

    file = str(work.folder / "images.beton")
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=95), "label": IntField()}
    DatasetWriter(file, fields, num_workers=1).from_indexed_dataset(_PillowImages(work.paths))
    image = [
        RandomResizedCropRGBImageDecoder((work.size, work.size), scale=work.area),
        RandomHorizontalFlip(work.flip),
        NormalizeImage(255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD), np.float32),
        ToTensor(),
        ToTorchImage(channels_last=False),
    ]
    order = OrderOption.RANDOM if work.is_shuffled else OrderOption.SEQUENTIAL
    loader = Loader(
        file,
        batch_size=work.batch_size,
        num_workers=work.threads,
        order=order,
        drop_last=True,
        pipelines={"image": image, "label": None},
        os_cache=True,
    )
    while True:
        for batch in loader:
            yield {"image": batch[0]}


class _PillowImages:
    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return np.asarray(Image.open(self._paths[index]).convert("RGB")), index


PEERS: dict[str, Callable[[ImageWork], Iterator[Batch]]] = {
    "dali readers.file": dali_file_reader,
    "torch + pillow": torch_pillow,
    "torch + simplejpeg": torch_simplejpeg,
    "webdataset": webdataset,
    "mosaic streaming": mosaic_streaming,
    "litdata": litdata,
    "spdl": spdl,
    "ffcv": ffcv,
}
"""By name; what cannot be imported is left out by the benchmark, which says so."""
