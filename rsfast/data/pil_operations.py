"""RandAugment's operations by Pillow: the oracle of what they mean, but for equalize."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from rsfast.data.operations import (
    OPERATIONS,
    Operations,
    is_geometric,
    posterize_mask,
    solarize_threshold,
    source_matrix,
)

__all__ = ["operate", "operated"]

_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


def operated(image: Image.Image, operations: Operations, n: int) -> Image.Image:
    """An RGB picture after the operations of the n-th image."""
    for number, amount in zip(operations.numbers[n], operations.amounts[n], strict=True):
        image = operate(image, OPERATIONS[number], float(amount), operations.magnitude)
    return image


def operate(image: Image.Image, name: str, amount: float, magnitude: int) -> Image.Image:
    """An RGB picture after one operation; what comes from outside it is black.

    Args:
        image: the picture.
        name: of OPERATIONS.
        amount: as in `Operations`.
        magnitude: of those without an amount.
    """
    if is_geometric(name):
        matrix = source_matrix(name, amount, image.height, image.width)
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            tuple(matrix.flatten().tolist()),
            Image.Resampling.NEAREST,
        )
    if name in _ENHANCERS:
        return _ENHANCERS[name](image).enhance(amount)
    if name == "posterize":
        mask = posterize_mask(magnitude)
        return image.point([value & mask for value in range(256)] * 3)
    if name == "solarize":
        threshold = solarize_threshold(magnitude)
        return image.point([v if v < threshold else 255 - v for v in range(256)] * 3)
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    return _equalized(image) if name == "equalize" else image


def _equalized(image: Image.Image) -> Image.Image:
    """By OpenCV's formula, which is DALI's: Pillow's own leaves small pictures nearly as they are.

    The darkest value becomes 0, the brightest 255, and the others what their rank says.
    """
    table: list[int] = []
    for counts in np.array(image.histogram()).reshape(3, 256):
        first = int(np.flatnonzero(counts)[0])
        rest = image.width * image.height - counts[first]
        if rest == 0:  # one value only stays as it is
            table += range(256)
            continue
        ranks = np.maximum(np.cumsum(counts) - counts[first], 0).astype(np.float32)
        table += np.rint(ranks * (np.float32(255.0) / np.float32(rest))).astype(int).tolist()
    return image.point(table)
