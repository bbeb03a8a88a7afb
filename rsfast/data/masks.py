"""Masks of segmentation: what a pixel's number means, how a file is read and how it is resized.

A mask is a PNG file of 8-bit grey whose values are class numbers. Both loaders read the same values
and resize by the same integers: pixel i of r takes the source pixel in which its centre lies,

    floor((2 i + 1) * h / (2 r))

of a window of h pixels, so a centre on the border of two pixels takes the later one. No rounding of
a decoder or of a device comes between, and a flip mirrors the result.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from rsfast.data.index import ImageIndex, check_size, exclude_command

__all__ = ["IGNORE_LABEL", "MAX_CLASSES", "decode_mask", "digest_of", "nearest"]

IGNORE_LABEL = 255
MAX_CLASSES = 255  # 255 is never a class


def digest_of(images: ImageIndex, masks: ImageIndex | None) -> str:
    """A name for the images of a split and for the pixels of their masks, which are their labels.

    Args:
        images: of the split.
        masks: of the same images in the same order; None where there are no files.
    """
    return images.digest if masks is None else f"{images.digest}+{masks.digest}"


def decode_mask(images: ImageIndex, masks: ImageIndex, position: int) -> np.ndarray:
    """[H, W] uint8 class numbers of one image.

    Args:
        images: of the split.
        masks: of the same images in the same order.
        position: of both.

    Raises:
        RuntimeError: naming the mask that cannot be read, is of another size than it was, or cannot
            be decoded; and what to do about it.
    """
    encoded = masks.read(position)
    try:
        with Image.open(io.BytesIO(encoded)) as file:
            if file.mode != "L":
                raise ValueError(f"its pixels are {file.mode} and not class numbers in 8-bit grey")
            size = (file.height, file.width)
            known = size == tuple(masks.sizes[position].tolist())
            labels = np.array(file) if known else None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged content
        raise RuntimeError(
            f"cannot decode mask {masks.name(position)}: {str(error) or type(error).__name__}; to "
            f"leave its image out: {exclude_command(images.known_as, images.name(position))}"
        ) from error
    check_size(masks, position, size)
    assert labels is not None
    return labels


def nearest(
    mask: np.ndarray, window: tuple[int, int, int, int], resolution: int, *, flip: bool, fill: int
) -> np.ndarray:
    """Resizes a window of a mask to a square by nearest neighbour.

    Args:
        mask: [H, W] uint8.
        window: top, left, height, width in pixels; it may reach beyond the mask.
        resolution: r.
        flip: mirror the result horizontally.
        fill: what lies beyond the mask.

    Returns:
        [r, r] uint8.
    """
    top, left, height, width = window
    centres = 2 * np.arange(resolution, dtype=np.int64) + 1
    rows = top + centres * height // (2 * resolution)
    columns = left + centres * width // (2 * resolution)
    down, across = _inside(rows, mask.shape[0]), _inside(columns, mask.shape[1])
    result = np.full((resolution, resolution), fill, dtype=np.uint8)
    # Whole rows are cheap to copy, so they come first.
    result[down, across] = mask[rows[down]][:, columns[across]]
    return result[:, ::-1] if flip else result


def _inside(places: np.ndarray, length: int) -> slice:
    """Which of some ascending places are in [0, length)."""
    first, last = np.searchsorted(places, (0, length))
    return slice(int(first), int(last))
