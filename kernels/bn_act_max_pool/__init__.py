"""Batch norm, activation and 3x3 max pooling of stride 2, in one pass."""

from rsfast.kernels.bn_act_max_pool.op import bn_act_max_pool
from rsfast.kernels.bn_act_max_pool.reference import bn_act_max_pool_reference

__all__ = ["bn_act_max_pool", "bn_act_max_pool_reference"]
