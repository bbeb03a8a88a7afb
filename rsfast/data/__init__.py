"""From folders of images to batches of pyramids.

Names load on first use: what needs no PyTorch (an index of images) does not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsfast.data.augment import Augment as Augment
    from rsfast.data.batch import Batch as Batch
    from rsfast.data.dataset import open_split as open_split
    from rsfast.data.decoding import default_workers as default_workers
    from rsfast.data.folder import index_folder as index_folder
    from rsfast.data.index import ImageIndex as ImageIndex
    from rsfast.data.loader import BACKENDS as BACKENDS
    from rsfast.data.loader import NORMALIZATIONS as NORMALIZATIONS
    from rsfast.data.loader import Loader as Loader
    from rsfast.data.loader import Mix as Mix
    from rsfast.data.loader import train_loader as train_loader
    from rsfast.data.loader import val_loader as val_loader
    from rsfast.data.pairs import Pairs as Pairs
    from rsfast.data.pairs import open_pairs as open_pairs
    from rsfast.data.prefetching import prefetch as prefetch

_SOURCES = {
    "Augment": "augment",
    "BACKENDS": "loader",
    "NORMALIZATIONS": "loader",
    "Batch": "batch",
    "ImageIndex": "index",
    "Loader": "loader",
    "Mix": "loader",
    "Pairs": "pairs",
    "default_workers": "decoding",
    "index_folder": "folder",
    "open_pairs": "pairs",
    "open_split": "dataset",
    "prefetch": "prefetching",
    "train_loader": "loader",
    "val_loader": "loader",
}

__all__ = [*_SOURCES]


def __getattr__(name: str) -> Any:
    if name in _SOURCES:
        return getattr(importlib.import_module(f"rsfast.data.{_SOURCES[name]}"), name)
    raise AttributeError(f"module 'rsfast.data' has no attribute {name!r}")
