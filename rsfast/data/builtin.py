"""The built-in image set: generated JPEGs whose accuracy rises with the input resolution.

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
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsfast.data.cache import cache_root, exists, writing
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
# As strong as the outline: with 28 to 40 against a contrast of 45 to 110, a ResNet-18 at 64 pixels
# learnt every shape and no texture in 6 epochs of 1600 images; with these, both (96 % top-1).
STRIPE_AMPLITUDE = (55.0, 70.0)
ROTATION_DEGREES = (-8.0, 8.0)
SHAPE_LUMA = (115.0, 140.0)
GROUND_CONTRAST = (45.0, 70.0)  # luma of the background against the shape's, of either sign
CHROMA_OFFSET = (-30.0, 30.0)  # per plane, independently for shape and background
LIGHTING_SLOPE = (0.0, 24.0)  # luma levels from the centre to an end of the shorter side
SENSOR_NOISE = (1.0, 4.0)  # standard deviation of independent luma noise
JPEG_QUALITY = (88, 95)

# Smooth luma noise: (cells along the shorter side, standard deviation of the cells in levels).
# The finest octave hides the few levels that a resize leaves of stripes finer than a pixel. It is
# stretched along a random axis, because isotropic noise would average out over the shape.
CLOUD_OCTAVES = ((3, 7.0), (9, 5.0), (27, 6.0))
CLOUD_LOG2_STRETCH = (-0.7, 0.7)  # of a cell's height over its mean, and of the mean over its width

# [H, W] float32: Python floats, unlike numpy's, keep it so.
Plane = NDArray[np.floating[Any]]


def builtin_root(
    cache_dir: Path | None = None,
    *,
    num_train: int = 1600,
    num_val: int = 400,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Returns the folder of the built-in set, generating it on first use.

    The folder holds `train/<class>/NNNN.jpg` and `val/<class>/NNNN.jpg`, RGB JPEGs in the ten
    classes of `CLASS_NAMES`, equally many of each. It appears under its name only once it is
    complete, so an interrupted generation is never used, and of several processes that generate
    it at once the first one's copy stays.

    Args:
        cache_dir: where to keep the set; None means `$RSFAST_CACHE`, else
            `$XDG_CACHE_HOME/rsfast`, else `~/.cache/rsfast`.
        num_train: training images, a positive multiple of 10.
        num_val: validation images, a positive multiple of 10.
        seed: any integer >= 0; another seed gives other images of the same distribution.
        workers: threads; None means two. Does not change the images.

    Returns:
        `cache_dir/builtin-v<format>-<num_train>-<num_val>-<seed>`.

    Raises:
        ValueError: if a count is not a positive multiple of 10, `seed` is negative, or `workers`
            is not positive.
        OSError: if the cache folder cannot be written.
    """
    counts = {"num_train": num_train, "num_val": num_val}
    for argument, count in counts.items():
        if count <= 0 or count % len(CLASS_NAMES) != 0:
            raise ValueError(
                f"{argument} must be a positive multiple of {len(CLASS_NAMES)}, got {count}"
            )
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if workers is not None and workers <= 0:
        raise ValueError(f"workers must be positive or None, got {workers}")

    cache_dir = cache_root() if cache_dir is None else Path(cache_dir)
    root = cache_dir / f"builtin-v{FORMAT_VERSION}-{num_train}-{num_val}-{seed}"
    if exists(root) and root.is_dir():
        return root

    # A sibling, so that the rename stays within one file system and is atomic.
    partial = cache_dir / f".{root.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with writing(cache_dir):
            _generate(partial, dict(zip(SPLITS, (num_train, num_val), strict=True)), seed, workers)
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


def _generate(root: Path, counts: dict[str, int], seed: int, workers: int | None) -> None:
    """Writes all images of all splits under `root`."""
    for split, name in product(SPLITS, CLASS_NAMES):
        (root / split / name).mkdir(parents=True)
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]

    def write(job: tuple[str, int]) -> None:
        split, index = job
        name = CLASS_NAMES[index % len(CLASS_NAMES)]
        _write_image(root / split / name / f"{index:04d}.jpg", seed, split, index)

    # Threads, not processes: a process pool would import the caller's script again (spawn) or fork
    # a process in which torch already runs threads, to save one second. The default set on 2 CPU
    # cores (Xeon, 2026-11-21): 3.5 s with 1 thread, 2.9 s with 2, 3.2 s with 4, 4.5 s with 16
    # (they wait for the GIL); 2.1 s with 2 forked processes.
    with ThreadPoolExecutor(workers or DEFAULT_WORKERS) as pool:
        done = pool.map(write, jobs)
        about = "generating the built-in set"
        for _ in progress(done, total=len(jobs), desc=about, unit="image"):
            pass


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """Pixel grid of one image and the placement of its shape."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    across: Plane
    """[H, W] offset from the shape's centre along its own horizontal axis, in pixels."""
    down: Plane
    """[H, W] offset from the shape's centre along its own vertical axis, in pixels."""
    radius: float
    """Half the diameter of the shape, in pixels."""

    @property
    def short_side(self) -> int:
        """Pixels."""
        return min(self.height, self.width)


