"""Pixels as bytes to what the first convolution reads: normalised, cast, channels padded with 0.

    y[m, c] = (x[m, c] / 255 - mean[c]) / std[c]  for the 3 colours, 0 for the channels after them

Tensor cores want the channels of an input in groups; 3 is none. With `channels` above 3 the rows
are padded, and a convolution whose weight is padded alike gives the same output.
Layout: x is [M, 3] contiguous uint8, rows of all levels one after another; y is [M, C] contiguous.
Bytes per pixel: 3 read, C elements written, in one launch with backend "triton".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rsfast.kernels._checks import KERNEL_DTYPES, check_backend, load_kernels

__all__ = ["normalize", "normalize_reference"]


def normalize_reference(
    x: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
) -> Tensor:
    """Plain PyTorch; arguments as in :func:`normalize`."""
    compute = torch.promote_types(dtype, torch.float32)
    scale, shift = _affine_tensors(tuple(mean), tuple(std), compute, x.device)
    y = x.to(compute).mul_(scale).add_(shift).to(dtype)
    return torch.nn.functional.pad(y, (0, channels - 3)) if channels > 3 else y


@functools.cache
def _affine_tensors(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Made once: a copy to a GPU for every batch would be waited for."""
    return [torch.tensor(part, dtype=dtype, device=device) for part in _affine(mean, std)]


@torch.library.custom_op("rsfast::normalize", mutates_args=())
def _normalize(
    x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, channels: int
) -> Tensor:
    y = x.new_empty(x.shape[0], channels, dtype=dtype)
    load_kernels("_normalize_triton").launch(x, y, *_affine(mean, std))
    return y


@_normalize.register_fake
def _(
    x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, channels: int
) -> Tensor:
    return x.new_empty(x.shape[0], channels, dtype=dtype)


def _affine(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    scale = [1.0 / (255.0 * part) for part in std]
    return scale, [-m / part for m, part in zip(mean, std, strict=True)]


def normalize(
    x: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
    backend: str = "torch",
) -> Tensor:
    """Normalises packed pixels.

    Args:
        x: [M, 3] contiguous uint8, RGB. For "triton" not empty.
        mean: 3 means of values in [0, 1].
        std: 3 standard deviations, positive.
        dtype: of the result; float16, bfloat16 or float32, for "torch" also float64.
        channels: C of the result, at least 3.
        backend: "torch" for the reference, "triton" for the fused kernel.

    Returns:
        [M, C].

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if Triton is asked for and absent.
    """
    if x.dtype != torch.uint8 or x.dim() != 2 or x.shape[1] != 3 or not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous uint8 [M, 3], got {x.dtype} of shape {tuple(x.shape)}, "
            f"strides {x.stride()}"
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise ValueError(
                f"{name} must be 3 numbers (std positive ones), one per colour, got {tuple(values)}"
            )
    if channels < 3:
        raise ValueError(f"channels must be at least 3, got {channels}")
    if check_backend(backend) == "torch":
        return normalize_reference(x, mean, std, dtype=dtype, channels=channels)
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if not len(x):
        raise ValueError("x must have at least one row, got none")
    return _normalize(x, tuple(mean), tuple(std), dtype, channels)
