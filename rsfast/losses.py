"""The training loss of an RS-Net, per image and per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import interpolate

from rsfast import kernels

__all__ = [
    "LossTerms",
    "MultiResolutionDistillation",
    "PixelDistillation",
    "scores_of_resolutions",
]


class LossTerms(NamedTuple):
    """The terms of the loss, scalars in nats, averaged over the batch, or over its pixels.

    Attributes:
        ce: cross entropy, summed over the resolutions (equations 1 and 2).
        ensemble: cross entropy of the ensemble; trains alpha only (equation 6).
        distill: distillation between the resolutions (equations 8 and 10).
    """

    ce: Tensor
    ensemble: Tensor
    distill: Tensor

    @property
    def total(self) -> Tensor:
        """The loss to minimise (equation 9)."""
        return self.ce + self.ensemble + self.distill


def scores_of_resolutions(alpha: Tensor, num_resolutions: int) -> Tensor:
    """[R] raw scores out of those of all levels: a resolution's share is that of its copies."""
    return alpha.view(num_resolutions, -1).logsumexp(dim=1)


class MultiResolutionDistillation(nn.Module):
    """Cross entropies, learned ensemble and distillation between resolutions (equation 9).

    Args:
        num_resolutions: R.
        mode: "full" (equation 10), "vanilla" (8), "no_ensemble", "largest" (Table 5) or "none"
            (parallel training).
        label_smoothing: in [0, 1), of both cross entropies; 0 in the paper.
        copies: levels of each resolution; L = R * copies.
        backend: "torch", or "triton" for the fused kernel on a GPU.

    Attributes:
        alpha: [L] raw ensemble scores, 1 at the start; the ensemble weights are their softmax.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        num_resolutions: int,
        mode: str = "full",
        label_smoothing: float = 0.0,
        *,
        copies: int = 1,
        backend: str = "torch",
    ) -> None:
        super().__init__()
        if num_resolutions < 1:
            raise ValueError(f"num_resolutions must be at least 1, got {num_resolutions}")
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        kernels.teacher_weights(mode, num_resolutions * copies)  # refuses an unknown mode
        self.num_resolutions = num_resolutions
        self.mode = mode
        self.label_smoothing = label_smoothing
        self.backend = kernels.check_backend(backend)
        self.alpha = nn.Parameter(torch.ones(num_resolutions * copies))

    @property
    def ensemble_weights(self) -> Tensor:
        """[R] shares of the resolutions in the ensemble; they add up to 1."""
        return torch.softmax(self.scores, dim=0)

    @property
    def scores(self) -> Tensor:
        """[R] raw scores, whose softmax is the ensemble weights."""
        return scores_of_resolutions(self.alpha.detach(), self.num_resolutions)

    def forward(
        self, logits: Tensor, labels: Tensor, mix: tuple[Tensor, Tensor] | None = None
    ) -> LossTerms:
        """Computes the three terms, in at least float32 whatever autocast says.

        Args:
            logits: [L, N, K], largest resolution first.
            labels: [N] int64 in [0, K).
            mix: for mixed images (Mixup, CutMix), as in `Batch.mix`: [N] int64 classes of their
                partners and [N] float32 weights of their own labels in [0, 1]. Both cross entropies
                then have the two labels in this proportion, smoothed as one is.

        Raises:
            ValueError: naming the argument that the loss is not defined for.
        """
        if hasattr(logits, "levels"):
            raise ValueError(
                "logits must be [L, N, K], got a Pyramid of maps, whose loss is PixelDistillation"
            )
        partner_labels, share = mix or (None, None)
        return self._terms(logits, labels, partner_labels=partner_labels, share=share)

    def _terms(self, logits: Tensor, labels: Tensor, **options: Any) -> LossTerms:
        with torch.autocast(logits.device.type, enabled=False):
            terms = kernels.distillation_loss(
                logits,
                labels,
                self.alpha,
                self.mode,
                self.label_smoothing,
                backend=self.backend,
                **options,
            )
        return LossTerms(*terms)

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{self.num_resolutions}, mode={self.mode!r}"


class _HasLevels(Protocol):
    """A `Pyramid` of logits."""

    def levels(self) -> Sequence[Tensor]: ...


class PixelDistillation(MultiResolutionDistillation):
    """The same loss of every pixel: for networks whose logits are maps.

    The logits of each level are resized to the labels (bilinear, in at least float32), so that all
    levels speak of the same pixels; pixels then are what images are to the loss.

    Args:
        num_resolutions: as of :class:`MultiResolutionDistillation`.
        mode: as there.
        label_smoothing: as there.
        ignore_label: the label of pixels that do not count, None if all do: the terms are averaged
            over the others, and are 0 where there are none.
        copies: as there.
        backend: as there.

    Attributes:
        alpha: as there.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        num_resolutions: int,
        mode: str = "full",
        label_smoothing: float = 0.0,
        *,
        ignore_label: int | None = 255,
        copies: int = 1,
        backend: str = "torch",
    ) -> None:
        super().__init__(num_resolutions, mode, label_smoothing, copies=copies, backend=backend)
        self.ignore_label = ignore_label

    def forward(
        self,
        logits: Tensor | Sequence[Tensor] | _HasLevels,
        labels: Tensor,
        mix: tuple[Tensor, Tensor] | None = None,
    ) -> LossTerms:
        """Computes the three terms, in at least float32 whatever autocast says.

        Args:
            logits: a `Pyramid` of L levels, or their maps [N, K, h, w], largest resolution first.
            labels: [N, H, W] uint8 or int64, in [0, K) or `ignore_label`.
            mix: None; images with masks are not mixed.

        Raises:
            ValueError: if the levels do not fit alpha, each other or the labels.
        """
        if mix is not None:
            raise ValueError("mix must be None: images of which every pixel has a label do not mix")
        levels = tuple(logits.levels() if hasattr(logits, "levels") else logits)
        self._check(levels, labels)
        size = labels.shape[1], labels.shape[2]
        with torch.autocast(labels.device.type, enabled=False):
            rows = _resized_rows(levels, size)
        return self._terms(rows, labels.reshape(-1), ignore_index=self.ignore_label)

    def _check(self, levels: Sequence[Tensor], labels: Tensor) -> None:
        if len(levels) != len(self.alpha):
            raise ValueError(f"logits must have {len(self.alpha)} levels, got {len(levels)}")
        if labels.dim() != 3:
            raise ValueError(f"labels must be [N, H, W], got shape {tuple(labels.shape)}")
        first = levels[0]
        for index, level in enumerate(levels):
            if level.dim() != 4 or level.shape[:2] != (len(labels), first.shape[1]):
                raise ValueError(
                    f"level {index} of logits must be [N, K, h, w] with N = {len(labels)} as in "
                    f"labels and K as in level 0, got shape {tuple(level.shape)}"
                )