def _write_image(path: Path, seed: int, split: str, index: int) -> None:
    """Draws image `index` of a split and writes it as a JPEG."""
    key = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    rng = np.random.Generator(np.random.Philox(key))
    shape, texture = CLASS_NAMES[index % len(CLASS_NAMES)].split("_")

    frame = _draw_frame(rng)
    coverage = _coverage(frame, shape)
    contrast = rng.uniform(*GROUND_CONTRAST) * (1.0 if rng.random() < 0.5 else -1.0)
    luma = coverage * (_stripes(rng, frame, texture) - contrast)
    luma += rng.uniform(*SHAPE_LUMA) + contrast + _lighting_and_noise(rng, frame)
    planes = [luma]
    for _ in range(2):  # Cb, Cr
        shape_chroma, ground_chroma = rng.uniform(*CHROMA_OFFSET, size=2)
        planes.append(128.0 + ground_chroma + coverage * (shape_chroma - ground_chroma))

    # Composed in the JPEG's own colour space, so that the stripes cannot leak into chroma.
    image = Image.merge("YCbCr", [Image.fromarray(_to_uint8(plane)) for plane in planes])
    image.save(
        path,
        "JPEG",
        quality=int(rng.integers(*JPEG_QUALITY, endpoint=True)),
        subsampling="4:2:0" if rng.random() < 0.5 else "4:4:4",
    )


def _to_uint8(plane: Plane) -> NDArray[np.uint8]:
    """Rounds levels to bytes, [H, W]."""
    return np.clip(np.rint(plane), 0, 255).astype(np.uint8)


def _draw_frame(rng: np.random.Generator) -> _Frame:
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
    cos, sin = math.cos(angle), math.sin(angle)
    x = np.arange(width, dtype=np.float32)[None, :] + (0.5 - centre_x)  # [1, W]
    y = np.arange(height, dtype=np.float32)[:, None] + (0.5 - centre_y)  # [H, 1]
    return _Frame(
        height=height,
        width=width,
        across=cos * x + sin * y,
        down=cos * y - sin * x,
        radius=radius,
    )


def _disc(across: Plane, down: Plane) -> Plane:
    return np.hypot(across, down) - 1.0


def _ring(across: Plane, down: Plane) -> Plane:
    return np.abs(np.hypot(across, down) - 0.76) - 0.24


def _square(across: Plane, down: Plane) -> Plane:
    return np.maximum(np.abs(across), np.abs(down)) - 0.86


def _triangle(across: Plane, down: Plane) -> Plane:
    down = down - 0.3  # the centroid lies low: centre the bounding box instead
    slanted_sides = math.sqrt(0.75) * np.abs(across) - 0.5 * down
    return np.maximum(slanted_sides, down) - 0.6


def _cross(across: Plane, down: Plane) -> Plane:
    across, down = np.abs(across), np.abs(down)
    return np.maximum(np.maximum(across, down) - 1.0, np.minimum(across, down) - 0.34)


# Signed distance to the outline (negative inside), with lengths in units of the radius.
SIGNED_DISTANCE: dict[str, Callable[[Plane, Plane], Plane]] = {
    "cross": _cross,
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
}


def _coverage(frame: _Frame, shape: str) -> Plane:
    """Share of each pixel that the shape covers, [H, W] in [0, 1]: an antialiased edge."""
    radius = frame.radius
    distance = SIGNED_DISTANCE[shape](frame.across / radius, frame.down / radius)
    return np.clip(0.5 - distance * radius, 0.0, 1.0)


def _stripes(rng: np.random.Generator, frame: _Frame, texture: str) -> Plane:
    """Sine stripes in luma levels, [H, W], of zero mean whatever the texture."""
    finest, coarsest = STRIPE_PERIOD
    period = finest * (coarsest / finest) ** rng.random() * frame.short_side  # pixels
    phase = rng.uniform(0, 2 * math.pi)
    normal = frame.down if texture == "horizontal" else frame.across
    return rng.uniform(*STRIPE_AMPLITUDE) * np.sin((2 * math.pi / period) * normal + phase)


def _lighting_and_noise(rng: np.random.Generator, frame: _Frame) -> Plane:
    """Luma that knows nothing of the class: a ramp of light, clouds and sensor noise, [H, W]."""
    direction = rng.uniform(0, 2 * math.pi)
    slope = rng.uniform(*LIGHTING_SLOPE) / (frame.short_side / 2)
    luma = slope * (math.cos(direction) * frame.across + math.sin(direction) * frame.down)
    size = (frame.width, frame.height)
    for cells, deviation in CLOUD_OCTAVES:
        stretch = 2.0 ** rng.uniform(*CLOUD_LOG2_STRETCH)
        rows = max(2, round(cells / stretch * frame.height / frame.short_side))
        columns = max(2, round(cells * stretch * frame.width / frame.short_side))
        grid = rng.standard_normal((rows, columns), dtype=np.float32) * deviation
        luma += np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC))
    noise = rng.standard_normal((frame.height, frame.width), dtype=np.float32)
    return luma + rng.uniform(*SENSOR_NOISE) * noise
