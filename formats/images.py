"""What the first and last bytes of an image file say: its format, its size, and whether all of it is there.

Reading the header costs microseconds, decoding milliseconds: enough to refuse what is no image when a data set is
packed, without paying for a decode. Sources: ITU-T T.81 annex B (JPEG markers), the PNG specification, chapter 5.
"""

import struct
from dataclasses import dataclass
from typing import Literal

IMAGE_SUFFIXES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}
"""File name suffixes (lower case) of the formats that are recognised, and the names of these formats."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})


class BadImageError(ValueError):
    """These bytes are no complete image; the text says why, without naming the file."""


@dataclass(frozen=True)
class ImageHeader:
    """Format and size in pixels of an image, as stored (an EXIF orientation is not applied)."""

    encoding: Literal["jpeg", "png"]
    height: int
    width: int


def read_header(content: memoryview) -> ImageHeader:
    """The header of the complete JPEG or PNG file `content`. Raises BadImageError for anything else."""
    if not len(content):
        raise BadImageError("the file is empty")
    if bytes(content[:3]) == b"\xff\xd8\xff":
        return _read_jpeg_header(content)
    if bytes(content[:8]) == _PNG_SIGNATURE:
        return _read_png_header(content)
    raise BadImageError("not an image: it starts like neither JPEG nor PNG")


def _read_jpeg_header(content: memoryview) -> ImageHeader:
    size: tuple[int, int] | None = None
    position = 2
    while True:
        if position + 4 > len(content):
            raise BadImageError("truncated JPEG: it ends within its header")
        if content[position] != 0xFF:
            raise BadImageError(f"damaged JPEG: no marker at byte {position}")
        marker = content[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _WITHOUT_LENGTH:
            position += 2
            continue
        (length,) = struct.unpack_from(">H", content, position + 2)
        if marker in _START_OF_FRAME:
            if position + 9 > len(content):
                raise BadImageError("truncated JPEG: it ends within its header")
            size = struct.unpack_from(">HH", content, position + 5)
        position += 2 + length
        if marker == _START_OF_SCAN:
            break
    if size is None or 0 in size:
        raise BadImageError("damaged JPEG: its header gives no size")
    # Some cameras append bytes after the end marker, so it need not be last; in the scan itself it cannot occur.
    if bytes(content[-2:]) != _JPEG_END and bytes(content[position:]).rfind(_JPEG_END) < 0:
        raise BadImageError("truncated JPEG: it has no end marker")
    return ImageHeader("jpeg", *size)


def _read_png_header(content: memoryview) -> ImageHeader:
    if len(content) < 24 or bytes(content[12:16]) != b"IHDR":
        raise BadImageError("damaged PNG: it has no IHDR chunk")
    width, height = struct.unpack_from(">II", content, 16)
    if not width or not height:
        raise BadImageError("damaged PNG: its header gives no size")
    if bytes(content[-8:]) != _PNG_END and bytes(content).rfind(_PNG_END) < 0:
        raise BadImageError("truncated PNG: it has no end chunk")
    return ImageHeader("png", height, width)
