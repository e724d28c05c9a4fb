"""Decoding the part of an image that a window needs, into memory that is used again."""

import re
import struct
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stagein.formats.jpeg.window import WindowDecoder

from .dataset import decode_image

_MARGIN_ROWS = 2
"""Rows of chroma below a window that its last rows are interpolated from (one; we give two)."""
_LEFT_OVER = re.compile(r"extraneous bytes before marker 0xd9$")
"""libjpeg's first and only complaint about an image of which not all rows were asked for: data lie before its end marker."""
_HEIGHT = struct.Struct(">H")
_SEGMENT = struct.Struct(">BBH")
"""The first bytes of a segment: 0xFF, its marker, its length without these two."""
_FRAME = struct.Struct(">BHHB")
"""Of a frame, behind them: bits of a sample, height, width, components."""


class ImageDecoder:
    """Decodes JPEG, PNG and what else OpenCV knows to RGB. For one thread at a time: the next call overwrites the pixels."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def decode(
        self, record: NDArray[np.uint8], window: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Pixels of an image, `[rows, 3 * width]`, as stored (without EXIF orientation), and where the window is in them.

        record  the bytes of the file; changed and restored meanwhile.
        window  (top, left, height, width).

        Of most JPEGs little more than the window is decoded, of others the rows down to its bottom, or the whole: to the same pixels.
        Raises ValueError, saying why, for what cannot be decoded. An image that is smaller than it should be comes whole.
        """
        pixels = self._windows.decode(record, window)
        if pixels is not None:
            return pixels, np.array([0, 0, window[2], window[3]])
        return self.decode_rows(record, int(window[0] + window[2])), window

    @cached_property
    def _windows(self) -> WindowDecoder:
        return WindowDecoder()

    def decode_rows(self, record: NDArray[np.uint8], bottom: int) -> NDArray[np.uint8]:
        """The first `bottom` rows of an image at least, `[rows, 3 * width]`, as stored (without EXIF orientation).

        record  the bytes of the file; changed and restored meanwhile.

        Rows further down are not decoded: the image is told to be less high, and the decoder stops there. One whose data
        are damaged above comes whole, as OpenCV shows it. Raises ValueError, saying why, for what cannot be decoded.
        """
        position, height, width, mcu_height = find_frame(record)  # none for CMYK, which is converted after decoding
        if position < 0 or not height or not width:
            return self._decode_whole(record)
        needed = bottom + _MARGIN_ROWS * mcu_height // 8
        rows = min(height, -(-needed // mcu_height) * mcu_height)
        if rows < height:
            _HEIGHT.pack_into(record, position, rows)
            try:
                return self._decode_jpeg(record, rows, width)
            except ValueError as error:
                if _LEFT_OVER.search(str(error)):
                    return self._memory[: rows * width * 3].reshape(rows, width * 3)
            finally:
                _HEIGHT.pack_into(record, position, height)
        try:
            return self._decode_jpeg(record, height, width)
        except ValueError:
            return self._decode_whole(record)  # damaged: OpenCV tells how much

    def _decode_jpeg(self, record: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
        import simplejpeg

        nbytes = height * width * 3
        if len(self._memory) < nbytes:
            self._memory = np.empty(nbytes + nbytes // 2, np.uint8)
        pixels = simplejpeg.decode_jpeg(record, colorspace="RGB", buffer=self._memory[:nbytes])
        return pixels.reshape(height, width * 3)  # type: ignore[no-any-return]

    def _decode_whole(self, record: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = decode_image(record)
        if image is None:
            raise ValueError("its data are damaged, or of a kind that is not known")
        return image.reshape(len(image), -1)


def find_frame(record: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """(position of its height, height, width, MCU height) of the frame of a sequential Huffman-coded JPEG, grey or in colour.

    (-1, 0, 0, 0) for anything else. Segments are walked as ITU-T T.81 annex B lays them out. No kernel: that takes longer to
    compile than it saves in a million images.
    """
    content, position = memoryview(record), 2
    try:
        while True:
            start, marker, nbytes = _SEGMENT.unpack_from(content, position)
            if start != 0xFF:
                break
            if marker == 0xFF:  # a fill byte
                position += 1
                continue
            if marker in (0xC0, 0xC1):
                _, height, width, components = _FRAME.unpack_from(content, position + _SEGMENT.size)
                factors = content[position + 11 : position + 10 + 3 * components : 3]
                if components not in (1, 3) or len(factors) < components:
                    break
                return position + 5, height, width, 8 * max(each & 15 for each in factors)
            if marker == 0xDA or (0xC2 <= marker <= 0xCF and marker != 0xC4):
                break
            position += 2 + nbytes
    except struct.error:  # the record ends
        pass
    return -1, 0, 0, 0
