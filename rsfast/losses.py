"""The training loss of an RS-Net."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rsfast import kernels

__all__ = ["LossTerms", "MultiResolutionDistillation", "scores_of_resolutions"]


class LossTerms(NamedTuple):
    """The terms of the loss, scalars in nats, averaged over the batch.

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
        """
        partner_labels, share = mix or (None, None)
        with torch.autocast(logits.device.type, enabled=False):
            terms = kernels.distillation_loss(
                logits,
                labels,
                self.alpha,
                self.mode,
                self.label_smoothing,
                partner_labels=partner_labels,
                share=share,
                backend=self.backend,
            )
        return LossTerms(*terms)

    def extra_repr(self) -> str:
        """Shown by `print`."""
        return f"{self.num_resolutions}, mode={self.mode!r}"
