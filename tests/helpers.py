"""What several test files need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["make_image_folder", "smooth_image", "environment", "torchrun"]


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
        timeout=600,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    """Of processes that share two cores: one thread each."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
