"""What several test files need."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = [
    "FOR_DALI",
    "JPEG",
    "PNG",
    "SPECIMENS",
    "cut",
    "encoded",
    "make_image_folder",
    "make_pair_folder",
    "mask_of_cells",
    "smooth_image",
    "environment",
    "torchrun",
]


def smooth_image(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """An RGB picture with structure at several scales and no pixel noise.

    Smooth, so that the same picture made at two resolutions can be compared; rich enough that two
    crops of it, or a crop and its mirror image, are told apart.
    """
    picture = np.zeros((height, width, 3))
    for cells, contrast in ((3, 60.0), (9, 40.0), (30, 30.0)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layer = grid.resize((width, height), Image.Resampling.BICUBIC)
        picture += contrast / 64.0 * (np.asarray(layer, dtype=np.float64) - 128.0)
    return Image.fromarray(np.clip(np.rint(picture + 128.0), 0, 255).astype(np.uint8))


def make_image_folder(
    root: str | Path,
    classes: Sequence[str] = ("cat", "dog"),
    train: int = 6,
    val: int = 4,
    size: tuple[int, int] = (90, 70),
    seed: int = 0,
) -> Path:
    """Writes JPEGs to root/train/<class>/0000.jpg ... and root/val/<class>/0000.jpg ...

    Args:
        root: folder to fill; made if absent.
        classes: names of the class folders.
        train, val: images per class; with 0 the class folders stay empty.
        size: (height, width) in pixels around which the images vary: each side by up to a fifth.
        seed: of contents and sizes. The same arguments write the same files.

    Returns:
        root.
    """
    root = Path(root)
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                height, width = np.rint(size * rng.uniform(0.8, 1.2, 2)).astype(int)
                image = smooth_image(int(height), int(width), rng)
                image.save(folder / f"{number:04d}.jpg", quality=90)
    return root


def mask_of_cells(
    height: int, width: int, rng: np.random.Generator, labels: Sequence[int]
) -> np.ndarray:
    """[H, W] uint8, some of these labels in areas of many sizes."""
    cells = rng.choice(np.array(labels, dtype=np.uint8), (7, 9))
    image = Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)
    return np.array(image)


def make_pair_folder(
    root: str | Path,
    num_classes: int = 4,
    train: int = 6,
    val: int = 4,
    size: tuple[int, int] = (70, 90),
    seed: int = 0,
    ignore_label: int = 255,
) -> Path:
    """Writes a data set of segmentation: images, masks beside them, no classes.txt.

    Even images lie in the folder of the split, odd ones in a sub-folder; all are JPEG files, two
    called .jpg and two .jpeg in turn. Masks have all classes, and some ignored pixels.

    Args:
        root: folder to fill; made if absent.
        num_classes: labels are from 0 to num_classes - 1.
        train, val: images.
        size: (height, width) in pixels around which the images vary: each side by up to a fifth.
        seed: of contents and sizes. The same arguments write the same files.
        ignore_label: of ignored pixels.

    Returns:
        root.
    """
    root = Path(root)
    rng = np.random.default_rng(seed)
    labels = [*range(num_classes), ignore_label]
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            inner = "town" if number % 2 else ""
            images, masks = root / split / inner, root / f"{split}annot" / inner
            for folder in (images, masks):
                folder.mkdir(parents=True, exist_ok=True)
            height, width = (int(side) for side in np.rint(size * rng.uniform(0.8, 1.2, 2)))
            image = smooth_image(height, width, rng)
            image.save(images / f"{number:04d}.{('jpg', 'jpeg')[number // 2 % 2]}", quality=90)
            mask = mask_of_cells(height, width, rng, labels)
            mask.flat[: len(labels)] = labels
            Image.fromarray(mask).save(masks / f"{number:04d}.png")
    return root


def torchrun(*arguments: str, folder: Path, expect: int = 0, restarts: int = 0) -> str:
    """Runs a script or module in two processes; returns what they print, errors included.

    Args:
        arguments: of torchrun: the script, or -m and the module, and its arguments.
        folder: to run in.
        expect: torchrun's exit code.
        restarts: how often both are started again when one has failed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, f"--max-restarts={restarts}", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    said = done.stdout + done.stderr
    assert done.returncode == expect, f"exit code {done.returncode}: {said}"
    return said


