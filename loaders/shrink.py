"""Images made smaller once, while they are packed: decoded, scaled by area, encoded again. Metadata does not survive."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.schema import Schema
from stagein.formats.sources.images import ChangedImage

DEFAULT_QUALITY = 90
_LEAST_QUALITY = 40
_QUALITY_STEP = 10
_JPEG_START, _PNG_START = b"\xff\xd8", b"\x89PNG"
_COLOURS = {"Gray": "GRAY", "RGB": "RGB", "YCbCr": "RGB"}


@dataclass(frozen=True)
class ShrinkImages:
    """No side longer than `max_side` pixels, JPEG quality `quality`; an image that would not get smaller stays as it is.

    max_side  None: sizes stay.
    quality   of libjpeg, 1 to 100. None: images that need not be scaled are not encoded again, others with 90.
    """

    max_side: int | None = None
    quality: int | None = None

    def mark(self) -> object:
        return "shrink images", self.max_side, self.quality

    def schema(self, schema: Schema, name: str) -> Schema:
        return schema

    def most_bytes(self, nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
        return nbytes

    def apply(self, content: memoryview, name: str) -> ChangedImage:
        start = bytes(content[:4])
        if start.startswith(_JPEG_START):
            return self._shrink_jpeg(content)
        if start == _PNG_START:
            return self._shrink_png(content)
        return ChangedImage(content, "images not shrunk: neither JPEG nor PNG")

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width so that the longer side is `max_side`, if it is above it."""
        longer = max(height, width)
        if self.max_side is None or longer <= self.max_side:
            return height, width
        return max(1, round(height * self.max_side / longer)), max(1, round(width * self.max_side / longer))

    def _shrink_jpeg(self, content: memoryview) -> ChangedImage:
        import simplejpeg

        try:
            height, width, colours, sampling = simplejpeg.decode_jpeg_header(content)
            size = self.scaled_size(height, width)
            if size == (height, width) and self.quality is None:
                return ChangedImage(content, "images not shrunk: small enough")
            if colours not in _COLOURS:
                return ChangedImage(content, f"images not shrunk: colours are {colours}")
            pixels = simplejpeg.decode_jpeg(content, _COLOURS[colours])
        except ValueError:
            return ChangedImage(content, "images not shrunk: damaged JPEG")
        pixels = _scaled(pixels, size)
        sampling = "Gray" if colours == "Gray" else sampling
        for quality in range(self.quality or DEFAULT_QUALITY, 0, -_QUALITY_STEP):
            result = simplejpeg.encode_jpeg(pixels, quality, _COLOURS[colours], sampling)
            if len(result) <= len(content):
                return ChangedImage(result, "images shrunk", size)
            if size == (height, width) or quality <= _LEAST_QUALITY:
                break
        return ChangedImage(content, "images not shrunk: they would have more bytes")

    def _shrink_png(self, content: memoryview) -> ChangedImage:
        import cv2

        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            return ChangedImage(content, "images not shrunk: damaged PNG")
        size = self.scaled_size(*pixels.shape[:2])
        if size == pixels.shape[:2]:
            return ChangedImage(content, "images not shrunk: small enough")
        done, result = cv2.imencode(".png", _scaled(pixels, size))
        if not done or len(result) > len(content):
            return ChangedImage(content, "images not shrunk: they would have more bytes")
        return ChangedImage(result.reshape(-1), "images shrunk", size)


def _scaled(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """The image at (height, width), each pixel the mean of the area that it covers; [height, width, channels]."""
    import cv2

    if pixels.shape[:2] == size:
        return pixels
    scaled: NDArray[Any] = cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return scaled.reshape(*size, -1)
