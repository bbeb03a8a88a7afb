"""Images with masks, small enough for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn

__all__ = ["ARCH", "CLASSES", "IGNORED", "PIL", "SMALL", "make_mask_folder", "network"]

CLASSES = ("ground", "left", "right")
IGNORED = 255
# Flags of a run: two epochs of two steps with such images.
ARCH = ["--arch", "mask_helpers:network"]
PIL = ["--loader", "pil", "--workers", "0"]
SMALL = [*ARCH, *"--task segmentation --resolutions 48 32 --batch-size 3 --lr 0.05".split()]
SMALL += "--epochs 2 --log-every 1 --schedule poly --decoder-lr 10 --seed 3".split()


def make_mask_folder(root: Path, train: int = 6, val: int = 5, seed: int = 0) -> Path:
    """Writes root/{train,val}/NNNN.jpg and root/{train,val}annot/NNNN.png, and classes.txt.

    A red box on the left and a blue one on the right of a grey ground; the top rows are ignored.
    """
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for split, count in (("train", train), ("val", val)):
        for folder in (root / split, root / f"{split}annot"):
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            height, width = (int(side) for side in rng.integers(40, 60, 2))
            mask = np.zeros((height, width), dtype=np.uint8)
            image = np.full((height, width, 3), 128) + rng.integers(-20, 20, (height, width, 1))
            for label, half in ((1, slice(None, width // 2)), (2, slice(width // 2, None))):
                top, bottom = sorted(rng.choice(height, 2, replace=False))
                mask[top:bottom, half] = label
                image[top:bottom, half, 0 if label == 1 else 2] += 100
            mask[:3] = IGNORED
            picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
            picture.save(root / split / f"{number:04d}.jpg", quality=95)
            Image.fromarray(mask).save(root / f"{split}annot" / f"{number:04d}.png")
    return root


class TinyMaps(nn.Module):
    """A trunk of two convolutions with batch norm, dropout, and a classifier: a quarter of H, W."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Conv2d(8, num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.trunk(x)))


def network(num_classes: int) -> nn.Module:
    """`--arch mask_helpers:network --task segmentation`."""
    return TinyMaps(num_classes)


def five_classes(num_classes: int) -> nn.Module:
    """A network that does not listen."""
    del num_classes
    return TinyMaps(5)
