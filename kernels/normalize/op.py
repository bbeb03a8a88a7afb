"""Pixels as bytes to what the first convolution reads: normalised, cast, channels padded with 0.

    y[m, c] = (x[m, c] / 255 - mean[c]) / std[c]  for the 3 colours, 0 for the channels after them

Tensor cores want the channels of an input in groups; 3 is none. With `channels` above 3 the rows
are padded, and a convolution whose weight is padded alike gives the same output.
Layout: x is [M, 3] contiguous uint8, rows of all levels one after another; y is [M, C] contiguous.
Bytes per pixel: 3 read, C elements written, in one launch with backend "triton".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsfast.kernels.common.backend import check_backend, load_kernels
from rsfast.kernels.common.checks import KERNEL_DTYPES
from rsfast.kernels.normalize.reference import affine, normalize_reference

__all__ = ["normalize"]


@torch.library.custom_op("rsfast::normalize", mutates_args=())
def _normalize(
    x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, channels: int
) -> Tensor:
    y = x.new_empty(x.shape[0], channels, dtype=dtype)
    load_kernels("normalize.forward").launch(x, y, *affine(mean, std))
    return y


@_normalize.register_fake
def _(
    x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, channels: int
) -> Tensor:
    return x.new_empty(x.shape[0], channels, dtype=dtype)


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
