"""Pictures of what a segmentation network makes of some images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rsfast.data import Loader
from rsfast.files.overlays import draw_overlays
from rsfast.pyramid import Pyramid
from rsfast.tasks.segmentation import predicted_classes

__all__ = ["write_predictions"]


@torch.no_grad()
def write_predictions(
    model: Any,
    ensemble_weights: Tensor,
    loader: Loader,
    dtype: torch.dtype | None,
    folder: Path,
) -> list[Path]:
    """Draws image, ground truth, and prediction at each resolution and of the ensemble.

    Args:
        model: an RSNet in eval mode.
        ensemble_weights: [R] shares of the resolutions.
        loader: of the images to draw, at the trained resolutions.
        dtype: of autocast; None for float32.
        folder: to write NNN_<name of the image>.png to; made if absent, and emptied of such.

    Returns:
        The pictures.

    Raises:
        OSError: if they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("[0-9][0-9][0-9]_*.png"):
        earlier.unlink()
    device = ensemble_weights.device
    names = [*(f"{r} px" for r in model.resolutions), "ensemble"]
    written: list[Path] = []
    for batch in loader:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits: Pyramid = model(batch.images)
        images = _colours(batch.images.level(0), loader.mean, loader.std)
        for number, mask in enumerate(batch.masks or ()):
            size = mask.shape[0], mask.shape[1]
            maps = [level[number] for level in logits.levels()]
            classes = predicted_classes(maps, size, ensemble_weights).cpu().numpy()
            stem = Path(loader.plan.index.paths[int(batch.indices[number])]).stem
            path = folder / f"{len(written):03d}_{stem}.png"
            draw_overlays(
                path,
                _bytes(images[number], size),
                mask.cpu().numpy(),
                dict(zip(names, classes, strict=True)),
                loader.class_names,
                model.ignore_label,
            )
            written.append(path)
    return written


def _colours(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """[N, 3, H, W] in [0, 1] of normalised images, behind whose colours there may be zeros."""
    shift, factor = (
        torch.tensor(tuple(part), device=images.device).view(1, 3, 1, 1) for part in (mean, std)
    )
    return images[:, :3].float() * factor + shift


def _bytes(image: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """[H, W, 3] of one image [3, h, w] in [0, 1], no longer squashed."""
    image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    return (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
