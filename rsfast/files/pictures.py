"""How a stored picture becomes r x r pixels in RGB: the rule of validation and of deployment."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops

__all__ = [
    "BILINEAR",
    "LEVEL_MODES",
    "VAL_CROPS",
    "VAL_SCALE",
    "as_rgb",
    "cut",
    "nearest_pixels",
    "thin_parts",
    "val_geometry",
]

VAL_CROPS = ("center", "none")
# Where the pixels of a resolution come from: the image, or the picture of the largest resolution.
LEVEL_MODES = ("resize", "nearest")
VAL_SCALE = 0.875  # share of the shorter side that the centre crop keeps
# Of images that are longer than so many times their shorter side, only the part that is cut is
# resized: a row of 20000 pixels would need 4 GB for 224 px.
_THIN = 16
BILINEAR = Image.Resampling.BILINEAR  # Pillow's, which is antialiased


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, as it is stored: see `rsfast.files.orientation` for EXIF's."""
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for one of Adobe's, which hold the negative; libjpeg's users,
        # DALI among them, only those that say so.
        image = ImageChops.invert(image)
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
    size = np.array([[image.height, image.width]])
    thin, start, end = thin_parts(size, resized[None], corner[None], resolution)
    if thin.any():
        (upper, first), (lower, last) = start[0].tolist(), end[0].tolist()
        part = (first, upper, last, lower)
        return image.resize((resolution, resolution), BILINEAR, box=part)
    box = (left, top, left + resolution, top + resolution)
    return image.resize((width, height), BILINEAR).crop(box)


def nearest_pixels(side: int, resolution: int) -> np.ndarray:
    """Which pixels along a side of a picture make a smaller one, by nearest neighbour.

    They are floor(i * side / r), the rule of TensorFlow 1, in whole numbers. TensorFlow computes in
    float32, whose product can fall short of a whole number: of a picture of 224 pixels it takes the
    one before in 3 of 192 and in 3 of 96 places along a side.

    Args:
        side: of the picture, in pixels.
        resolution: r, of the smaller one.

    Returns:
        [r] int64.
    """
    return np.arange(resolution, dtype=np.int64) * side // resolution


def thin_parts(
    sizes: np.ndarray, resized: np.ndarray, corners: np.ndarray, resolution: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which images are so thin that only a part of them is to be resized, and the part of each.

    The pixels are those of the whole image resized and cut, but for rounding.

    Args:
        sizes: [n, 2] height and width in pixels.
        resized: [n, 2] height and width that the whole image is resized to.
        corners: [n, 2] top and left of the crop out of that.
        resolution: r, of the crop.

    Returns:
        [n] bool, and [n, 2] float64 top and left, bottom and right of the part in pixels of the
        image: of thin images what becomes the crop, of others the whole.
    """
    thin = resized.max(axis=1) > _THIN * np.maximum(resized.min(axis=1), resolution)
    scale = sizes / resized
    start = np.where(thin[:, None], corners * scale, 0.0)
    end = np.where(thin[:, None], (corners + resolution) * scale, sizes)
    return thin, start, np.minimum(end, sizes)
