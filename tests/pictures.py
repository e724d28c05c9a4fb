"""Small JPEG and PNG files, each different, for the tests of sources."""

import io

import numpy as np
import simplejpeg
from PIL import Image


def jpeg(number: int, height: int = 8, width: int = 12) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content: bytes = simplejpeg.encode_jpeg(pixels)
    return content


def png(number: int, height: int = 8, width: int = 12) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
