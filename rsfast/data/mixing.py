"""Mixup, CutMix, colour noise and erasing of a batch's pixels, at all resolutions, on the device.

Mixtures are

    y[n] = x[n] + w[n] * (x[partner(n)] - x[n])

with w[n] = 1 - kept[n] where a pixel's centre lies in the image's box, else 0. The sum is taken in
float32 of the pixels as they are decoded, and rounded once to a byte, as timm's loader does. Of a
level of P bytes, 2 P are read and P written, and two copies of 4 P bytes live meanwhile. There are
7 launches for each level and about a dozen for the batch, and the host waits for none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsfast.data.augment import Blends, partners

__all__ = ["Mix", "erase", "mixed", "shift_colours"]


class Mix(NamedTuple):
    """Whose labels the images of a batch have besides their own.

    Attributes:
        labels: [N] int64, of each image's partner.
        share: [N] float32, weight of the image's own label, in [0, 1]; that of the partner's label
            is 1 - share.
    """

    labels: Tensor
    share: Tensor


def mixed(
    rows: Tensor, resolutions: Sequence[int], labels: np.ndarray, blends: Blends
) -> tuple[Tensor, Mix]:
    """Mixes every image of a batch with its partner.

    The share of a label is that of the box as drawn, one number for all resolutions. A level of r
    pixels whose box ends between pixels differs from it by at most 2 / r.

    Args:
        rows: [M, 3] uint8, levels one after another, each of N square images.
        resolutions: r of each level.
        labels: [N] int64, of the images.
        blends: of the N images.

    Returns:
        [M, 3] uint8 and the labels' part, on the device of the rows.
    """
    count = len(labels)
    other = partners(count)
    partner, labels_there = (_on(rows.device, array) for array in (other, labels[other]))
    boxes, weights, share = _on(
        rows.device, np.column_stack([blends.boxes, 1.0 - blends.kept, blends.share])
    ).tensor_split((4, 5), dim=1)
    down, across = _inside(boxes, resolutions)
    result = torch.empty_like(rows)
    levels = zip(
        *(part.split([count * r * r for r in resolutions]) for part in (rows, result)),
        *(part.split(list(resolutions), dim=1) for part in (down * weights, across.float())),
        strict=True,
    )
    for (source, target, of_row, of_column), r in zip(levels, resolutions, strict=True):
        own = source.view(count, r * r, 3)
        weight = (of_row[:, :, None] * of_column[:, None, :]).view(count, r * r, 1)
        blend = torch.lerp(own.float(), own.index_select(0, partner).float(), weight)
        target.view(count, r * r, 3).copy_(blend.round_())
    return result, Mix(labels_there, share.flatten().contiguous())


def shift_colours(
    rows: Tensor, resolutions: Sequence[int], shifts: np.ndarray | None, std: Sequence[float]
) -> None:
    """Adds one colour to every pixel of an image, the same at all resolutions.

    One launch for each level, which reads and writes its normalised rows once more, and the host
    does not wait. Sums are taken in float32 and rounded once to the type of the rows.

    Args:
        rows: [M, C] normalised, levels one after another, each of N square images; overwritten.
            Channels behind the colours stay as they are.
        resolutions: r of each level.
        shifts: [N, 3] float32, of values before normalisation, in [0, 1]; None for none.
        std: what the normalisation has divided by.
    """
    if shifts is None:
        return
    count, channels = len(shifts), rows.shape[1]
    addends = np.zeros((count, 1, channels), dtype=np.float32)
    addends[:, 0, :3] = shifts / np.asarray(std)
    there = _on(rows.device, addends)
    for level, r in zip(rows.split([count * r * r for r in resolutions]), resolutions, strict=True):
        level.view(count, r * r, channels).add_(there)


def erase(rows: Tensor, resolutions: Sequence[int], boxes: np.ndarray | None) -> None:
    """Sets the pixels whose centres lie in their image's box to 0, the mean of normalised images.

    Two launches for each level, and the host does not wait.

    Args:
        rows: [M, C] normalised, levels one after another, each of N square images; overwritten.
        resolutions: r of each level.
        boxes: [N, 4] float32 top, left, bottom, right in shares of the sides; None for none.
    """
    if boxes is None:
        return
    count = len(boxes)
    down, across = _inside(_on(rows.device, boxes), resolutions)
    levels = zip(
        rows.split([count * r * r for r in resolutions]),
        *(part.split(list(resolutions), dim=1) for part in (down, across)),
        resolutions,
        strict=True,
    )
    for level, of_row, of_column, r in levels:
        erased = of_row[:, :, None, None] & of_column[:, None, :, None]
        level.view(count, r, r, rows.shape[1]).masked_fill_(erased, 0.0)


def _inside(boxes: Tensor, resolutions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[N, sum of r] bool twice: which rows and columns of pixels have their centre in a box."""
    centres = np.concatenate([(np.arange(r) + 0.5) / r for r in resolutions])
    there = _on(boxes.device, centres.astype(np.float32))
    top, left, bottom, right = boxes.split(1, dim=1)
    return (there >= top) & (there < bottom), (there >= left) & (there < right)


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    """Copied without a wait of the host."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
