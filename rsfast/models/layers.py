"""The layers of an RS-Net: what `torch.nn` has, over all levels of a Pyramid at once.

Each layer also knows its `single` counterpart, a plain `torch.nn` module for one resolution, so
that a network written once serves training (pyramids) and deployment (tensors).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast import kernels
from rsfast.models.deferred import DeferredPyramid, PendingNorm
from rsfast.pyramid import Pyramid

__all__ = [
    "BatchNormAct2d",
    "Conv2d",
    "MaxPool2d",
    "SwitchableBatchNorm2d",
    "global_avg_pool",
    "running_statistics",
]


class Conv2d(nn.Conv2d):
    """Convolution without bias, shared by all levels; "same" padding for odd kernels.

    A 1x1 convolution is one matrix product over the packed rows. Larger kernels run level by
    level, from and into packed rows. The weight is kept in channels-last memory format and, under
    autocast, cast once. An input with more channels than the weight has (images padded with zeros)
    meets zeros there.

    Attributes:
        measured: whether, in training, it hands the statistics of its output to the batch norm
            behind it.
        folded: whether it then also applies the batch norm that is pending on its input.
        backend: what computes a measured one, "torch" or "triton".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
        self.measured = False
        self.folded = False
        self.backend = "torch"

    def forward(self, x: Pyramid) -> Pyramid:  # type: ignore[override]
        if self.measured and self.training:
            return self._fold(x)
        step = self.stride[0]
        if self._is_product():
            x = self._strided(x)
            return x.with_rows(F.linear(x.rows, self.weight.flatten(1)))
        dtype = _autocast_dtype(x.rows)
        weight = self.weight.to(dtype)
        if x.num_channels > self.in_channels:
            weight = F.pad(weight, (0, 0, 0, 0, 0, x.num_channels - self.in_channels))
        rows = kernels.conv2d(x.rows.to(dtype), weight, x.sizes, x.num_images, step, self.groups)
        return Pyramid(rows, self._out_sizes(x, step), x.num_images, x.banks)

    def _is_product(self) -> bool:
        return self.kernel_size == (1, 1) and self.groups == 1

    def _strided(self, x: Pyramid) -> Pyramid:
        """The pixels that a 1x1 convolution reads."""
        step = self.stride[0]
        if step == 1:
            return x
        return Pyramid.pack([v[:, :, ::step, ::step] for v in x.levels()], x.banks)

    def _fold(self, x: Pyramid) -> Pyramid:
        step = self.stride[0]
        affine: dict[str, Any] = {}
        if self.folded and isinstance(x, DeferredPyramid):
            rows, affine = x.pending.as_affine()
        else:
            if self._is_product():
                x, step = self._strided(x), 1
            rows = x.rows
        dtype = _autocast_dtype(rows)
        y, mean, var = kernels.folded_conv2d(
            rows.to(dtype),
            self.weight.to(dtype),
            x.sizes,
            x.num_images,
            stride=step,
            **affine,
            backend=self.backend,
        )
        return Pyramid(y, self._out_sizes(x, step), x.num_images, x.banks, (mean, var))

    def _out_sizes(self, x: Pyramid, step: int) -> tuple[tuple[int, int], ...]:
        return tuple((-(-height // step), -(-width // step)) for height, width in x.sizes)

    def single(self) -> nn.Conv2d:
        """A plain convolution with a copy of the weight."""
        size, stride = self.kernel_size[0], self.stride[0]
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            size,
            stride=stride,
            padding=size // 2,
            groups=self.groups,
            bias=False,
        )
        conv.weight = nn.Parameter(self.weight.detach().clone())
        return conv


class SwitchableBatchNorm2d(nn.Module):
    """Batch norm with one private set per resolution, then residual add and activation.

    Attributes:
        weight, bias: [B, C], gamma and beta of each set.
        running_mean, running_var: [B, C]; unbiased variance; momentum 0.1 as in PyTorch.
        num_batches_tracked: [B] int64.
        banks_in_use: the sets of the last training forward. An optimiser step must leave all
            others untouched, weight decay included (`rsfast.engine.optim.build_optimizer` does).
        backend: what computes it, "torch", "triton" or "cuda".
        synced: whether training statistics are those of all ranks.
        deferred: whether a training batch norm without residual is left to what reads its output.
            Not if it is synced.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, num_banks: int, activation: str | None = None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_banks = num_banks
        self.activation = activation
        self.eps = eps
        self.momentum = 0.1
        self.banks_in_use = tuple(range(num_banks))
        self.backend = "torch"
        self.synced = False
        self.deferred = False
        self.weight = nn.Parameter(torch.ones(num_banks, num_features))
        self.bias = nn.Parameter(torch.zeros(num_banks, num_features))
        self.register_buffer("running_mean", torch.zeros(num_banks, num_features))
        self.register_buffer("running_var", torch.ones(num_banks, num_features))
        self.register_buffer("num_batches_tracked", torch.zeros(num_banks, dtype=torch.int64))

    def forward(self, x: Pyramid, residual: Pyramid | None = None) -> Pyramid:
        banks = x.banks if x.banks is not None else tuple(range(x.num_levels))
        if self.training:
            self.banks_in_use = tuple(sorted(set(banks)))
        if self.training and self.deferred and not self.synced:
            pending = self._measure(x, banks)
            if residual is None:
                return DeferredPyramid(pending)
            return x.with_rows(pending.apply(residual.rows))
        rows = kernels.switchable_bn_act(
            x.rows,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            x.level_rows,
            banks,
            residual=None if residual is None else residual.rows,
            activation=self.activation,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            synced=self.synced,
            backend=self.backend,
        )
        return x.with_rows(rows)

    def _measure(self, x: Pyramid, banks: tuple[int, ...]) -> PendingNorm:
        """Statistics of x, tracked, and nothing else."""
        mean, var = kernels.batch_moments(
            x.rows,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            x.level_rows,
            banks,
            known=x.moments,
            momentum=self.momentum,
            backend=self.backend,
        )
        settings = banks, self.activation, self.eps, self.backend
        return PendingNorm(x, mean, var, self.weight, self.bias, *settings)

    def single(self, mixture: Sequence[tuple[int, float]]) -> BatchNormAct2d:
        """Plain batch norm whose parameters and statistics are a weighted sum of sets.

        Args:
            mixture: (set, weight) pairs; the weights add up to 1.
        """
        norm = BatchNormAct2d(self.num_features, self.activation, self.eps).to(self.weight)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                banks = getattr(self, name)
                mixed = sum(share * banks[bank] for bank, share in mixture)
                getattr(norm, name).copy_(mixed)
        return norm

    def extra_repr(self) -> str:
        return f"{self.num_features}, banks={self.num_banks}, activation={self.activation}"


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances of all batch-norm layers below a module."""
    norms = (m for m in module.modules() if isinstance(m, SwitchableBatchNorm2d))
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]


class BatchNormAct2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, then residual add and activation, for one resolution."""

    def __init__(self, num_features: int, activation: str | None, eps: float) -> None:
        super().__init__(num_features, eps=eps)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        if residual is not None:
            y = y + residual
        if self.activation == "relu":
            return F.relu(y)
        return F.relu6(y) if self.activation == "relu6" else y


class MaxPool2d(nn.MaxPool2d):
    """Max pooling of every level; one of 3x3 with stride 2 applies what is pending on its input."""

    def forward(self, x: Pyramid) -> Pyramid:  # type: ignore[override]
        is_fused = (self.kernel_size, self.stride, self.padding) == (3, 2, 1)
        # In plain PyTorch it would be pooled as below, but with gradients in any order.
        if is_fused and isinstance(x, DeferredPyramid) and x.pending.backend != "torch":
            sizes = tuple((-(-height // 2), -(-width // 2)) for height, width in x.sizes)
            return Pyramid(x.pending.max_pool(), sizes, x.num_images, x.banks)
        in_order = x.rows.is_cuda and torch.are_deterministic_algorithms_enabled()
        pool = self.in_order if in_order else super().forward
        return Pyramid.pack([pool(level) for level in x.levels()], x.banks)

    def in_order(self, level: Tensor) -> Tensor:
        """As ever, with a gradient that is added up in the same order in every run."""
        return _MaxPool.apply(level, self.kernel_size, self.stride, self.padding)

    def single(self) -> nn.MaxPool2d:
        """Plain max pooling."""
        return nn.MaxPool2d(self.kernel_size, self.stride, self.padding)


def global_avg_pool(x: Pyramid, backend: str = "torch") -> Tensor:
    """[L, N, C]: the mean of each image's pixels."""
    pooled = kernels.global_avg_pool(x.rows, x.level_rows, x.num_images, backend=backend)
    return pooled.view(x.num_levels, x.num_images, x.num_channels)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast would compute a convolution of `x` in."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype


class _MaxPool(torch.autograd.Function):
    """PyTorch's CUDA kernel adds gradients of overlapping windows in any order; this does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        y, largest = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
        ctx.save_for_backward(largest)
        ctx.shape, ctx.geometry = x.shape, (kernel, stride, padding)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (largest,) = ctx.saved_tensors
        dy, (kernel, stride, padding) = grads[0], ctx.geometry
        n, c, height, width = ctx.shape
        rows, cols = (stride * torch.arange(size, device=dy.device) for size in dy.shape[2:])
        reach_y, reach_x = (stride * size + kernel for size in dy.shape[2:])
        padded = dy.new_zeros(n, c, reach_y, reach_x)
        for y in range(kernel):
            for x in range(kernel):
                # Position in the image of the pixel that each window has at (y, x).
                col = cols + (x - padding)
                pixel = (rows[:, None] + (y - padding)) * width + col
                pixel = torch.where((col >= 0) & (col < width), pixel, -1)
                part = padded[:, :, y : y + stride * dy.shape[2] : stride]
                part = part[:, :, :, x : x + stride * dy.shape[3] : stride]
                part += torch.where(largest == pixel, dy, 0.0)
        dx = padded[:, :, padding : padding + height, padding : padding + width]
        return F.pad(dx, (0, width - dx.shape[3], 0, height - dx.shape[2])), None, None, None
