"""A small image folder of learnable classes, made on the spot: for the demo and the tests.

The class is a pattern; colour, phase, size, position and noise are random, so that a model has to learn the pattern.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PATTERNS = ("checker", "circle", "columns", "diagonal", "rings", "rows")
"""Class names; their sorted order is the order of the labels."""


def make_image_folder(
    root: Path,
    *,
    images_per_class: int,
    height: int = 64,
    width: int = 64,
    seed: int = 0,
    num_classes: int = len(PATTERNS),
) -> None:
    """Write ROOT/<pattern>/<number>.jpg, `images_per_class` of height x width pixels each, the same for the same seed."""
    import simplejpeg

    for label, pattern in enumerate(PATTERNS[:num_classes]):
        folder = root / pattern
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(images_per_class):
            image = draw(pattern, height, width, np.random.default_rng([seed, label, number]))
            (folder / f"{number:05d}.jpg").write_bytes(
                simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420")
            )


def draw(pattern: str, height: int, width: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """One image of a pattern, uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width] / min(height, width)
    frequency, phase_x, phase_y = random.uniform(3, 6), *random.uniform(0, 1, 2)
    centre_distance = np.hypot(y - random.uniform(0.4, 0.6), x - random.uniform(0.4, 0.6))
    in_columns = np.sin(2 * np.pi * (frequency * x + phase_x)) > 0
    in_rows = np.sin(2 * np.pi * (frequency * y + phase_y)) > 0
    mask = {
        "checker": in_columns ^ in_rows,
        "circle": centre_distance < random.uniform(0.2, 0.35),
        "columns": in_columns,
        "diagonal": np.sin(2 * np.pi * (frequency * (x + y) / np.sqrt(2) + phase_x)) > 0,
        "rings": np.sin(2 * np.pi * (frequency * 1.5 * centre_distance + phase_x)) > 0,
        "rows": in_rows,
    }[pattern]
    background, foreground = random.uniform(0, 110, 3), random.uniform(145, 255, 3)
    if random.random() < 0.5:
        background, foreground = foreground, background
    image = np.where(mask[..., None], foreground, background) + random.normal(0, 20, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)
