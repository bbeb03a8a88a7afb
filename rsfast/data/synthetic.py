"""Random images made on the device: the step's speed without a loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["SyntheticDecoder"]


class SyntheticDecoder:
    """The same random uint8 rows at every step.

    Args:
        resolutions: r of each level.
        batch_size: N.
        seed: of the pixels.
        device: where they live.
    """

    def __init__(
        self, resolutions: Sequence[int], *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        pixels = batch_size * sum(r * r for r in resolutions)
        self._rows = torch.randint(
            0, 256, (pixels, 3), dtype=torch.uint8, device=device, generator=generator
        )

    def rows(self, epoch: int, steps: range) -> Iterator[Tensor]:
        """[M, 3] uint8, once for each step."""
        for _ in steps:
            yield self._rows
