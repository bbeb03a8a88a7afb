"""What tests of plans need."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rsfast.data.index import ImageIndex

__all__ = ["index_of"]


def index_of(count: int, seed: int = 0) -> ImageIndex:
    """An index of images of many sizes, without files."""
    sizes = np.random.default_rng(seed).integers(50, 600, (count, 2), dtype=np.int32)
    return ImageIndex(
        root=Path("nowhere"),
        paths=tuple(f"a/{number}.jpg" for number in range(count)),
        labels=np.zeros(count, dtype=np.int64),
        sizes=sizes,
        class_names=("a",),
    )
