"""A JPEG in pieces that can be decoded by themselves, and what its makers share."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAMAGED = "its entropy-coded data are cut off or no valid codes"
BAD_TABLE = "a Huffman table is missing or no prefix code"


@dataclass(frozen=True)
class SeekableJpeg:
    """A JPEG in pieces: its header, then one piece an MCU row; their concatenation is the file.

    piece_ends  [1 + MCU rows], where each piece ends in `content`. A row ends with its restart marker, the last one with
                the end marker.
    mcu_height  pixels of an MCU row, 8, 16 or 32.
    """

    content: NDArray[np.uint8]
    piece_ends: NDArray[np.uint32]
    mcu_height: int


def target_bytes(header_bytes: int, scan_bytes: int, segments: int) -> int:
    """Room that is enough for any scan: every byte stuffed, and a marker, fill bits and four longest DC codes a segment."""
    return header_bytes + 2 * scan_bytes + segments * (2 + 2 + 4 * 2 * 4) + 64
