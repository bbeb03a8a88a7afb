"""Judges one file: whether both loaders can decode it, and what is odd about it."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from rsfast.data.comparing import compare
from rsfast.data.formats import EXTENSIONS, FORMAT_OF, is_supported
from rsfast.files.pictures import as_rgb

__all__ = ["TINY_PX", "UNREAD", "check_png_end", "judge_content", "judge_image", "judge_other"]

TINY_PX = 8  # a shorter side below this is odd
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM")  # how files of the used formats begin
UNREAD = "cannot be read"  # such files are looked at again by every check


def judge_image(path: str) -> tuple[tuple[int, int], str, str]:
    """Size in pixels, kind and reason of a file that is an image by name."""
    try:
        mode = os.stat(path)
        if not stat.S_ISREG(mode.st_mode):
            return (0, 0), "bad", "no regular file"
        if mode.st_size == 0:
            return (0, 0), "bad", "empty file"
        with open(path, "rb") as stream:
            return judge_content(path, stream)
    except OSError as error:
        return (0, 0), "bad", _reason(None, error)


def judge_content(path: str, stream: BinaryIO) -> tuple[tuple[int, int], str, str]:
    """The same of a file that is open, or of the content of one that lies in an archive."""
    size = (0, 0)
    try:
        with Image.open(stream) as image:
            if not is_supported(image):
                return size, "bad", f"{_kind(image)}, which the loaders do not decode"
            size = (image.height, image.width)
            odd = _oddities(path, image)
            picture = _decode(image)
        _check_for_dali(stream, image.format)
        if reason := _told_apart(stream, image, picture):
            return size, "bad", reason
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged content
        return size, "bad", _reason(stream, error)
    return size, "odd" if odd else "", "; ".join(odd)


def _kind(image: Image.Image) -> str:
    """Of images of some kind or other, the mode matters, too."""
    mode = f" in mode {image.mode}" if image.format in FORMAT_OF.values() else ""
    return f"{image.format} image{mode}"


def _decode(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "P" and image.palette is None:
        raise ValueError("palette image without a palette")
    return as_rgb(image)


def _told_apart(stream: BinaryIO, image: Image.Image, picture: Image.Image) -> str:
    """Why DALI does not decode the file alike, or nothing.

    JPEGs in grey or YCbCr are left out: libjpeg decodes them for both, and to compare them would
    double the time of a check.
    """
    if image.format in ("JPEG", "MPO") and image.mode != "CMYK":
        return ""
    stream.seek(0)
    return compare(stream.read(), np.asarray(picture))


def _oddities(path: str, image: Image.Image) -> list[str]:
    extension = next((end for end in EXTENSIONS if path.lower().endswith(end)), None)
    known_as = "JPEG" if image.format == "MPO" else image.format
    limit = Image.MAX_IMAGE_PIXELS or image.width * image.height
    odd = {
        "CMYK image": image.mode == "CMYK",
        f"{known_as} image under the extension {extension}": extension is not None
        and FORMAT_OF[extension] != known_as,
        f"tiny image of {image.width} x {image.height} pixels": min(image.size) < TINY_PX,
        f"huge image of {image.width} x {image.height} pixels": image.width * image.height > limit,
    }
    return [reason for reason, applies in odd.items() if applies]


def _check_for_dali(stream: BinaryIO, image_format: str | None) -> None:
    """Raises an error if DALI would refuse a file that Pillow decodes."""
    if image_format == "PNG":
        check_png_end(stream)
    elif image_format in ("JPEG", "MPO"):
        _check_jpeg_segments(stream)
    elif image_format == "WEBP":
        _check_webp_chunks(stream)


def check_png_end(stream: BinaryIO) -> None:
    """Raises an error of checksums and of a missing end, which libpng refuses and Pillow not."""
    stream.seek(0)
    with Image.open(stream) as image:
        image.verify()  # up to and including the name of the last chunk
    stream.seek(-8, os.SEEK_CUR)
    end = stream.read(12)  # length, name and checksum
    if len(end) < 12:
        raise ValueError("truncated PNG file")
    if end[:4] != bytes(4):
        raise ValueError("the last chunk of the PNG file is damaged")


def _check_jpeg_segments(stream: BinaryIO) -> None:
    """Pillow skips bytes between the segments before the picture; nvImageCodec does not."""
    stream.seek(2)
    marker = b""
    while marker != b"\xff\xda":  # start of the picture
        marker = stream.read(2)
        while marker == b"\xff\xff":  # padding
            marker = b"\xff" + stream.read(1)
        length = int.from_bytes(stream.read(2), "big")
        if marker[:1] != b"\xff" or marker[1:] < b"\xc0" or length < 2:
            raise ValueError("stray bytes between the segments of the JPEG file")
        stream.seek(length - 2, os.SEEK_CUR)


def _check_webp_chunks(stream: BinaryIO) -> None:
    """nvImageCodec forgets the byte behind chunks of odd length on its way to the EXIF data."""
    stream.seek(12)
    is_odd = False
    while len(head := stream.read(8)) == 8:
        if head[:4] == b"EXIF" and is_odd:
            raise ValueError("EXIF data behind a chunk of odd length in the WebP file")
        length = int.from_bytes(head[4:], "little")
        is_odd |= length % 2 == 1
        stream.seek(length + length % 2, os.SEEK_CUR)


def _reason(stream: BinaryIO | None, error: Exception) -> str:
    """Why a file is bad, in a few words."""
    text = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError) and stream is not None:
        with contextlib.suppress(OSError):
            stream.seek(0)
            if stream.read(4).startswith(_MAGIC):
                return "damaged or cut-off header"
        return "no image"
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb: {text}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{UNREAD}: {error.strerror}"
    return text if "truncated" in text.lower() else f"cannot be decoded: {text}"


def judge_other(path: str) -> tuple[tuple[int, int], str, str]:
    """Whether a file that is no image by name is one by its first bytes."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return (0, 0), "", ""
        with Image.open(path) as image:
            # Stubs stand for scientific formats, which Pillow knows but does not decode.
            if isinstance(image, ImageFile.StubImageFile):
                return (0, 0), "", ""
            reason = f"{image.format} image under another extension than {' '.join(EXTENSIONS)}"
            return (0, 0), "unused", reason
    except Exception:  # no image, or none that can be read
        return (0, 0), "", ""
