"""The operations rsfast exists for, each beside its plain PyTorch reference.

This package knows tensors and row ranges only: nothing of networks, data or configuration.
A folder per operation; `rsfast.kernels.X` is the function X, `rsfast.kernels.X.op` its module.
"""

from rsfast.kernels.bn_act_max_pool import bn_act_max_pool, bn_act_max_pool_reference
from rsfast.kernels.common.backend import (
    BACKENDS,
    check_backend,
    choose_backend,
)
from rsfast.kernels.common.levels import MAX_LEVELS
from rsfast.kernels.conv2d import conv2d, conv2d_levels, conv2d_reference, conv2d_sizes
from rsfast.kernels.distillation_loss import (
    DISTILL_MODES,
    distillation_loss,
    distillation_loss_and_gradients,
    distillation_loss_reference,
    teacher_weights,
)
from rsfast.kernels.global_avg_pool import global_avg_pool, global_avg_pool_reference
from rsfast.kernels.lq_activation import (
    lq_activation,
    lq_activation_levels,
    lq_activation_reference,
)
from rsfast.kernels.normalize import normalize, normalize_reference
from rsfast.kernels.subsample import subsample, subsample_gradient, subsample_reference
from rsfast.kernels.switchable_bn_act import (
    ACTIVATIONS,
    switchable_bn_act,
    switchable_bn_act_levels,
    switchable_bn_act_reference,
)

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "DISTILL_MODES",
    "MAX_LEVELS",
    "bn_act_max_pool",
    "bn_act_max_pool_reference",
    "check_backend",
    "choose_backend",
    "conv2d",
    "conv2d_levels",
    "conv2d_reference",
    "conv2d_sizes",
    "distillation_loss",
    "distillation_loss_and_gradients",
    "distillation_loss_reference",
    "global_avg_pool",
    "global_avg_pool_reference",
    "lq_activation",
    "lq_activation_levels",
    "lq_activation_reference",
    "normalize",
    "normalize_reference",
    "subsample",
    "subsample_gradient",
    "subsample_reference",
    "switchable_bn_act",
    "switchable_bn_act_levels",
    "switchable_bn_act_reference",
    "teacher_weights",
]
