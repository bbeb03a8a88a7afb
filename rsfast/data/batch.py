"""What a loader yields for one step, and what a decoder hands to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from rsfast.data.mixing import Mix
from rsfast.pyramid import Pyramid

__all__ = ["Batch", "Rendered"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Images at all resolutions and their labels.

    Of segmentation, labels are class numbers or the ignored label: of training those of each pixel
    of the largest resolution, of validation in `masks`, each at the size of its image's file.

    Attributes:
        images: Pyramid of [M, 3] rows, RGB, normalised; float32 unless the loader was told
            otherwise, and then perhaps with channels of zeros behind the colours.
        labels: [N] int64 on the device of the images; of segmentation uint8, in training [N, r, r]
            with the largest r, in validation [0].
        indices: [N] int64 positions in the data set's index, on the CPU.
        mix: the labels that the images have besides their own, on their device; None where no
            image is mixed with another.
        masks: N tensors [H, W] uint8 on the device of the images, in validation of segmentation;
            otherwise None.
    """

    images: Pyramid
    labels: Tensor
    indices: Tensor
    mix: Mix | None = None
    masks: tuple[Tensor, ...] | None = None


class Rendered(NamedTuple):
    """What a decoder makes of one step of segmentation.

    Attributes:
        rows: [M, 3] uint8 of the images, on the loader's device.
        labels: [n] uint8 on the CPU, the masks of the images one after the other: of training
            N * r * r for the largest r, of validation height * width of each.
    """

    rows: Tensor
    labels: Tensor
