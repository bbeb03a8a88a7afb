"""Whether implementations compute the network: logits against PyTorch's, and top-1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.deploy.implementations import ANCHORS, Implementation
from bench.deploy.worker import open_at
from rsfast.deploy.manifest import Manifest
from rsfast.deploy.preprocess import preprocess
from rsfast.export.images import batches, index_split

__all__ = ["check_logits", "distances", "top1"]

_FP32 = 1e-4  # what rsfast.export check allows, too
_FURTHER = 2.0  # times as far as the separate files of the precision
# Where batch norm is not folded into the convolutions its scale, its shift and what it is applied
# to are rounded to 8 bits each: 1.5 to 6 times as far on a ResNet-18 (EPYC, November 2026).
_UNFOLDED_BF16 = 8.0

Logits = Mapping[int, np.ndarray]  # size -> [K]


def distances(logits: Mapping[str, Logits], exact: Logits) -> dict[str, dict[int, float]]:
    """Of each implementation at each size: root mean square of the error, by that of the logits."""
    return {
        name: {r: _rms(values - exact[r]) / _rms(exact[r]) for r, values in each.items()}
        for name, each in logits.items()
    }


def check_logits(
    implementations: Iterable[Implementation], found: Mapping[str, Mapping[int, float]]
) -> None:
    """No time is shown for a wrong result.

    In float32 logits are within 1e-4 of PyTorch's; in less, at most twice as far from them as those
    of separate files in that precision are at the size where they are furthest. In bfloat16 one
    session for all sizes may be eight times as far.

    Raises:
        RuntimeError: naming the implementation and the size.
    """
    for impl in implementations:
        for resolution, distance in found[impl.name].items():
            anchor = ANCHORS.get(impl.precision)
            bound = _FP32
            if anchor is not None:
                if anchor not in found:
                    continue
                bound = _further(impl) * max(found[anchor].values())
            if not distance <= bound:
                raise RuntimeError(
                    f"{impl.name} must be within {bound:.1e} of PyTorch at {resolution} pixels, "
                    f"is off by {distance:.1e}"
                )


def top1(
    implementations: Iterable[Implementation],
    folder: Path,
    manifest: Manifest,
    data: Path,
) -> tuple[dict[str, dict[int, float]], int]:
    """Measures each kind of arithmetic once, with the sessions that are timed: batch 1.

    Args:
        implementations: those that compete.
        folder: of their files.
        manifest: of the network.
        data: folder with val/.

    Returns:
        Arithmetic -> size -> percent, and the number of images.

    Raises:
        ValueError: if the data set is not the network's.
    """
    index = index_split(data, "val", manifest)
    runs: dict[str, dict[int, Callable[[np.ndarray], np.ndarray]]] = {}
    for impl in implementations:
        if impl.family != "pytorch" and impl.arithmetic not in runs:
            runs[impl.arithmetic] = open_at(impl, folder, 1, manifest.resolutions)
    hits = {name: dict.fromkeys(manifest.resolutions, 0) for name in runs}
    for positions, pictures in tqdm(batches(index, np.arange(len(index))), desc="accuracy"):
        labels = index.labels[positions]
        for resolution in manifest.resolutions:
            images = preprocess(pictures, resolution, manifest)
            for name, each in runs.items():
                found = [
                    int(each[resolution](images[i : i + 1]).argmax()) for i in range(len(labels))
                ]
                hits[name][resolution] += int((np.array(found) == labels).sum())
    share = 100 / len(index)
    return {n: {r: share * count for r, count in each.items()} for n, each in hits.items()}, len(
        index
    )


def _further(impl: Implementation) -> float:
    return _UNFOLDED_BF16 if (impl.precision, impl.mode) == ("bf16", "small") else _FURTHER


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
