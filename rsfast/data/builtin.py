"""The built-in image sets: generated, with an accuracy that rises with the input resolution.

That of segmentation is drawn by `rsfast.data.scenes`; what follows is about that of classification.

A class is one of five shapes filled with one of two fine textures, horizontal or vertical stripes
(a horizontal flip keeps both). The shape can be told at any resolution. The stripes can be told
only while their period stays above roughly 1.3 pixels of the network's input: an antialiased
resize greys out finer ones. The period is drawn log-uniformly as a share of the image's shorter
side, so the share of images that still shows its texture falls smoothly from all at 96 pixels to
about half at 32, where the other images leave a coin toss between two classes.

Nothing else tells the texture: colour, contrast, lighting, position, size, noise and JPEG settings
are drawn from the same distributions for all classes, and the stripes are a sine wave in luma
alone, which has no mean, no harmonics that alias, and no trace in the chroma planes.

Image `i` of a split is a function of (seed, split, i) only: neither the number of workers nor the
size of the split changes it. Its bytes repeat under the same numpy, Pillow and libjpeg on the same
kind of CPU (another instruction set may round a sine differently).
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rsfast.data import scenes
from rsfast.data.cache import cache_root, exists, writing
from rsfast.data.drawing import (
    Frame,
    coverage,
    frame_at,
    generator_of,
    lighting_and_noise,
    stripes,
    to_uint8,
)
from rsfast.files.progress import progress

__all__ = ["CLASS_NAMES", "builtin_root"]

# Part of the cache folder's name: raise it whenever a change below alters a pixel.
FORMAT_VERSION = 1

DEFAULT_WORKERS = 2

SHAPES = ("cross", "disc", "ring", "square", "triangle")
TEXTURES = ("horizontal", "vertical")
# Alphabetical, so that a reader which numbers sorted folders gives class k the name CLASS_NAMES[k].
CLASS_NAMES = tuple(f"{shape}_{texture}" for shape, texture in product(SHAPES, TEXTURES))

SPLITS = ("train", "val")

# (low, high) of uniform draws; lengths in pixels or shares of the shorter side, levels in 0..255.
SHORT_SIDE_PX = (144, 184)
ASPECT_RATIO = (1.0, 1.3)
SHAPE_DIAMETER = (0.58, 0.82)
STRIPE_PERIOD = (0.0165, 0.060)  # log-uniform; at least 2.4 px in the file, so JPEG keeps it
ROTATION_DEGREES = (-8.0, 8.0)
SHAPE_LUMA = (115.0, 140.0)
GROUND_CONTRAST = (45.0, 70.0)  # luma of the background against the shape's, of either sign
CHROMA_OFFSET = (-30.0, 30.0)  # per plane, independently for shape and background
JPEG_QUALITY = (88, 95)


def builtin_root(
    cache_dir: Path | None = None,
    *,
    task: str = "classification",
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Returns the folder of a built-in set, generating it on first use.

    That of classification holds `train/<class>/NNNN.jpg` and `val/<class>/NNNN.jpg`, RGB JPEGs in
    the ten classes of `CLASS_NAMES`, equally many of each. That of segmentation holds
    `train/NNNN.jpg`, `trainannot/NNNN.png`, the same of val, and `classes.txt`. A folder appears
    under its name only once it is complete, so an interrupted generation is never used, and of
    several processes that generate it at once the first one's copy stays.

    Args:
        cache_dir: where to keep the set; None means `$RSFAST_CACHE`, else
            `$XDG_CACHE_HOME/rsfast`, else `~/.cache/rsfast`.
        task: "classification" or "segmentation".
        num_train: training images, positive; of classification, a multiple of 10. None means 1600,
            or 400 of segmentation.
        num_val: the same of validation images. None means 400, or 100 of segmentation.
        seed: any integer >= 0; another seed gives other images of the same distribution.
        workers: threads; None means two. Does not change the images.

    Returns:
        `cache_dir/builtin-v<format>-<num_train>-<num_val>-<seed>`, or `builtin-scenes-v...`.

    Raises:
        ValueError: if there is no such task, a count or `workers` is not positive, a count is no
            multiple of 10 where it must be one, or `seed` is negative.
        OSError: if the cache folder cannot be written.
    """
    if task not in _SETS:
        raise ValueError(f"task must be one of {tuple(_SETS)}, got {task!r}")
    kind = _SETS[task]
    counts = {
        "num_train": kind.counts[0] if num_train is None else num_train,
        "num_val": kind.counts[1] if num_val is None else num_val,
    }
    for argument, count in counts.items():
        if count <= 0 or count % kind.multiple != 0:
            of = f" multiple of {kind.multiple}" if kind.multiple > 1 else ""
            raise ValueError(f"{argument} must be a positive{of or ' number'}, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if workers is not None and workers <= 0:
        raise ValueError(f"workers must be positive or None, got {workers}")

    cache_dir = cache_root() if cache_dir is None else Path(cache_dir)
    root = cache_dir / "-".join([kind.name, *map(str, counts.values()), str(seed)])
    if exists(root) and root.is_dir():
        return root

    # A sibling, so that the rename stays within one file system and is atomic.
    partial = cache_dir / f".{root.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with writing(cache_dir):
            kind.prepare(partial)
            jobs = dict(zip(SPLITS, counts.values(), strict=True))
            _generate(partial, kind.write, jobs, seed, workers)
            _publish(partial, root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _publish(partial: Path, root: Path) -> None:
    """Gives the complete folder its name, unless another process was first."""
    try:
        partial.rename(root)
    except OSError:
        # A folder that is not empty cannot be replaced by a rename, and a named one is complete.
        if not root.is_dir():
            raise


def _generate(
    root: Path,
    write: Callable[[Path, int, str, int], None],
    counts: dict[str, int],
    seed: int,
    workers: int | None,
) -> None:
    """Writes all images of all splits under `root`."""
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    # Threads, not processes: a process pool would import the caller's script again (spawn) or fork
    # a process in which torch already runs threads, to save one second. The default set on 2 CPU
    # cores (Xeon, 2026-11-21): 3.5 s with 1 thread, 2.9 s with 2, 3.2 s with 4, 4.5 s with 16
    # (they wait for the GIL); 2.1 s with 2 forked processes.
    with ThreadPoolExecutor(workers or DEFAULT_WORKERS) as pool:
        done = pool.map(lambda job: write(root, seed, *job), jobs)
        about = "generating the built-in set"
        for _ in progress(done, total=len(jobs), desc=about, unit="image"):
            pass


def _make_class_folders(root: Path) -> None:
    for split, name in product(SPLITS, CLASS_NAMES):
        (root / split / name).mkdir(parents=True)


def _write_image(root: Path, seed: int, split: str, index: int) -> None:
    """Draws image `index` of a split and writes it as a JPEG."""
    rng = generator_of(seed, SPLITS.index(split), index)
    name = CLASS_NAMES[index % len(CLASS_NAMES)]
    shape, texture = name.split("_")

    frame = _draw_frame(rng)
    covered = coverage(frame, shape)
    contrast = rng.uniform(*GROUND_CONTRAST) * (1.0 if rng.random() < 0.5 else -1.0)
    luma = covered * (stripes(rng, frame, texture, STRIPE_PERIOD) - contrast)
    luma += rng.uniform(*SHAPE_LUMA) + contrast + lighting_and_noise(rng, frame)
    planes = [luma]
    for _ in range(2):  # Cb, Cr
        shape_chroma, ground_chroma = rng.uniform(*CHROMA_OFFSET, size=2)
        planes.append(128.0 + ground_chroma + covered * (shape_chroma - ground_chroma))

    # Composed in the JPEG's own colour space, so that the stripes cannot leak into chroma.
    image = Image.merge("YCbCr", [Image.fromarray(to_uint8(plane)) for plane in planes])
    image.save(
        root / split / name / f"{index:04d}.jpg",
        "JPEG",
        quality=int(rng.integers(*JPEG_QUALITY, endpoint=True)),
        subsampling="4:2:0" if rng.random() < 0.5 else "4:4:4",
    )


class _Set(NamedTuple):
    """How a built-in set is made: folders first, then images one by one."""

    name: str
    counts: tuple[int, int]
    multiple: int
    prepare: Callable[[Path], None]
    write: Callable[[Path, int, str, int], None]


_SETS = {
    "classification": _Set(
        f"builtin-v{FORMAT_VERSION}",
        (1600, 400),
        len(CLASS_NAMES),
        _make_class_folders,
        lambda *job: _write_image(*job),
    ),
    "segmentation": _Set(
        f"builtin-scenes-v{scenes.FORMAT_VERSION}",
        (400, 100),
        1,
        lambda root: scenes.make_folders(root, SPLITS),
        lambda root, seed, split, index: scenes.write_scene(
            root, split, index, generator_of(seed, SPLITS.index(split), index)
        ),
    ),
}


def _draw_frame(rng: np.random.Generator) -> Frame:
    """Draws image size, position, size and rotation of the shape."""
    short_side = int(rng.integers(*SHORT_SIDE_PX, endpoint=True))
    long_side = round(short_side * rng.uniform(*ASPECT_RATIO))
    sides = (short_side, long_side) if rng.random() < 0.5 else (long_side, short_side)
    height, width = sides

    radius = short_side * rng.uniform(*SHAPE_DIAMETER) / 2
    # The validation crop keeps the central 0.875 of the shorter side: stay in it.
    reach = max(0.4375 * short_side - radius, 0.02 * short_side)
    centre_x = width / 2 + rng.uniform(-reach, reach)
    centre_y = height / 2 + rng.uniform(-reach, reach)
    angle = math.radians(rng.uniform(*ROTATION_DEGREES))
    return frame_at((height, width), (centre_y, centre_x), angle, radius)
