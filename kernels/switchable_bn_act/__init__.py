"""Batch norm with private banks per level, residual add and activation, over packed rows."""

from rsfast.kernels.switchable_bn_act.op import switchable_bn_act
from rsfast.kernels.switchable_bn_act.reference import (
    ACTIVATIONS,
    switchable_bn_act_levels,
    switchable_bn_act_reference,
)

__all__ = [
    "ACTIVATIONS",
    "switchable_bn_act",
    "switchable_bn_act_levels",
    "switchable_bn_act_reference",
]
