"""Pixels as bytes to what the first convolution reads."""

from rsfast.kernels.normalize.op import normalize
from rsfast.kernels.normalize.reference import normalize_reference

__all__ = ["normalize", "normalize_reference"]