def _resized_rows(levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """[L, N * H * W, K] logits of each pixel, from L maps [N, K, h, w]; at least float32."""
    dtype = torch.promote_types(levels[0].dtype, torch.float32)
    maps = [level.to(dtype, memory_format=torch.channels_last) for level in levels]
    if levels[0].is_cuda and torch.are_deterministic_algorithms_enabled():
        # The gradient of the operator adds up in any order there, and is refused.
        resized = [interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps]
        return torch.stack([m.permute(0, 2, 3, 1).flatten(0, 2) for m in resized])
    rows: Tensor = _ResizedRows.apply(size, *maps)
    return rows


class _ResizedRows(torch.autograd.Function):
    """PyTorch's bilinear resizing of several maps into one tensor, without a copy of any."""

    @staticmethod
    def forward(ctx: Any, size: tuple[int, int], *maps: Tensor) -> Tensor:
        ctx.size, ctx.shapes = size, [m.shape for m in maps]
        num_images, num_classes, *_ = maps[0].shape
        num_rows = num_images * size[0] * size[1]
        rows = maps[0].new_empty(len(maps), num_rows, num_classes)
        for level, of_level in zip(maps, rows, strict=True):
            torch.ops.aten.upsample_bilinear2d.out(
                level, size, False, out=_as_maps(of_level, num_images, size)
            )
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            torch.ops.aten.upsample_bilinear2d_backward(
                _as_maps(of_level, shape[0], ctx.size), ctx.size, shape, False
            )
            for of_level, shape in zip(drows, ctx.shapes, strict=True)
        ]
        return None, *gradients


def _as_maps(rows: Tensor, num_images: int, size: tuple[int, int]) -> Tensor:
    """[N, K, H, W] channels-last view of [N * H * W, K] rows."""
    return rows.view(num_images, *size, -1).permute(0, 3, 1, 2)
