"""Random images made on the device: the step's speed without a loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rsfast.data.plan import TrainPlan, ValPlan

__all__ = ["SyntheticDecoder"]


class SyntheticDecoder:
    """The same random uint8 rows at every step.

    Args:
        plan: tells how many images a step has.
        resolutions: r of each level.
        device: where the rows live.
    """

    def __init__(
        self, plan: TrainPlan | ValPlan, resolutions: Sequence[int], *, device: torch.device
    ) -> None:
        self._plan = plan
        self._level_pixels = [r * r for r in resolutions]
        generator = torch.Generator(device).manual_seed(0)
        pixels = plan.batch_size * sum(self._level_pixels)
        self._rows = torch.randint(
            0, 256, (pixels, 3), dtype=torch.uint8, device=device, generator=generator
        )

    def rows(self, epoch: int, steps: range) -> Iterator[Tensor]:
        """[M, 3] uint8, once for each step."""
        for step in steps:
            count = len(self._plan.images(epoch, step))
            if count == self._plan.batch_size:
                yield self._rows
            else:
                full = [self._plan.batch_size * pixels for pixels in self._level_pixels]
                levels = zip(self._rows.split(full), self._level_pixels, strict=True)
                yield torch.cat([level[: count * pixels] for level, pixels in levels])
