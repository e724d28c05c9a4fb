"""PNG files whose pixels are class numbers, not colours, by their bytes (PNG specification, third edition, section 11).

A palette (as in the masks of Pascal VOC) only says how the numbers are shown; decoders of images would give its colours
instead. Without it, and called grey, the same compressed pixels are the numbers.
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 33
"""Of the signature and the chunk IHDR: length, name, 13 bytes, checksum."""
_GREY, _PALETTE = 0, 3
_ONLY_FOR_COLOURS = (b"PLTE", b"tRNS", b"bKGD", b"hIST")


def grey_labels(stored: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """The file as a grey PNG of the same numbers, and its height and width. Raises ValueError, saying what it is instead."""
    header = stored[:_HEADER_END].tobytes()
    if len(header) < _HEADER_END or header[:8] != _SIGNATURE or header[12:16] != b"IHDR":
        raise ValueError("it is no PNG, and other images do not keep numbers exactly")
    width, height, depth, colour = struct.unpack_from(">IIBB", header, 16)
    if colour not in (_GREY, _PALETTE):
        raise ValueError("it is a PNG of colours, not of one number a pixel")
    if depth != 8:
        raise ValueError(f"it has {depth} bits a pixel, not 8")
    if colour == _GREY:
        return stored, (height, width)
    ihdr = header[12:25] + bytes([_GREY]) + header[26:29]
    parts = [_SIGNATURE, header[8:12], ihdr, struct.pack(">I", zlib.crc32(ihdr))]
    content, position = memoryview(stored), _HEADER_END
    while position + 12 <= len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        if bytes(content[position + 4 : position + 8]) not in _ONLY_FOR_COLOURS:
            parts.append(bytes(content[position:end]))
        position = end
    return np.frombuffer(b"".join(parts), np.uint8), (height, width)
