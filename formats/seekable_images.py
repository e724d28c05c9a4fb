"""Making a source's JPEGs seekable while they are packed: `change_images(source, SeekableJpegs())`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .jpeg.header import UnsupportedJpegError
from .jpeg.restart import make_seekable
from .jpeg.rows import NO_ROWS, list_rows, rows_field, rows_name
from .schema import Schema
from .sources.images import ChangedImage

MADE_SEEKABLE = "JPEGs made seekable"
KEPT = "images kept as they are: "

_JPEG_START = b"\xff\xd8"


@dataclass(frozen=True)
class SeekableJpegs:
    """Restart markers at every MCU row, no pixel changed; the field `image_rows` says where rows are in `image`.

    What is no JPEG, or none that can be handled, is kept as it is and has no rows.
    """

    def mark(self) -> object:
        return "seekable JPEG", 1

    def schema(self, schema: Schema, name: str) -> Schema:
        return schema.model_copy(update={"fields": schema.fields | {rows_name(name): rows_field(name)}})

    def most_bytes(self, nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
        return nbytes + nbytes // 8 + 1024

    def apply(self, content: memoryview, name: str) -> ChangedImage:
        if bytes(content[:2]) != _JPEG_START:
            return _kept(content, name, "no JPEG")
        try:
            image = make_seekable(bytes(content))
        except UnsupportedJpegError as error:
            return _kept(content, name, str(error))
        if len(image.content) > self.most_bytes(np.array(len(content))):
            return _kept(content, name, "it would grow by more than an eighth")
        return ChangedImage(image.content, MADE_SEEKABLE, values={rows_name(name): list_rows(image)})


def _kept(content: memoryview, name: str, reason: str) -> ChangedImage:
    return ChangedImage(content, KEPT + reason, values={rows_name(name): NO_ROWS})
