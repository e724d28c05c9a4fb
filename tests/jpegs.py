"""JPEG files of every kind that the transcoder meets, small, made by Pillow and OpenCV or spliced from their output."""

import functools
import io
import struct
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

ImageFile.MAXBLOCK = 1 << 22  # Pillow's own estimate is too small for some tiny progressive files


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Waves and noise: large and small coefficients, [height, width, channels]."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(x / (9 + channel) + channel) + 25 * np.cos(y / 7) for channel in range(channels)]
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, channels))
    return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)


def pillow_jpeg(pixels: NDArray[np.uint8], mode: str | None = None, **options: object) -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if mode == "CMYK":
        image = Image.frombytes("CMYK", (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
    image.save(content, "JPEG", **options)
    return content.getvalue()


def opencv_jpeg(pixels: NDArray[np.uint8], sampling: int, *options: int) -> bytes:
    _, content = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling, *options])
    return content.tobytes()


@functools.cache
def variants(height: int = 83, width: int = 130) -> Mapping[str, bytes]:
    """One file of every kind, by name."""
    colour, grey, four = (picture(height, width, channels) for channels in (3, 1, 4))
    progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    restart = [cv2.IMWRITE_JPEG_RST_INTERVAL, 3]
    plain = pillow_jpeg(colour, quality=92)
    found = {
        "4:4:4": pillow_jpeg(colour, quality=92, subsampling="4:4:4"),
        "4:2:2": pillow_jpeg(colour, quality=92, subsampling="4:2:2"),
        "4:2:0": plain,
        "4:2:0 optimal tables": pillow_jpeg(colour, quality=92, optimize=True),
        "grey optimal tables": pillow_jpeg(grey, quality=30, optimize=True),
        "4:4:0": opencv_jpeg(colour, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
        "4:1:1": opencv_jpeg(colour, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
        "grey": pillow_jpeg(grey, quality=85),
        "RGB": pillow_jpeg(colour, keep_rgb=True),
        "CMYK": pillow_jpeg(four, "CMYK", quality=88),
        "YCCK": as_ycck(pillow_jpeg(four, "CMYK", quality=88)),
        "lowest quality": pillow_jpeg(colour, quality=1),
        "highest quality": pillow_jpeg(colour, quality=100, subsampling="4:4:4"),
        "progressive 4:2:0": pillow_jpeg(colour, quality=92, progressive=True),
        "progressive 4:4:4": pillow_jpeg(colour, quality=97, progressive=True, subsampling="4:4:4"),
        "progressive 4:1:1": opencv_jpeg(colour, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411, *progressive),
        "progressive 4:4:0 restarts": opencv_jpeg(colour, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440, *progressive, *restart),
        "progressive grey": pillow_jpeg(grey, progressive=True),
        "progressive CMYK": pillow_jpeg(four, "CMYK", progressive=True),
        "restarts 4:2:0": opencv_jpeg(colour, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, *restart),
        "restarts every MCU": pillow_jpeg(colour, restart_marker_blocks=1),
        "restarts grey rows": pillow_jpeg(grey, restart_marker_rows=1),
        "fill bytes": pillow_jpeg(colour, restart_marker_blocks=2).replace(b"\xff\xd2", b"\xff\xff\xff\xd2"),
        "metadata": pillow_jpeg(colour, exif=_exif(), icc_profile=b"profile" * 99, comment=b"said"),
        "junk behind the end": plain + b"\xff\xd8junk\xff\xd9",
        "16-bit quantisation": with_wide_quantization(plain),
        "three scans 4:4:4": in_three_scans(height, width, 1),
        "three scans 4:2:0": in_three_scans(height, width, 2),
    }
    return {name: bytes(content) for name, content in found.items()}


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return exif


def as_ycck(cmyk: bytes) -> bytes:
    """A CMYK file whose Adobe marker says that its colours are YCCK."""
    place = cmyk.index(b"Adobe") + 11
    return cmyk[:place] + b"\x02" + cmyk[place + 1 :]


def with_wide_quantization(content: bytes) -> bytes:
    """The same image with its quantisation tables in 16 bits, so extended sequential (SOF1)."""
    result, position = b"", 2
    while content[position + 1] != 0xDA:
        marker, (length,) = content[position + 1], struct.unpack_from(">H", content, position + 2)
        body = content[position + 4 : position + 2 + length]
        if marker == 0xDB:
            tables = [body[start : start + 65] for start in range(0, len(body), 65)]
            body = b"".join(
                bytes([0x10 | table[0]]) + b"".join(b"\0" + bytes([v]) for v in table[1:]) for table in tables
            )
        result += bytes((0xFF, 0xC1 if marker == 0xC0 else marker)) + struct.pack(">H", 2 + len(body)) + body
        position += 2 + length
    return content[:2] + result + content[position:]


def in_three_scans(height: int, width: int, factor: int) -> bytes:
    """A colour file whose components lie in scans of their own, spliced from three grey ones; chroma `factor` smaller."""
    small = (-(-height // factor), -(-width // factor))
    planes = [
        pillow_jpeg(picture(*size, 1, seed), quality=90) for seed, size in enumerate([(height, width), small, small])
    ]
    head = planes[0][: planes[0].index(b"\xff\xc0")]
    tables = planes[0][planes[0].index(b"\xff\xc4") : planes[0].index(b"\xff\xda")]
    frame = struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes((1, factor << 4 | factor, 0, 2, 0x11, 0, 3, 0x11, 0))
    result = head + b"\xff\xc0" + frame + tables
    for identifier, plane in enumerate(planes, start=1):
        data = plane[plane.index(b"\xff\xda") + 10 : -2]
        result += b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, identifier, 0, 0, 63, 0) + data
    return result + b"\xff\xd9"


def pixels(content: bytes) -> NDArray[np.uint8]:
    """What Pillow (libjpeg-turbo) makes of it; CMYK stays CMYK."""
    return np.asarray(Image.open(io.BytesIO(content)))


def opencv_pixels(content: bytes) -> NDArray[np.uint8]:
    """What OpenCV (a libjpeg-turbo of its own) makes of it, as stored."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    assert image is not None
    return image.astype(np.uint8, copy=False)
