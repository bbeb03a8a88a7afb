"""Top-1 of an exported network on a folder of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsfast.deploy.manifest import Manifest
from rsfast.deploy.network import Network, load
from rsfast.deploy.preprocess import preprocess
from rsfast.export.images import batches, index_split, spread
from rsfast.files.progress import progress

__all__ = ["top1"]


def top1(
    folder: Path,
    manifest: Manifest,
    data: str | Path,
    precisions: Sequence[str],
    num_images: int,
    labels: str | Path | None = None,
) -> tuple[int, dict[str, dict[int, float]]]:
    """Accuracy at every trained resolution on DATA/val.

    Args:
        folder: of an exported network.
        manifest: of the folder.
        data: folder with val/, or a pattern of archives of validation images.
        precisions: of `rsfast.deploy.load`.
        num_images: of val/ at most, spread evenly over the classes.
        labels: list of the labels of a val/ without class folders.

    Returns:
        The number of images, and precision -> resolution -> top-1 in percent.

    Raises:
        ValueError: if the data set is not the network's.
    """
    index = index_split(data, "val", manifest, labels)
    positions = spread(index, num_images)
    threads = len(os.sched_getaffinity(0))
    nets = {
        name: load(folder, precision=name, mode="small", threads=threads) for name in precisions
    }
    hits = {name: dict.fromkeys(manifest.resolutions, 0) for name in precisions}
    with progress(total=len(positions), unit="img", desc="top-1", leave=False) as bar:
        for part, pictures in batches(index, positions):
            for resolution in manifest.resolutions:
                images = preprocess(pictures, resolution, manifest)
                for name, net in nets.items():
                    hits[name][resolution] += _hits(net, images, index.labels[part])
            bar.update(len(part))
    share = 100 / len(positions)
    return len(positions), {
        name: {resolution: share * count for resolution, count in counts.items()}
        for name, counts in hits.items()
    }


def _hits(net: Network, images: np.ndarray, labels: np.ndarray) -> int:
    return int((net(images).argmax(axis=1) == labels).sum())
