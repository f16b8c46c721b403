"""Random operations on a PIL image: resized crop and RandAugment."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import ImageEnhance, ImageOps
from PIL.Image import Image, Resampling, Transform

Fill = tuple[int, int, int]


def random_resized_crop(picture: Image, size: tuple[int, int], smallest: float, rng: np.random.Generator) -> Image:
    """Crop at least ``smallest`` of the area, with an aspect ratio from 3/4 to 4/3, and resize to (width, height).

    Source: Szegedy et al., Going deeper with convolutions (2015), section 6.
    """
    width, height = picture.size
    for _ in range(10):
        area, ratio = width * height * rng.uniform(smallest, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, math.ceil(height * 4 / 3)), min(height, math.ceil(width * 4 / 3))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return picture.resize(size, Resampling.BICUBIC, box=(x, y, x + w, y + h))


def _affine(picture: Image, matrix: tuple[float, ...], fill: Fill) -> Image:
    return picture.transform(picture.size, Transform.AFFINE, matrix, Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(picture: Image, level: float, _: Fill) -> Image:
    added = int(110 * abs(level))
    return picture.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


# Each takes an image, a level from -1 to 1 (the absolute value is the strength, the sign the direction, if any) and the
# fill color.
OPERATIONS: dict[str, Callable[[Image, float, Fill], Image]] = {
    "autocontrast": lambda picture, level, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, level, fill: ImageOps.equalize(picture),
    "invert": lambda picture, level, fill: ImageOps.invert(picture),
    "rotate": lambda picture, level, fill: picture.rotate(30 * level, Resampling.BICUBIC, fillcolor=fill),
    "posterize": lambda picture, level, fill: ImageOps.posterize(picture, max(1, 4 - int(4 * abs(level)))),
    "solarize": lambda picture, level, fill: ImageOps.solarize(picture, 256 - int(256 * abs(level))),
    "solarize_add": _solarize_add,
    "color": lambda picture, level, fill: ImageEnhance.Color(picture).enhance(1 + 0.9 * level),
    "contrast": lambda picture, level, fill: ImageEnhance.Contrast(picture).enhance(1 + 0.9 * level),
    "brightness": lambda picture, level, fill: ImageEnhance.Brightness(picture).enhance(1 + 0.9 * level),
    "sharpness": lambda picture, level, fill: ImageEnhance.Sharpness(picture).enhance(1 + 0.9 * level),
    "shear_x": lambda picture, level, fill: _affine(picture, (1, 0.3 * level, 0, 0, 1, 0), fill),
    "shear_y": lambda picture, level, fill: _affine(picture, (1, 0, 0, 0.3 * level, 1, 0), fill),
    "translate_x": lambda picture, level, fill: _affine(picture, (1, 0, 0.45 * level * picture.width, 0, 1, 0), fill),
    "translate_y": lambda picture, level, fill: _affine(picture, (1, 0, 0, 0, 1, 0.45 * level * picture.height), fill),
}


def rand_augment(picture: Image, magnitude: float, deviation: float, fill: Fill, rng: np.random.Generator) -> Image:
    """Draw two operations with replacement and apply each with probability 1/2 at a level of N(magnitude, deviation²).

    Levels are clamped to [0, 10]; 10 is the strongest change.

    Source: Cubuk et al., RandAugment (2020), with the random levels and the probability 1/2 of the ConvNeXt training.
    """
    for name in rng.choice(list(OPERATIONS), size=2):
        if rng.random() < 0.5:
            level = float(np.clip(rng.normal(magnitude, deviation), 0, 10)) / 10
            picture = OPERATIONS[name](picture, level * rng.choice((-1, 1)), fill)
    return picture
