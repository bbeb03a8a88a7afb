"""Convolution of every level with one weight, from packed rows into packed rows or by level."""

from rsfast.kernels.common.windows import conv2d_sizes
from rsfast.kernels.conv2d.by_level import conv2d_levels
from rsfast.kernels.conv2d.op import conv2d
from rsfast.kernels.conv2d.reference import conv2d_reference

__all__ = ["conv2d", "conv2d_levels", "conv2d_reference", "conv2d_sizes"]
