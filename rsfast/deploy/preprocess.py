"""Pictures to the input of an exported network, pixel by pixel what validation has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rsfast.deploy.manifest import Manifest

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["check_contract", "normalised", "preprocess"]

_KNOWN = {
    "crop": ("center", "none"),
    "exif": ("ignore", "honour"),
    "levels": ("resize", "nearest"),
    "filter": ("bilinear",),
    "input_dtype": ("float32", "uint8"),
}


def check_contract(manifest: Manifest) -> None:
    """Raises ValueError if the network wants pictures to be prepared in another way."""
    for name, known in _KNOWN.items():
        value = getattr(manifest, name)
        if value not in known:
            raise ValueError(f"the network's {name} must be one of {known}, got {value!r}")


def preprocess(images: Sequence[Image.Image], resolution: int, manifest: Manifest) -> np.ndarray:
    """Resizes, cuts and, where the graph does not do it, normalises.

    Args:
        images: N pictures of Pillow, of any size and mode.
        resolution: r, in pixels.
        manifest: of the network: orientation, crop, scale, levels, normalisation, dtype.

    Returns:
        [N, 3, r, r] contiguous; float32, (value / 255 - mean) / std, or uint8.

    Raises:
        ValueError: if these are no pictures, or none.
        ImportError: if Pillow is absent.
    """
    try:
        from rsfast.files import orientation, pictures
    except ImportError as error:
        raise ImportError("preprocess needs Pillow: pip install pillow") from error
    _check(images, pictures.Image.Image)
    if manifest.exif == "honour":
        images = [orientation.upright(image) for image in images]
    made = resolution
    if manifest.levels == "nearest":
        made = max(resolution, manifest.source_resolution)
    pixels = np.empty((len(images), made, made, 3), dtype=np.uint8)
    sizes = np.array([(image.height, image.width) for image in images], dtype=np.int64)
    geometry = pictures.val_geometry(sizes, made, manifest.crop, manifest.scale)
    for n, (image, resized, corner) in enumerate(zip(images, *geometry, strict=True)):
        pixels[n] = np.asarray(pictures.cut(pictures.as_rgb(image), resized, corner, made))
    if made > resolution:
        picked = pictures.nearest_pixels(made, resolution)
        pixels = pixels[:, picked[:, None], picked]
    return normalised(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), manifest)


def normalised(planes: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Pixels as the graph takes them.

    Args:
        planes: [N, 3, r, r] uint8.
        manifest: of the network: normalisation, dtype.

    Returns:
        [N, 3, r, r] float32, (value / 255 - mean) / std, or the planes where the graph does that.
    """
    if manifest.input_dtype == "uint8":
        return planes
    # One product and one sum, as rsfast.kernels.normalize has it: the same float32 numbers.
    mean, std = np.array(manifest.mean), np.array(manifest.std)
    scale, shift = 1.0 / (255.0 * std), -mean / std
    values = planes.astype(np.float32)
    values *= scale.astype(np.float32)[:, None, None]
    values += shift.astype(np.float32)[:, None, None]
    return values


def _check(images: Sequence[object], picture: type) -> None:
    if not isinstance(images, list | tuple) or not images:
        shown = "none" if isinstance(images, list | tuple) else type(images).__name__
        raise ValueError(f"images must be a list of pictures of Pillow, at least one, got {shown}")
    for image in images:
        if not isinstance(image, picture):
            raise ValueError(
                "images must be pictures of Pillow, which PIL.Image.open makes of files, got "
                f"{image!r:.80}"
            )
