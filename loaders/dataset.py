"""`RecordDataset`: a converted data set as a torch Dataset, read from the node-local copy where there is one."""

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray

from stagein.finding import find_staged
from stagein.formats import Dataset, Manifest
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.schema import BFLOAT16, Field
from stagein.leases import ReaderLease

from .stats import PhaseTimes

_JPEG_START = b"\xff\xd8"
Sample = dict[str, Any]


class RecordDataset(torch.utils.data.Dataset[Any]):
    """The samples of a converted data set, by number; picklable, and safe to use from many threads.

    path    the data set, as `stagein convert` wrote it.
    fields  names of the fields to deliver; None: all.
    as_tuples  samples and batches are tuples of the fields, in the order of `fields`, as many scripts for torch expect;
               what a transform adds, and `valid`, come after them. False: they are dicts.
    staged  "auto": read from the copy that `stagein stage` put on this node, if there is one; None: never;
            a path: from the copy there.

    `dataset[i]` is a dict of arrays: an encoded image is decoded to uint8 height x width x 3 (RGB), as stored (an EXIF
    orientation is not applied); other encoded fields are their bytes (uint8); text is a str; bfloat16, which numpy does not
    have, is a torch tensor; arrays have the shape that each was written with. `stagein.loaders.DataLoader` with a `transform`
    decodes whole batches with DALI instead.
    Raises SourceError where `path` holds no data set, UsageError for a field that it does not have, or that is named twice.
    """

    def __init__(
        self,
        path: Path | str,
        fields: Collection[str] | None = None,
        staged: Literal["auto"] | Path | str | None = "auto",
        *,
        as_tuples: bool = False,
    ) -> None:
        if isinstance(fields, str):
            raise UsageError(f"fields={fields!r} is one name: write a list of them, [{fields!r}]")
        self.as_tuples = as_tuples
        self.records, self._lease = _open(Path(path), staged)
        self.fields = tuple(self.records.fields if fields is None else fields)
        unknown = [name for name in self.fields if name not in self.records.fields]
        if unknown:
            raise UsageError(f"{path} has no field {unknown[0]!r}: it has {', '.join(self.records.schema.fields)}")
        twice = [name for name in self.fields if self.fields.count(name) > 1]
        if twice:
            raise UsageError(f"fields={list(self.fields)} names {twice[0]!r} twice: name each field once")

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
        """Fields whose samples differ in shape by nature, or are strings: batches have lists of them.

        Not images: whether those are of one size is up to the data set, or to a transform.
        """
        fields = self.records.schema.fields
        return frozenset(name for name in self.fields if fields[name].is_variable and not is_image(fields[name]))

    @property
    def listed_after_transform(self) -> frozenset[str]:
        """The same when samples are transformed one by one: arrays of which several extents differ are like images then, to be
        brought to one shape."""
        return self.listed_fields - self.records.schema.shaped_fields.keys()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, slice):
            raise TypeError(
                "a RecordDataset is asked for one sample or for a list, by __getitems__; its .records take slices"
            )
        try:
            number = range(len(self))[index]
        except IndexError:
            raise IndexError(f"there is no sample {index}: {self.records.path} has {len(self)}") from None
        return self.__getitems__([number])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several samples with one call, as torch's own loader asks for them."""
        return [self.shaped(sample) for sample in self.read(indices)]

    def shaped(self, fields: Any) -> Any:
        """A sample, or a batch, as the user wants it: the dict, or a tuple where `as_tuples` says so.

        What a transform made no dict of stays what it is.
        """
        if not self.as_tuples or not isinstance(fields, Mapping):
            return fields
        return tuple(fields[name] for name in sorted(fields, key=self._place_of_field))

    def _place_of_field(self, name: str) -> int:
        return self.fields.index(name) if name in self.fields else len(self.fields) + (name == "valid")

    def read(self, indices: Sequence[int], times: PhaseTimes | None = None) -> list[Sample]:
        """Several samples as dicts, decoded. What it takes is added to `times`."""
        times = PhaseTimes() if times is None else times
        values = {name: self._read_field(name, indices, times) for name in self.fields}
        return [{name: values[name][row] for name in self.fields} for row in range(len(indices))]

    def _read_field(self, name: str, indices: Sequence[int], times: PhaseTimes) -> list[Any]:
        if name in self.records.columns:
            return list(self.rows(name, indices))
        reader = self.records.readers[name]
        started = time.perf_counter()
        stored = reader.read_records(indices)
        read = time.perf_counter()
        values = [typed(reader.field, value) for value in self._decoded(name, indices, stored)]
        seconds, nbytes = time.perf_counter() - read, sum(value.nbytes for value in values if hasattr(value, "nbytes"))
        times.add(PhaseTimes(read_s=read - started, bytes_read=sum(content.nbytes for content in stored)))
        if reader.field.codec is not None:
            times.add(PhaseTimes(decompress_s=seconds, bytes_decompressed=nbytes))
        elif is_image(reader.field):
            times.add(PhaseTimes(decode_s=seconds, bytes_decoded=nbytes))
        return values

    def rows(self, name: str, indices: Sequence[int] | NDArray[np.int64]) -> Any:
        """A field of several samples, not decoded: an array `[len(indices), ...]`, a tensor where numpy has no such type; a
        list where they differ in shape, of files as bytes, arrays or strings."""
        field = self.records.schema.fields[name]
        if name in self.records.columns:
            return typed(field, np.asarray(self.records.columns[name][np.asarray(indices, dtype=np.int64)]))
        reader = self.records.readers[name]
        if field.kind == "tensor":
            return typed(field, reader.read_tensors(indices))
        return [typed(field, value) for value in self.records.values_of(name, indices, reader.read_records(indices))]

    @property
    def description(self) -> str:
        """Where records are read from, for `DataLoader.explain`."""
        records = self.records
        if records.staged_path is None:
            return f"the source {records.path}, there is no staged copy; {self._describe_reads()}"
        shards = records.manifest.shards
        here = len(shards) if records.staged_shards is None else sum(s.file in records.staged_shards for s in shards)
        left = f"; {len(records.left_shards)} of its shards turned out to be bad" if records.left_shards else ""
        return f"the staged copy {records.staged_path}, {here} of {len(shards)} shards, the others from {records.path}{left}"

    def _describe_reads(self) -> str:
        if not len(self):
            return "it has no records"
        try:
            nbytes = self.records.reader.largest_read_bytes()
        except SourceError as error:
            return str(error)
        kind = "shared" if nbytes >= 1 << 20 else "local"
        return f"its file system is {kind}: neighbours are read together, up to {nbytes >> 10} KiB at a time"

    def place(self, index: int) -> str:
        """Where a sample is stored, for error messages: record number and shard."""
        shard = self.records.manifest.shards[int(self.records.index.shard[index])]
        return f"record {index} in {self.records.path / shard.file}"

    def _decoded(self, name: str, indices: Sequence[int], stored: Sequence[NDArray[np.uint8]]) -> list[Any]:
        reader = self.records.readers[name]
        if reader.field.codec is not None:
            return [reader.decode(content) for content in stored]
        if not is_image(reader.field):
            return self.records.values_of(name, indices, stored)
        return [self._decoded_image(reader.field, *each) for each in zip(indices, stored, strict=True)]

    def _decoded_image(self, field: Field, index: int, stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = decode_image(stored)
        if image is None:
            raise SourceError(f"{self.place(index)} cannot be decoded: its {field.encoding} data are damaged")
        return image


def typed(field: Field, value: Any) -> Any:
    """A value of a field as what it is: a torch tensor for bfloat16, which numpy does not have."""
    if field.array_dtype_name != BFLOAT16:
        return value
    return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)


def is_image(field: Field) -> bool:
    """Whether records of a field are image files, decoded to height x width x channel."""
    return field.kind == "encoded" and len(field.shape) == 3


class SamplesAsDicts(torch.utils.data.Dataset[Sample]):
    """A RecordDataset whose samples are dicts, whatever it says: what loaders work with until the end."""

    def __init__(self, dataset: RecordDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: Sequence[int], times: PhaseTimes | None = None) -> list[Sample]:
        return self._dataset.read(indices, times)

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
    try:
        return Dataset(path, staged_path=copy.path, staged_shards=copy.files), copy.lease
    except SourceError as error:
        warnings.warn(f"{error}. The source is read instead", RuntimeWarning, stacklevel=3)
        return Dataset(path), None


def decode_image(stored: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
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
