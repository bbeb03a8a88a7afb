"""Pyramid: the same N images at several sizes, as one matrix of channels-last pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Pyramid", "check_resolutions"]


def check_resolutions(resolutions: Sequence[int]) -> tuple[int, ...]:
    """The resolutions as a tuple.

    Raises:
        ValueError: unless they are positive integers in strictly descending order.
    """
    resolutions = tuple(resolutions)
    descending = all(a > b for a, b in itertools.pairwise(resolutions))
    if not resolutions or not descending or resolutions[-1] < 1:
        raise ValueError(
            "resolutions must be positive and strictly descending (the larger ones teach the "
            f"smaller ones), got {resolutions}"
        )
    return resolutions


@dataclass(frozen=True, slots=True)
class Pyramid:
    """N images (or feature maps) at L sizes, packed so that one matrix product sees every pixel.

    Rows are NHWC pixels: all of level 0, then all of level 1, and so on. A level is therefore a
    contiguous slice, and :meth:`level` is a channels-last view of it, never a copy.

    Attributes:
        rows: [M, C] contiguous, any dtype, with M = sum over levels of N * H * W.
        sizes: (H, W) in pixels of each level, in the order of the rows.
        num_images: N, the same for all levels.
        banks: which private batch-norm set each level uses; None lets the network derive it from
            the sizes.
        moments: mean and biased variance [L, C] of each level's rows, differentiable, if what made
            the rows has them at hand.

    Raises:
        ValueError: if the rows do not fit the sizes, or `banks` has another length than `sizes`.
    """

    rows: Tensor
    sizes: tuple[tuple[int, int], ...]
    num_images: int
    banks: tuple[int, ...] | None = None
    moments: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.rows.dim() != 2:
            raise ValueError(f"rows must be [M, C], got shape {tuple(self.rows.shape)}")
        if not self.sizes:
            raise ValueError("sizes must name at least one level, got none")
        expected = sum(self.level_rows)
        if self.rows.shape[0] != expected:
            raise ValueError(
                f"rows must have {expected} rows for {self.num_images} images of sizes "
                f"{self.sizes}, got {self.rows.shape[0]}"
            )
        if self.banks is not None and len(self.banks) != len(self.sizes):
            raise ValueError(
                f"banks must name one batch-norm set per level ({len(self.sizes)}), "
                f"got {len(self.banks)}"
            )

    @classmethod
    def pack(cls, levels: Sequence[Tensor], banks: Sequence[int] | None = None) -> Pyramid:
        """Copies one tensor per level into a new pyramid (no copy for a single channels-last one).

        Args:
            levels: L tensors [N, C, H_l, W_l] of one dtype and device, any memory format.
            banks: L indices of batch-norm sets, or None.

        Raises:
            ValueError: if there is no level, a level is not 4-D, or N, C, dtype or device differ.
        """
        levels = tuple(levels)
        if not levels:
            raise ValueError("levels must hold at least one tensor, got none")
        first = levels[0]
        for index, level in enumerate(levels):
            if level.dim() != 4:
                raise ValueError(
                    f"levels[{index}] must be [N, C, H, W], got shape {tuple(level.shape)}"
                )
            if level.shape[:2] != first.shape[:2]:
                raise ValueError(
                    f"levels[{index}] must have the [N, C] of levels[0], {tuple(first.shape[:2])}, "
                    f"got {tuple(level.shape[:2])}"
                )
            if level.dtype != first.dtype or level.device != first.device:
                raise ValueError(
                    f"levels[{index}] must be {first.dtype} on {first.device} like levels[0], "
                    f"got {level.dtype} on {level.device}"
                )
        rows = [level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in levels]
        return cls(
            rows=rows[0].contiguous() if len(rows) == 1 else torch.cat(rows),
            sizes=tuple((level.shape[2], level.shape[3]) for level in levels),
            num_images=first.shape[0],
            banks=None if banks is None else tuple(banks),
        )

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.sizes)

    @property
    def num_channels(self) -> int:
        """C."""
        return self.rows.shape[1]

    @property
    def level_rows(self) -> tuple[int, ...]:
        """N * H * W of each level."""
        return tuple(self.num_images * height * width for height, width in self.sizes)

    def level(self, index: int) -> Tensor:
        """[N, C, H, W] channels-last view of one level."""
        index = range(self.num_levels)[index]
        starts = (0, *itertools.accumulate(self.level_rows))
        return self._as_images(self.rows[starts[index] : starts[index + 1]], index)

    def levels(self) -> tuple[Tensor, ...]:
        """All levels as views; in autograd one split, so the backward is one concatenation."""
        parts = torch.split(self.rows, list(self.level_rows))
        return tuple(self._as_images(part, index) for index, part in enumerate(parts))

    def with_rows(self, rows: Tensor) -> Pyramid:
        """The same levels with other channels: `rows` is [M, C']."""
        return Pyramid(rows, self.sizes, self.num_images, self.banks)

    def with_banks(self, banks: Sequence[int]) -> Pyramid:
        """The same pixels, normalised with other batch-norm sets."""
        return Pyramid(self.rows, self.sizes, self.num_images, tuple(banks))

    def to(self, *args, **kwargs) -> Pyramid:
        """`Tensor.to` on the rows: device, dtype, non_blocking."""
        return self.with_rows(self.rows.to(*args, **kwargs))

    def _as_images(self, rows: Tensor, index: int) -> Tensor:
        height, width = self.sizes[index]
        return rows.view(self.num_images, height, width, -1).permute(0, 3, 1, 2)
