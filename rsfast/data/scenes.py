"""The built-in set of segmentation: scenes of coloured shapes, with exact masks.

Six classes. Discs and squares are of one colour each and told apart by their form; horizontal and
vertical are discs and squares filled with fine stripes, whose form says nothing; a wire is a thin
curve; the rest is background. Colour, contrast, place and size are drawn from the same
distributions for all shapes. In an image that is squashed to few pixels stripes fade into plain
colour and wires into the background, so scores rise with the resolution.

A pixel has the label of the last shape that covers its centre. Images have antialiased edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rsfast.data.drawing import (
    Frame,
    Plane,
    coverage,
    frame_at,
    lighting_and_noise,
    stripes,
    to_uint8,
)

__all__ = ["CLASS_NAMES", "FORMAT_VERSION", "make_folders", "write_scene"]

# Part of the cache folder's name: raise it whenever a change below alters a pixel.
FORMAT_VERSION = 1

CLASS_NAMES = ("background", "disc", "square", "horizontal", "vertical", "wire")

# (low, high) of uniform draws; lengths in pixels or shares of the shorter side, levels in 0..255.
HEIGHT_PX = (116, 140)
ASPECT_RATIO = (1.15, 1.35)  # width over height
NUM_SHAPES = (4, 6)
SHAPE_DIAMETER = (0.32, 0.50)
STRIPE_PERIOD = (0.034, 0.085)  # log-uniform; at least 4 px in the file
WIRE_PX = (3.0, 5.0)
WIRE_LENGTH = (0.5, 1.0)  # share of the image's side along which it runs
WIRE_SWING = (0.03, 0.10)  # amplitude of its sine, as a share of the shorter side
ROTATION_DEGREES = (-10.0, 10.0)
GROUND_LUMA = (105.0, 150.0)
CONTRAST = (40.0, 65.0)  # luma of a shape against the background's, of either sign
CHROMA_OFFSET = (-30.0, 30.0)  # per plane, independently for each shape and the background
JPEG_QUALITY = (90, 95)


def make_folders(root: Path, splits: Sequence[str]) -> None:
    """What a set holds besides images and masks."""
    for split in splits:
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASS_NAMES))


def write_scene(root: Path, split: str, index: int, rng: np.random.Generator) -> None:
    """Draws image `index` of a split and its mask, and writes them as JPEG and PNG."""
    height = int(rng.integers(*HEIGHT_PX, endpoint=True))
    size = (height, round(height * rng.uniform(*ASPECT_RATIO)))
    labels = np.zeros(size, dtype=np.uint8)
    ground = rng.uniform(*GROUND_LUMA)
    light = lighting_and_noise(rng, frame_at(size, (size[0] / 2, size[1] / 2), 0.0, 1.0))
    planes: list[Plane] = [np.full(size, ground, dtype=np.float32)]
    planes += [np.full(size, 128.0 + rng.uniform(*CHROMA_OFFSET), np.float32) for _ in range(2)]
    for name in _drawn_classes(rng):
        covered, texture = _shape(rng, size, name)
        contrast = rng.uniform(*CONTRAST) * (1.0 if rng.random() < 0.5 else -1.0)
        paint = (ground + contrast + texture, *(128.0 + rng.uniform(*CHROMA_OFFSET, size=2)))
        for number, colour in enumerate(paint):
            planes[number] = planes[number] + covered * (colour - planes[number])
        labels[covered >= 0.5] = CLASS_NAMES.index(name)
    planes[0] = planes[0] + light
    image = Image.merge("YCbCr", [Image.fromarray(to_uint8(plane)) for plane in planes])
    quality = int(rng.integers(*JPEG_QUALITY, endpoint=True))
    image.save(root / split / f"{index:04d}.jpg", "JPEG", quality=quality, subsampling="4:4:4")
    Image.fromarray(labels).save(root / f"{split}annot" / f"{index:04d}.png")


def _drawn_classes(rng: np.random.Generator) -> list[str]:
    """From back to front; every class comes once before one comes again."""
    count = int(rng.integers(*NUM_SHAPES, endpoint=True))
    once = rng.permutation(CLASS_NAMES[1:]).tolist()
    again = rng.permutation(CLASS_NAMES[1:]).tolist()
    return [str(name) for name in (once + again)[:count]]


def _shape(
    rng: np.random.Generator, size: tuple[int, int], name: str
) -> tuple[Plane, Plane | float]:
    """Share of each pixel that it covers, [H, W] in [0, 1], and its texture in luma levels."""
    if name == "wire":
        return _wire(rng, size), 0.0
    radius = min(size) * rng.uniform(*SHAPE_DIAMETER) / 2
    down, across = (rng.uniform(0.8 * radius, side - 0.8 * radius) for side in size)
    frame = frame_at(size, (down, across), math.radians(rng.uniform(*ROTATION_DEGREES)), radius)
    if name in ("disc", "square"):
        return coverage(frame, name), 0.0
    form = "disc" if rng.random() < 0.5 else "square"
    return coverage(frame, form), stripes(rng, frame, name, STRIPE_PERIOD)


def _wire(rng: np.random.Generator, size: tuple[int, int]) -> Plane:
    """A stretch of a sine along one of the image's sides."""
    frame = frame_at(
        size,
        (size[0] * rng.uniform(0.25, 0.75), size[1] * rng.uniform(0.25, 0.75)),
        math.radians(rng.uniform(*ROTATION_DEGREES)),
        radius=1.0,
    )
    is_level = rng.random() < 0.5
    length = rng.uniform(*WIRE_LENGTH) * (size[1] if is_level else size[0])
    return _sine(rng, frame, is_level, length)


def _sine(rng: np.random.Generator, frame: Frame, is_level: bool, length: float) -> Plane:
    """Covers what lies near the curve: to first order the distance to it, and its two ends."""
    along, off = (frame.across, frame.down) if is_level else (frame.down, frame.across)
    swing = rng.uniform(*WIRE_SWING) * frame.short_side
    rate = 2 * math.pi / (rng.uniform(0.4, 1.0) * length)
    phase = rng.uniform(0, 2 * math.pi)
    slope = swing * rate * np.cos(rate * along + phase)
    away = np.abs(off - swing * np.sin(rate * along + phase)) / np.sqrt(1 + slope**2)
    half = rng.uniform(*WIRE_PX) / 2
    covered = np.clip(0.5 + half - away, 0.0, 1.0)
    return covered * np.clip(0.5 + length / 2 - np.abs(along), 0.0, 1.0)
