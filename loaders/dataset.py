"""`RecordDataset`: a converted data set as a torch Dataset, read from the node-local copy where there is one."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from stagein.finding import find_staged
from stagein.formats import Dataset, Manifest
from stagein.formats.errors import SourceError, UsageError
from stagein.leases import ReaderLease

_JPEG_START = b"\xff\xd8"
Sample = dict[str, NDArray[Any]]


class RecordDataset(torch.utils.data.Dataset[Any]):
    """The samples of a converted data set, by number; picklable, and safe to use from many threads.

    path    the data set, as `stagein convert` wrote it.
    fields  names of the fields to deliver; None: all.
    as_tuples  samples and batches are tuples of the fields, in the order of `fields`, as many scripts for torch expect;
               what a transform adds, and `valid`, come after them. False: they are dicts.
    staged  "auto": read from the copy that `stagein stage` put on this node, if there is one; None: never;
            a path: from the copy there.

    `dataset[i]` is a dict of arrays; an encoded image is decoded to uint8 height x width x 3 (RGB), as stored (an EXIF
    orientation is not applied). `stagein.loaders.DataLoader` with a `transform` decodes whole batches with DALI instead.
    Raises SourceError where `path` holds no data set, UsageError for a field that it does not have.
    """

    def __init__(
        self,
        path: Path | str,
        fields: Collection[str] | None = None,
        staged: Literal["auto"] | Path | str | None = "auto",
        *,
        as_tuples: bool = False,
    ) -> None:
        self.as_tuples = as_tuples
        self.records, self._lease = _open(Path(path), staged)
        self.fields = tuple(self.records.schema.fields if fields is None else fields)
        unknown = [name for name in self.fields if name not in self.records.schema.fields]
        if unknown:
            raise UsageError(f"{path} has no field {unknown[0]!r}: it has {', '.join(self.records.schema.fields)}")

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by label. Raises UsageError for a data set without classes."""
        for field in self.records.schema.fields.values():
            if "classes" in field.meta:
                return [str(name) for name in field.meta["classes"]]  # type: ignore[attr-defined]
        raise UsageError(
            f"{self.records.path} has no classes: none of its fields {', '.join(self.records.schema.fields)} is a label"
        )

    @property
    def listed_fields(self) -> frozenset[str]:
        """Fields whose samples differ in shape by nature, or are strings: batches have lists of them."""
        schema = self.records.schema
        return frozenset(name for name in self.fields if schema.fields[name].kind in ("ragged", "text"))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples with one call, as torch's own loader asks for them."""
        return [self.shaped(sample) for sample in self.read(indices)]

    def shaped(self, fields: dict[str, Any]) -> Any:
        """A sample, or a batch, as the user wants it: the dict, or a tuple where `as_tuples` says so."""
        if not self.as_tuples:
            return fields
        return tuple(fields[name] for name in sorted(fields, key=self._place_of_field))

    def _place_of_field(self, name: str) -> int:
        return self.fields.index(name) if name in self.fields else len(self.fields) + (name == "valid")

    def read(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples as dicts, decoded."""
        samples: list[Sample] = [
            {name: np.array(self.records.columns[name][index]) for name in self.fields if name in self.records.columns}
            for index in indices
        ]
        primary = self.records.schema.primary
        if primary in self.fields:
            for sample, index, stored in zip(samples, indices, self.records.read_records(indices), strict=True):
                sample[primary] = self._decode(index, stored)
        return [{name: sample[name] for name in self.fields} for sample in samples]

    def place(self, index: int) -> str:
        """Where a sample is stored, for error messages: record number and shard."""
        shard = self.records.manifest.shards[int(self.records.index.shard[index])]
        return f"record {index} in {self.records.path / shard.file}"

    def _decode(self, index: int, stored: NDArray[np.uint8]) -> NDArray[Any]:
        field = self.records.schema.primary_field
        if field.kind == "tensor":
            return self.records.decode(stored)
        image = _decode_image(stored)
        if image is None:
            raise SourceError(f"{self.place(index)} cannot be decoded: its {field.encoding} data are damaged")
        return image


class SamplesAsDicts(torch.utils.data.Dataset[Sample]):
    """A RecordDataset whose samples are dicts, whatever it says: what loaders work with until the end."""

    def __init__(self, dataset: RecordDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset.read([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        return self._dataset.read(indices)


def _open(path: Path, staged: Literal["auto"] | Path | str | None) -> tuple[Dataset, ReaderLease | None]:
    """The data set, and what keeps its staged copy from being evicted meanwhile."""
    if staged is None:
        return Dataset(path), None
    if staged != "auto":
        return Dataset(path, staged_path=Path(staged)), ReaderLease(Path(staged))
    copy = find_staged(Manifest.load(path).id)
    if copy is None:
        return Dataset(path), None
    return Dataset(path, staged_path=copy.path, staged_shards=copy.files), copy.lease


def _decode_image(stored: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """A JPEG or PNG file as RGB `[height, width, 3]`; None where it is damaged."""
    import cv2
    import simplejpeg

    if stored[:2].tobytes() == _JPEG_START:
        try:
            return simplejpeg.decode_jpeg(stored, colorspace="RGB")  # type: ignore[no-any-return]
        except ValueError:
            pass  # CMYK, or damaged: OpenCV tells
    image = cv2.imdecode(stored, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if image is None else np.ascontiguousarray(image[..., ::-1])
