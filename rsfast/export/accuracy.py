"""Top-1 of an exported network on a folder of images, in float32 and in int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from rsfast.deploy.manifest import Manifest
from rsfast.deploy.network import Network, load
from rsfast.export.images import batches, index_split

__all__ = ["top1_losses"]


def top1_losses(
    folder: Path, manifest: Manifest, data: str | Path
) -> dict[int, tuple[float, float, int]]:
    """Each trained resolution -> top-1 in percent in float32 and int8, and the number of images.

    Raises:
        ValueError: if the data set is not the network's.
    """
    index = index_split(data, "val", manifest)
    nets = [load(folder, precision=precision, mode="small") for precision in ("fp32", "int8")]
    hits = {resolution: [0, 0] for resolution in manifest.resolutions}
    bar = tqdm(total=len(index), unit="img", desc="int8 accuracy")
    for positions, pictures in batches(index, np.arange(len(index))):
        labels = index.labels[positions]
        for resolution, counts in hits.items():
            images = nets[0].preprocess(pictures, resolution)
            for which, net in enumerate(nets):
                counts[which] += _hits(net, images, labels)
        bar.update(len(positions))
    bar.close()
    share = 100 / len(index)
    return {r: (share * a, share * b, len(index)) for r, (a, b) in hits.items()}


def _hits(net: Network, images: np.ndarray, labels: np.ndarray) -> int:
    return int((net(images).argmax(axis=1) == labels).sum())
