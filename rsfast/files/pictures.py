"""How a stored picture becomes r x r pixels in RGB: the rule of validation and of deployment."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["BILINEAR", "VAL_CROPS", "VAL_SCALE", "as_rgb", "cut", "val_geometry"]

VAL_CROPS = ("center", "none")
VAL_SCALE = 0.875  # share of the shorter side that the centre crop keeps
BILINEAR = Image.Resampling.BILINEAR  # Pillow's, which is antialiased


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, as it is stored: see `rsfast.files.orientation` for EXIF's."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def val_geometry(
    sizes: np.ndarray, resolution: int, crop: str, scale: float = VAL_SCALE
) -> tuple[np.ndarray, np.ndarray]:
    """Where validation images are cut, as the authors' pipeline has it.

    Args:
        sizes: [n, 2] int64 height and width in pixels.
        resolution: r, of the result.
        crop: "center" resizes the shorter side to int(r / scale) and cuts the centre; "none"
            resizes the whole image to r x r.
        scale: share of the shorter side that the centre crop keeps.

    Returns:
        [n, 2] height and width that the whole image is resized to, and [n, 2] top and left of the
        r x r crop out of it.
    """
    if crop == "none":
        return np.full_like(sizes, resolution), np.zeros_like(sizes)
    shorter = int(resolution / scale)
    resized = shorter * sizes // sizes.min(axis=1, keepdims=True)
    return resized, np.rint((resized - resolution) / 2).astype(np.int64)


def cut(
    image: Image.Image, resized: np.ndarray, corner: np.ndarray, resolution: int
) -> Image.Image:
    """The r x r crop at a corner (top, left) of the image resized to (height, width)."""
    height, width = resized.tolist()
    top, left = corner.tolist()
    box = (left, top, left + resolution, top + resolution)
    return image.resize((width, height), BILINEAR).crop(box)
