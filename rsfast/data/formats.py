"""Which images belong to a data set: those that every loader decodes, to the same pixels.

One rule for all loaders, so that an index, and with it a training, an evaluation and an export,
does not depend on the loader.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

from PIL import Image, ImageFile, TiffImagePlugin

__all__ = ["EXTENSIONS", "FORMAT_OF", "is_supported", "unread"]

# Pillow's names of what every loader can decode, by the extension it usually has.
FORMAT_OF = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
}
EXTENSIONS = tuple(FORMAT_OF)
_WHOLLY = {"JPEG", "MPO", "PNG", "WEBP", "BMP"}  # whatever the file is called; MPO is JPEG
_TIFF_MODES = {"L", "P", "RGB", "RGBA", "CMYK"}
_BITS_PER_SAMPLE, _ORIENTATION = 258, 274  # tags of TIFF
# Extensions of other pictures, which no loader, or only one, decodes.
_UNREAD = frozenset(
    (
        *(".gif", ".apng", ".avif", ".avifs", ".heic", ".heif", ".jxl"),
        *(".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".tga", ".ico", ".psd", ".pcx", ".dds"),
        *(".exr", ".hdr", ".pfm", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"),
    )
)


def is_supported(image: Image.Image) -> bool:
    """Whether every loader decodes this image to the same pixels, as far as its header says."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))
        # Pillow turns a TIFF image as its orientation says; no other image is turned.
        upright = image.tag_v2.get(_ORIENTATION, 1) == 1
        return image.mode in _TIFF_MODES and set(bits) == {8} and upright
    if image.format == "PPM" and isinstance(image, ImageFile.ImageFile):
        return image.mode == "1" or (image.mode in ("L", "RGB") and _has_whole_bytes(image))
    return image.format in _WHOLLY


def _has_whole_bytes(image: ImageFile.ImageFile) -> bool:
    """Whether 255 is the largest value of a PPM image; DALI does not scale others."""
    decoder, _, _, arguments = image.tile[0]
    return decoder == "raw" or (isinstance(arguments, tuple) and arguments[-1] == 255)


def unread(paths: Iterable[str]) -> str:
    """The files among these that are images by name which not every loader reads, in words.

    Returns:
        Such as "3 .gif, 1 .avif", the most frequent first; empty if there is none.
    """
    endings = (os.path.splitext(path)[1].lower() for path in paths)
    counts = Counter(ending for ending in endings if ending in _UNREAD)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common())
