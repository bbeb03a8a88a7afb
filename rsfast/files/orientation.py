"""Which way up a picture is to be shown, as EXIF says it.

The rule is DALI's, so that all loaders turn the same files: the 16 bits of the entry's value count
whatever its type says, and XMP's do not. Of a JPEG file with several EXIF segments DALI makes
nothing that can be relied on, if they differ.
"""

from __future__ import annotations

import struct

from PIL import Image

__all__ = ["EXIF_MODES", "is_contradictory", "orientation", "shown_size", "upright"]

EXIF_MODES = ("ignore", "honour")
_ORIENTATION = 0x0112
_PREFIX = b"Exif\0\0"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """From 1, as it is stored, to 8; from 5 on, height and width change places.

    Reads headers only. Without an orientation, or with one that there is not, it is 1.
    """
    exif = image.info.get("exif", b"")
    if not exif and image.format == "PNG" and getattr(image, "fp", None) is not None:
        exif = _png_chunk(image)
    return _parsed(exif) if isinstance(exif, bytes) else 1


def is_contradictory(image: Image.Image) -> bool:
    """Whether it is of a JPEG file whose EXIF segments have different orientations."""
    segments = getattr(image, "applist", ())
    found = {_parsed(part) for name, part in segments if name == "APP1" and part[:6] == _PREFIX}
    return len(found) > 1


def upright(image: Image.Image) -> Image.Image:
    """The picture the way up it is to be shown, and then without EXIF; itself if it is so."""
    turn = _TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format  # says how the colours of CMYK are meant
    turned.info.pop("exif", None)
    return turned


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels, the way up it is to be shown; reads headers only."""
    lies = orientation(image) >= 5
    return (image.width, image.height) if lies else (image.height, image.width)


def _png_chunk(image: Image.Image) -> bytes:
    """The EXIF of a PNG file that has it behind the pixels, where Pillow has not been yet."""
    stream = image.fp  # type: ignore[attr-defined]
    place = stream.tell()
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length, name = int.from_bytes(head[:4], "big"), head[4:]
            if name == b"eXIf":
                return stream.read(length)
            stream.seek(length + 4, 1)  # and its checksum
        return b""
    finally:
        stream.seek(place)


def _parsed(exif: bytes) -> int:
    tiff = exif.removeprefix(_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(count):
            tag, value = struct.unpack_from(f"{order}H6xH", tiff, directory + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if value in _TURNS else 1
    except struct.error:  # cut off
        pass
    return 1
