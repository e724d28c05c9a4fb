"""Images changed on their way into a data set: made seekable, or anything a function makes of them; a source around a source."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stagein.formats.checksums import Buffer
from stagein.formats.errors import UsageError
from stagein.formats.schema import Field, Schema
from stagein.formats.source import RefusedRecord, Room, Source, SourcePart, SourceRecord
from stagein.formats.values import BadValueError, Value, row_bytes, to_rows

from .fields import SIZE_FIELD

_IMAGES = ("jpeg", "png", "image")
_SIZE_NAME = "hw"
BYTES_BEFORE, BYTES_AFTER = "bytes of images before", "bytes of images after"
"""What is counted of every image beside the outcome of each change."""


@dataclass(frozen=True)
class ChangedImage:
    """What became of an image: its bytes, what to count it under, and its (height, width) where they are others than before.

    `values` are those of the fields that the change adds to the schema.
    """

    content: Buffer
    outcome: str
    size: tuple[int, int] | None = None
    values: Mapping[str, Value] = field(default_factory=dict)


class ImageChange(Protocol):
    """A change to every image of a source. Picklable; the same image always becomes the same bytes."""

    def mark(self) -> object:
        """What the change is, as JSON: equal marks mean equal results."""

    def schema(self, schema: Schema, name: str) -> Schema:
        """The schema of the records when the images `name` are changed."""

    def most_bytes(self, nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bounds on the bytes of images that have so many now."""

    def apply(self, content: memoryview, name: str) -> ChangedImage:
        """The changed image of the field `name`; the same bytes where it cannot be changed, which its `outcome` says."""


def change_images(source: Source, change: ImageChange) -> Source:
    """`source` with its images changed; its column `hw`, where it has one, says their new size.

    Raises UsageError when the source has no field of JPEG or PNG images.
    """
    schema = source.schema
    names = [schema.primary, *schema.fields]
    images = [name for name in names if schema.fields[name].encoding in _IMAGES]
    if not images:
        raise UsageError(f"{source.name} has no field of JPEG or PNG images: leave out the options that change images")
    return ChangedImages(source, images[0], change)


@dataclass(frozen=True)
class ChangedImages:
    """The records of `whole` with the images of the field `field` changed; a source itself.

    `nbytes` of that field are bounds: what becomes of an image is not known before it is read.
    """

    whole: Source
    field: str
    change: ImageChange

    @property
    def kind(self) -> str:
        return self.whole.kind

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def schema(self) -> Schema:
        return self.change.schema(self.whole.schema, self.field)

    @property
    def nbytes(self) -> NDArray[np.int64]:
        is_primary = self.field == self.whole.schema.primary
        return self.change.most_bytes(self.whole.nbytes) if is_primary else self.whole.nbytes

    @property
    def secondary_nbytes(self) -> Mapping[str, NDArray[np.int64]]:
        return {
            name: self.change.most_bytes(nbytes) if name == self.field else nbytes
            for name, nbytes in self.whole.secondary_nbytes.items()
        }

    @property
    def refused(self) -> tuple[RefusedRecord, ...]:
        return self.whole.refused

    def identity(self) -> object:
        return self.whole.identity(), self.change.mark()

    def part(self, numbers: NDArray[np.int64]) -> "ChangedImagesPart":
        fields = self.whole.schema.fields
        has_size = fields.get(_SIZE_NAME) == SIZE_FIELD
        return ChangedImagesPart(self.whole.part(numbers), self.field, fields[self.field], self.change, has_size)


@dataclass(frozen=True)
class ChangedImagesPart:
    """Some records of such a source; `has_size`: their column `hw` is the size of the image."""

    whole: SourcePart
    field: str
    declared: Field
    change: ImageChange
    has_size: bool

    def mark(self) -> object:
        return self.whole.mark(), self.field, self.change.mark()

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        original = _OriginalImage(self.field, self.declared, room)
        for number, record in enumerate(self.whole.read(original.room)):
            if isinstance(record, RefusedRecord):
                yield record
                continue
            try:
                yield self._changed(record, original.taken(record), room)
            except BadValueError as error:
                yield RefusedRecord(f"record {number} of a shard", str(error))

    def _changed(self, record: SourceRecord, content: memoryview, room: Room) -> SourceRecord:
        changed = self.change.apply(content, self.field)
        result = memoryview(changed.content).cast("B")
        room(self.field, len(result))[:] = result
        values = {name: value for name, value in record.values.items() if name != self.field} | dict(changed.values)
        if self.has_size and changed.size is not None:
            values[_SIZE_NAME] = changed.size
        counts = {BYTES_BEFORE: len(content), **record.counts, BYTES_AFTER: len(result)}
        return replace(record, values=values, counts=counts | {changed.outcome: 1})


class _OriginalImage:
    """Takes the image of a record as its source reads it; all other fields go to the room of the shard."""

    def __init__(self, name: str, declared: Field, room: Room) -> None:
        self._field = name
        self._declared = declared
        self._room = room
        self._memory = bytearray()
        self._content: memoryview | None = None

    def room(self, name: str, nbytes: int) -> memoryview:
        if name != self._field:
            return self._room(name, nbytes)
        if len(self._memory) < nbytes:
            self._content = None
            self._memory = bytearray(nbytes)
        self._content = memoryview(self._memory)[:nbytes]
        return self._content

    def taken(self, record: SourceRecord) -> memoryview:
        """The image of the record that was just read. Raises BadValueError when it is no file's bytes."""
        content, self._content = self._content, None
        if content is None:
            content = row_bytes(to_rows(self._declared, record.values[self._field]))
        return content
