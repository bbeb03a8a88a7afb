"""From folders of images to batches of pyramids."""

from rsfast.data.decoding import default_workers
from rsfast.data.folder import FolderIndex, index_folder
from rsfast.data.loader import (
    BACKENDS,
    NORMALIZATIONS,
    Batch,
    Loader,
    train_loader,
    val_loader,
)
from rsfast.data.prefetch import prefetch

__all__ = [
    "BACKENDS",
    "NORMALIZATIONS",
    "Batch",
    "FolderIndex",
    "Loader",
    "default_workers",
    "index_folder",
    "prefetch",
    "train_loader",
    "val_loader",
]
