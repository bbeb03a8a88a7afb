"""Every few pixels of packed rows, as a strided 1x1 convolution reads them."""

from rsfast.kernels.subsample.op import subsample, subsample_gradient
from rsfast.kernels.subsample.reference import subsample_reference

__all__ = ["subsample", "subsample_gradient", "subsample_reference"]
