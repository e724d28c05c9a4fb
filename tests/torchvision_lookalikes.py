"""Classes with the names, modules and attributes of torchvision's transforms, doing what those do to a PIL image.

torchvision itself does not import beside every build of torch. What matters here is what the loader reads off them.
"""

from enum import Enum

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomResizedCrop:
    def __init__(
        self, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation=InterpolationMode.BILINEAR, antialias=True
    ):
        self.size = (size, size) if isinstance(size, int) else size
        self.scale, self.ratio, self.interpolation, self.antialias = scale, ratio, interpolation, antialias

    def __call__(self, image):
        return image.resize(self.size[::-1])


class RandomHorizontalFlip:
    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, image):
        return image


class Resize:
    def __init__(self, size, interpolation=InterpolationMode.BILINEAR, max_size=None, antialias=True):
        self.size, self.interpolation, self.max_size, self.antialias = size, interpolation, max_size, antialias

    def __call__(self, image):
        width, height = image.size
        short = min(width, height)
        size = (self.size * width // short, self.size * height // short)
        return image.resize(size, Image.Resampling.BILINEAR)


class CenterCrop:
    def __init__(self, size):
        self.size = (size, size)

    def __call__(self, image):
        left, top = round((image.width - self.size[1]) / 2), round((image.height - self.size[0]) / 2)
        return image.crop((left, top, left + self.size[1], top + self.size[0]))


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


class ToImage:
    def __call__(self, image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class ToDtype:
    def __init__(self, dtype, scale=False):
        self.dtype, self.scale = dtype, scale

    def __call__(self, image):
        return image.to(self.dtype) / (255 if self.scale else 1)


class Normalize:
    def __init__(self, mean, std, inplace=False):
        self.mean, self.std = mean, std

    def __call__(self, image):
        return (image - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


class ColorJitter:
    def __init__(self, brightness=0):
        self.brightness = brightness

    def __call__(self, image):
        return image


for kind in (Compose, RandomResizedCrop, RandomHorizontalFlip, Resize, CenterCrop, ToTensor, Normalize, ColorJitter):
    kind.__module__ = "torchvision.transforms.transforms"
for kind in (ToImage, ToDtype):
    kind.__module__ = "torchvision.transforms.v2._type_conversion"
