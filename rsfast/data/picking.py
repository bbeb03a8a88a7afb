"""Smaller levels out of the pixels of the largest one, by nearest neighbour, on the device.

It is what the authors' quantised program does: it resizes once, to the largest resolution, and

    y[i, j] = x[floor(i * R / r), floor(j * R / r)]

makes an r x r level of that R x R picture x. Of N images, 3 N r^2 bytes are read and as many
written for each level, the largest included, in one launch per level. Loaders of every backend come
here with what they have resized, so they differ in the largest level only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsfast.files.pictures import LEVEL_MODES, nearest_pixels

__all__ = ["Picking", "check_levels"]


def check_levels(levels: str, crop: str, flip: str) -> None:
    """Refuses windows and flips of which one picture of each image cannot serve all levels.

    Raises:
        ValueError: naming the settings, the rule and the values.
    """
    _check_mode(levels)
    if levels == "nearest" and (crop != "single" or flip == "independent"):
        raise ValueError(
            "levels nearest makes all levels from one picture of each image and so needs crop "
            f"single and flip shared or none, got crop {crop} and flip {flip}: choose these, or "
            "levels resize"
        )


def _check_mode(levels: str) -> None:
    if levels not in LEVEL_MODES:
        raise ValueError(f"levels must be one of {LEVEL_MODES}, got {levels!r}")


class Picking:
    """Which levels of a batch are resized, and how the others are made of them.

    Args:
        levels: "resize" all, or "nearest": pick smaller ones from the pixels of a larger one.
        resolutions: r of each level, in any order; one may come again.
        picked_from: R, the resolution that smaller ones are picked from; None for the largest of
            `resolutions`. Those that are not smaller are resized.
        device: of the rows.

    Attributes:
        resolutions: r of each level.
        resized: r of those that a decoder has to make, and in that order.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    def __init__(
        self,
        levels: str,
        resolutions: Sequence[int],
        picked_from: int | None,
        device: torch.device | str,
    ) -> None:
        _check_mode(levels)
        if picked_from is not None and picked_from < 1:
            raise ValueError(f"picked_from must be a resolution of at least 1, got {picked_from}")
        self.resolutions = self.resized = tuple(resolutions)
        self._from = 0
        if levels == "nearest" and self.resolutions:
            self._from = picked_from or max(self.resolutions)
            made = {max(r, self._from) for r in self.resolutions}
            self.resized = tuple(sorted(made, reverse=True))
        # Each is copied here, where the host may wait for it, and not within a step.
        self._pixels = {
            r: _square(r, self._from).to(device) for r in self.resolutions if r < self._from
        }

    def __call__(self, rows: Tensor, count: int) -> Tensor:
        """All levels of a batch.

        Args:
            rows: [M, 3] uint8, the levels that were resized, one after another.
            count: N, of images.

        Returns:
            [M', 3] uint8, the levels of `resolutions`; `rows` itself where all were resized.
        """
        if self.resized == self.resolutions:
            return rows
        parts = rows.split([count * r * r for r in self.resized])
        sources = dict(zip(self.resized, parts, strict=True))
        pixels = [count * r * r for r in self.resolutions]
        result = rows.new_empty(sum(pixels), 3)
        for target, r in zip(result.split(pixels), self.resolutions, strict=True):
            source = sources[max(r, self._from)]
            if r < self._from:
                target = target.view(count, r * r, 3)
                torch.index_select(
                    source.view(count, self._from**2, 3), 1, self._pixels[r], out=target
                )
            else:
                target.copy_(source)
        return result


def _square(r: int, side: int) -> Tensor:
    """[r * r] int64 positions among the side * side pixels of a picture."""
    along = torch.from_numpy(nearest_pixels(side, r))
    return (along[:, None] * side + along).flatten()
