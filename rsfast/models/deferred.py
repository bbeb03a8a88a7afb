"""Deferred normalisation: a Pyramid whose batch norm waits for whoever reads it.

A folded convolution or the stem's pooling applies it on the way in, which saves passes over the
pixels; for anything else that asks for the rows it is applied then, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsfast import kernels
from rsfast.pyramid import Pyramid

__all__ = ["DeferredPyramid", "PendingNorm"]


@dataclass(frozen=True, slots=True)
class PendingNorm:
    """A training batch norm that has its statistics and has not been applied.

    Attributes:
        x: what it normalises.
        mean, var: [L, C] of each level of x, biased; differentiable where `x.moments` are.
        weight, bias: [B, C] gamma and beta of each set.
        banks: the set of each level.
        activation: None, "relu" or "relu6", what follows.
        eps: added to the variance.
        backend: what computes it, "torch" or "triton".
    """

    x: Pyramid
    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    banks: tuple[int, ...]
    activation: str | None
    eps: float
    backend: str

    def apply(self, residual: Tensor | None = None) -> Tensor:
        """[M, C], normalised, with what is added to it, activated."""
        return kernels.apply_bn_act(
            self.x.rows,
            self.weight,
            self.bias,
            self.mean,
            self.var,
            self.x.level_rows,
            self.banks,
            residual=residual,
            activation=self.activation,
            eps=self.eps,
            backend=self.backend,
        )

    def as_affine(self) -> tuple[Tensor, dict[str, Any]]:
        """The rows as they are, and what `rsfast.kernels.folded_conv2d` is to do with them."""
        rows, mean, var = self.x.rows, self.mean, self.var
        if self.x.moments is None:
            rows, mean, var = kernels.with_moments_gradient(
                rows, mean, var, self.x.level_rows, backend=self.backend
            )
        scale, shift = kernels.bn_affine(
            var, self.weight, self.bias, self.banks, eps=self.eps, backend=self.backend
        )
        affine = {"center": mean, "scale": scale, "shift": shift}
        return rows, {**affine, "activation": self.activation}

    def max_pool(self) -> Tensor:
        """Normalised, activated and pooled, 3x3 with stride 2."""
        return kernels.bn_act_max_pool(
            self.x.rows,
            self.weight,
            self.bias,
            self.mean,
            self.var,
            self.x.sizes,
            self.x.num_images,
            self.banks,
            activation=self.activation,
            eps=self.eps,
            backend=self.backend,
        )


class DeferredPyramid(Pyramid):
    """A Pyramid that computes its rows when they are first asked for.

    Attributes:
        pending: what is to be applied. Who reads it instead of the rows has to apply it.
    """

    __slots__ = ("_rows", "pending")

    pending: PendingNorm
    _rows: Tensor | None

    def __init__(self, pending: PendingNorm) -> None:
        x = pending.x
        values = {"sizes": x.sizes, "num_images": x.num_images, "banks": x.banks, "moments": None}
        for name, value in {**values, "pending": pending, "_rows": None}.items():
            object.__setattr__(self, name, value)  # as a frozen dataclass does it

    @property
    def rows(self) -> Tensor:
        """[M, C], normalised."""
        if self._rows is not None:
            return self._rows
        rows = self.pending.apply()
        if torch.is_grad_enabled():  # a reader without gradients must not take those of others
            object.__setattr__(self, "_rows", rows)
        return rows

    def __repr__(self) -> str:  # that of a dataclass would apply it
        return f"DeferredPyramid(C={self.num_channels}, sizes={self.sizes}, banks={self.banks})"

    @property
    def num_channels(self) -> int:
        """C; applies nothing."""
        return self.pending.x.num_channels
