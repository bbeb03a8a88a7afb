"""Learned quantisation of activations, of all levels in one pass."""

from rsfast.kernels.lq_activation.reference import lq_activation_levels

__all__ = ["lq_activation_levels"]