def environment() -> dict[str, str]:
    """Of processes that share two cores, one thread each, and find what tests share (tiny.py)."""
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cut(file: Path) -> Path:
    """Leaves the end of a JPEG away, but not so much that its header is damaged."""
    file.write_bytes(file.read_bytes()[:-200])
    return file


PICTURE = smooth_image(60, 80, np.random.default_rng(7))
JPEG, PNG = encoded(PICTURE, "JPEG"), encoded(PICTURE, "PNG")
WEBP, BMP = encoded(PICTURE, "WEBP"), encoded(PICTURE, "BMP")
EXIF = Image.Exif()
EXIF[0x0112] = 6
LOSSLESS = encoded(PICTURE, "WEBP", lossless=True, exif=EXIF, icc_profile=bytes(3))
# Of odd length are the pixels of this one.
ODD_WEBP = encoded(PICTURE.crop((0, 0, 80, 59)), "WEBP", lossless=True, exif=EXIF)
TABLE = JPEG.index(b"\xff\xdb")  # a segment before the picture
DATA = PNG.index(b"IDAT")  # its name, with the length before it
CHECKSUM = DATA + 4 + int.from_bytes(PNG[DATA - 4 : DATA], "big")

# File name to its content, and kind and reason that the check should give it.
SPECIMENS: dict[str, tuple[bytes, str, str]] = {
    "empty.jpg": (b"", "bad", "empty file"),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "bad", "truncated"),
    "without_end.jpg": (JPEG[:-2], "bad", "truncated"),
    "junk.jpg": (bytes(range(1, 200)), "bad", "no image"),
    "header_only.jpg": (b"\xff\xd8\xff\xe0", "bad", "header"),
    "text.jpg": (b"a cat, in words\n", "bad", "no image"),
    "gif.jpg": (encoded(PICTURE, "GIF"), "bad", "GIF image, which the loaders do not decode"),
    "truncated.png": (PNG[: len(PNG) // 2], "bad", "truncated"),
    "damaged.png": (PNG.replace(PNG[DATA + 99 : DATA + 109], bytes(10)), "bad", "decoded"),
    "truncated.webp": (WEBP[:-50], "bad", "decoded"),
    "truncated.bmp": (BMP[:-50], "bad", "truncated"),
    "png.jpg": (PNG, "odd", r"PNG image under the extension \.jpg"),
    "jpeg.png": (JPEG, "odd", r"JPEG image under the extension \.png"),
    "cmyk.jpg": (encoded(PICTURE.convert("CMYK"), "JPEG"), "odd", "CMYK"),
    "pixel.jpg": (encoded(PICTURE.resize((1, 1)), "JPEG"), "odd", "tiny image of 1 x 1 pixels"),
    "low.png": (encoded(PICTURE.resize((40, 7)), "PNG"), "odd", "tiny image of 40 x 7 pixels"),
    "jpeg.txt": (JPEG, "unused", "JPEG image under another extension"),
    "gif.gif": (encoded(PICTURE, "GIF"), "unused", "GIF image under another extension"),
}
# Files that Pillow decodes and DALI refuses.
FOR_DALI: dict[str, tuple[bytes, str]] = {
    "stray_bytes.jpg": (JPEG[:TABLE] + b"\0" + JPEG[TABLE:], "stray bytes"),
    "without_end.png": (PNG[:-12], "truncated"),
    "without_checksum.png": (PNG[:-1], "truncated"),
    "long_end.png": (PNG[:-9] + b"\1" + PNG[-8:], "last chunk"),
    "exif.webp": (LOSSLESS, "EXIF data behind a chunk of odd length"),
    "odd_before_exif.webp": (ODD_WEBP, "EXIF data behind a chunk of odd length"),
    "wrong_checksum.png": (PNG[:CHECKSUM] + bytes(4) + PNG[CHECKSUM + 4 :], "checksum in b'IDAT'"),
}
