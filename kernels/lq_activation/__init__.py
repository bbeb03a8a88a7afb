"""Learned quantisation of activations, of all levels in one pass."""

from rsfast.kernels.lq_activation.op import lq_activation
from rsfast.kernels.lq_activation.reference import lq_activation_levels, lq_activation_reference

__all__ = ["lq_activation", "lq_activation_levels", "lq_activation_reference"]
