"""Switchable batch norm: a private set for each resolution, applied when somebody reads it.

Its output is a pyramid whose norm is pending. Adding another pyramid joins the norm, an activation
finishes it, 3x3 max pooling of stride 2 comes on top; who reads the rows launches one kernel for
all of it. A pyramid in between that somebody still holds when the rows are read is computed
itself, and what follows it from its rows: nothing is ever computed twice.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast import kernels
from rsfast.pyramid.content import Content
from rsfast.pyramid.pyramid import Pyramid

__all__ = ["PendingNorm", "SwitchableBatchNorm2d", "moved_by_forward"]

_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


class SwitchableBatchNorm2d(nn.Module):
    """Batch norm with one bank, a private set of parameters and statistics, per resolution.

    Takes and returns a Pyramid; the one returned is pending, and if nobody reads it nothing is
    computed and no statistics move.

    Args:
        num_features: C.
        num_banks: B.
        eps: added to the variance.
        momentum: weight of the batch in the running statistics, as in PyTorch.

    Attributes:
        weight, bias: [B, C], gamma and beta of each bank.
        running_mean, running_var: [B, C]; unbiased variance.
        num_batches_tracked: [B] int64.
        banks_in_use: the banks of the last training forward. An optimiser step must leave all
            others untouched, weight decay included (`rsfast.optim.build_optimizer` does).
        synced: whether training statistics are those of all ranks.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    moved_by_forward = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(
        self, num_features: int, num_banks: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_banks = num_banks
        self.eps = eps
        self.momentum = momentum
        self.banks_in_use = tuple(range(num_banks))
        self.synced = False
        self.weight = nn.Parameter(torch.ones(num_banks, num_features))
        self.bias = nn.Parameter(torch.zeros(num_banks, num_features))
        self.register_buffer("running_mean", torch.zeros(num_banks, num_features))
        self.register_buffer("running_var", torch.ones(num_banks, num_features))
        self.register_buffer("num_batches_tracked", torch.zeros(num_banks, dtype=torch.int64))
        # A tuple, so that it is no child: the layer that this one stands in for.
        self._plain: tuple[nn.BatchNorm2d, ...] = ()

    @classmethod
    def of(cls, plain: nn.BatchNorm2d, num_banks: int) -> SwitchableBatchNorm2d:
        """Banks that all are copies of a plain layer, on its device and of its type.

        What the layer does after normalising (timm's activation and dropout) comes along under the
        same names.
        """
        assert plain.momentum is not None
        norm = cls(plain.num_features, num_banks, plain.eps, plain.momentum)
        norm.to(plain.weight)
        with torch.no_grad():
            for name in ("weight", "bias", *cls.moved_by_forward):
                getattr(norm, name).copy_(getattr(plain, name).expand_as(getattr(norm, name)))
        for name, child in plain.named_children():
            norm.add_module(name, child)
        norm._plain = (copy.deepcopy(plain).to("meta"),)
        return norm.train(plain.training)

    def single(self, mixture: Sequence[tuple[int, float]]) -> nn.BatchNorm2d:
        """The plain layer again, whose values are a weighted sum of banks.

        Args:
            mixture: (bank, weight) pairs; the weights add up to 1.
        """
        norm = (
            copy.deepcopy(self._plain[0])
            if self._plain
            else nn.BatchNorm2d(self.num_features, self.eps, self.momentum, device="meta")
        )
        norm.to(self.weight.dtype).to_empty(device=self.weight.device)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                banks = getattr(self, name)
                getattr(norm, name).copy_(sum(share * banks[bank] for bank, share in mixture))
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.copy_(self.num_batches_tracked[mixture[0][0]])
        for name, child in self.named_children():
            setattr(norm, name, copy.deepcopy(child))
        return norm

    def forward(self, x: Pyramid) -> Pyramid:
        if not isinstance(x, Pyramid):
            raise TypeError(
                f"a switchable batch norm takes a pyramid, which says whose images these are, got "
                f"a tensor of shape {tuple(x.shape)}"
            )
        banks = x.banks if x.banks is not None else tuple(range(x.num_levels))
        if self.training:
            self._check_counts(x)
            self.banks_in_use = tuple(sorted(set(banks)))
        pending = PendingNorm(self, x.like(x.content), banks, self.training)
        y = x.like(Content(pending=pending))
        for child in self.children():
            y = child(y)
        return y

    def _check_counts(self, x: Pyramid) -> None:
        """As PyTorch's own: one value has no variance, and its norm is the bias, whatever it is."""
        if x.num_images == 1 and (1, 1) in x.sizes:
            if self.synced and dist.is_initialized() and dist.get_world_size() > 1:
                return
            raise ValueError(
                f"a batch norm that trains must see more than one value per channel, got a batch "
                f"of 1 with maps of {x.sizes}: take a larger batch or larger images"
            )

    def extra_repr(self) -> str:
        return f"{self.num_features}, banks={self.num_banks}, eps={self.eps}"


@dataclass(frozen=True, eq=False)
class PendingNorm:
    """A batch norm, and what has joined it, that nobody has read; see `Pending`.

    Attributes:
        norm: the layer.
        x: what it normalises.
        banks: the bank of each level.
        training: whether it takes and tracks the statistics of the batch.
        residual: what is added after it.
        activation: what follows, a name of `rsfast.kernels`.
        pool: whether 3x3 max pooling of stride 2 comes last.
        gradients: whether they flow through it.
        earlier: the pyramids that it continues, and what they were: computed if they are alive.
    """

    norm: SwitchableBatchNorm2d
    x: Pyramid
    banks: tuple[int, ...]
    training: bool
    residual: Pyramid | None = None
    activation: str | None = None
    pool: bool = False
    gradients: bool = True
    earlier: tuple[tuple[weakref.ref[Content], PendingNorm], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "gradients", torch.is_grad_enabled())

    @property
    def num_channels(self) -> int:
        """C; computes nothing."""
        return self.norm.num_features

    @property
    def like(self) -> Tensor:
        """Of the dtype and device of the rows."""
        return self.x.content.sample

    def with_residual(self, content: Content, other: Pyramid) -> PendingNorm | None:
        """With another pyramid added; None if something has come in between."""
        joined = self.residual is not None or self.activation is not None or self.pool
        if joined or other.dtype != self.like.dtype or other.num_channels != self.num_channels:
            return None
        return self._continue(content, residual=other.like(other.content))

    def with_activation(self, content: Content, activation: str) -> PendingNorm | None:
        """With an activation; None if there is one."""
        if self.activation is not None or self.pool:
            return None
        if self.x.backend == "cuda" and self.training and activation in ("silu", "hardswish"):
            return None  # its kernels do not know them
        return self._continue(content, activation=activation)

    def pooled(self, content: Content) -> PendingNorm | None:
        """With max pooling; None where no kernel computes both."""
        by_itself = self.activation in (None, "relu", "relu6") and self.residual is None
        if self.pool or not by_itself or self.x.backend == "torch":
            return None
        return self._continue(content, pool=True)

    def _continue(self, content: Content, **what: Any) -> PendingNorm:
        earlier = (*self.earlier, (weakref.ref(content), self))
        return replace(self, **what, earlier=earlier)

    def compute(self) -> Content:
        """One kernel for all of it, or what is left after a pyramid that is still in use."""
        with torch.set_grad_enabled(self.gradients):
            for reference, before in reversed(self.earlier):
                content = reference()
                if content is not None:
                    return self._after(before, content).content.get()
            return self._launch()

    def _after(self, before: PendingNorm, content: Content) -> Pyramid:
        """What this adds to an earlier one, from the earlier one's rows."""
        y: Any = self.x.like(content.get())  # to torch functions a tensor
        if self.residual is not None and before.residual is None:
            y = y + self.residual
        if self.activation is not None and before.activation is None:
            y = y.map_rows(_ACTIVATIONS[self.activation])
        if self.pool:
            y = F.max_pool2d(y, 3, 2, 1)
        return y

    def _launch(self) -> Content:
        norm, x = self.norm, self.x
        tensors = (
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            norm.num_batches_tracked,
        )
        options: dict[str, Any] = {
            "activation": self.activation,
            "training": self.training,
            "momentum": norm.momentum,
            "eps": norm.eps,
            "synced": norm.synced,
        }
        residual = self.residual
        if self.pool:
            geometry = x.sizes, x.num_images, self.banks
            options["backend"] = x.backend
            rows = kernels.bn_act_max_pool(x.rows, *tensors, *geometry, **options)
            return Content(rows=rows)
        if x.is_packed:
            options["residual"] = None if residual is None else self._rows_to_add(residual)
            levels = x.level_rows, self.banks
            rows = kernels.switchable_bn_act(
                x.rows, *tensors, *levels, **options, backend=x.backend
            )
            return Content(rows=rows)
        options["residual"] = None if residual is None else residual.parts
        return Content(
            parts=kernels.switchable_bn_act_levels(x.parts, *tensors, self.banks, **options)
        )

    def _rows_to_add(self, residual: Pyramid) -> Tensor:
        # Its gradient is a tensor of its own behind a fused kernel's activation only.
        is_own = self.activation is not None and self.x.backend != "torch"
        return residual.handed_on if is_own else residual.rows


def moved_by_forward(module: nn.Module) -> list[Tensor]:
    """All state that a training forward moves: statistics and counters, in order of the modules.

    A module says which of its buffers these are by an attribute of this name.
    """
    return [
        getattr(child, name)
        for child in module.modules()
        for name in getattr(child, "moved_by_forward", ())
    ]
