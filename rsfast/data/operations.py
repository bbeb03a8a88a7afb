"""RandAugment's operations and their draws: what each loader renders by its own means.

The fourteen operations and their ranges are those of torchvision's RandAugment: strength m of 30.
Both loaders take parameters and matrices from here, and draw nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

__all__ = [
    "LARGEST_MAGNITUDE",
    "OPERATIONS",
    "Operations",
    "draw_operations",
    "is_geometric",
    "posterize_mask",
    "solarize_threshold",
    "source_matrix",
]

LARGEST_MAGNITUDE = 30
OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# At magnitude 30: shear in pixels per pixel, translation in shares of the side, degrees, and what
# the factor of an enhancement differs from 1 by.
_STRONGEST = {
    **dict.fromkeys(("shear_x", "shear_y"), 0.3),
    **dict.fromkeys(("translate_x", "translate_y"), 150.0 / 331.0),
    "rotate": 30.0,
    **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), 0.9),
}


class Operations(NamedTuple):
    """What is done to each image, one operation after another.

    Attributes:
        numbers: [N, k] int64 positions in OPERATIONS.
        amounts: [N, k] float64: shear, translation and rotation as in `source_matrix`; the factor
            of brightness, color, contrast and sharpness; 0 for the others.
        magnitude: of all, in [0, 30].
    """

    numbers: np.ndarray
    amounts: np.ndarray
    magnitude: int


def draw_operations(
    rng: np.random.Generator, count: int, number: int, magnitude: int
) -> Operations:
    """Draws `number` operations for each of `count` images, each of the fourteen alike likely.

    Operations with two directions take either with probability 1/2.
    """
    numbers = rng.integers(0, len(OPERATIONS), (count, number))
    signs = np.where(rng.random((count, number)) < 0.5, -1.0, 1.0)
    strongest = np.array([_STRONGEST.get(name, 0.0) for name in OPERATIONS])
    around_one = np.array([name in _STRONGEST and not is_geometric(name) for name in OPERATIONS])
    amounts = strongest[numbers] * (magnitude / LARGEST_MAGNITUDE) * signs + around_one[numbers]
    return Operations(numbers, amounts, magnitude)


def is_geometric(name: str) -> bool:
    """Whether the operation moves pixels, by a matrix."""
    return name in _GEOMETRIC


def posterize_mask(magnitude: int) -> int:
    """Of the bits that posterize keeps: all 8 at magnitude 0, 4 at 30."""
    bits = 8 - round(magnitude / (LARGEST_MAGNITUDE / 4))
    return 0xFF & ~((1 << (8 - bits)) - 1)


def solarize_threshold(magnitude: int) -> float:
    """From which value on solarize inverts: 255 at magnitude 0, 0 at 30."""
    return 255.0 * (1.0 - magnitude / LARGEST_MAGNITUDE)


def source_matrix(name: str, amount: float, height: int, width: int) -> np.ndarray:
    """Where in a picture the pixels of the moved one come from.

    Args:
        name: of an operation; for one that moves nothing the matrix is that of the identity.
        amount: pixels per pixel that a shear moves by, from the upper left corner on; share of the
            side that a translation moves by, cut to whole pixels; degrees against the clock of a
            rotation about the centre.
        height, width: of the picture, in pixels.

    Returns:
        [2, 3] float64: (x, y, 1) of a pixel's centre to (x, y) in the source.
    """
    matrix = np.eye(2, 3)
    if name == "shear_x":
        matrix[0, 1] = -amount
    elif name == "shear_y":
        matrix[1, 0] = -amount
    elif name == "translate_x":
        matrix[0, 2] = -int(amount * width)
    elif name == "translate_y":
        matrix[1, 2] = -int(amount * height)
    elif name == "rotate":
        cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        x, y = width / 2, height / 2
        matrix[:] = (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)
    return matrix
