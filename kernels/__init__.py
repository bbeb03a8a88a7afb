"""The operations rsfast exists for, each beside its plain PyTorch reference.

This package knows tensors and row ranges only: nothing of networks, data or configuration.
"""

from rsfast.kernels._checks import (
    BACKENDS,
    MAX_LEVELS,
    check_backend,
    choose_backend,
    without_extension,
)
from rsfast.kernels.bn_act_max_pool import bn_act_max_pool, bn_act_max_pool_reference
from rsfast.kernels.conv2d import conv2d, conv2d_reference
from rsfast.kernels.deferred_bn import (
    apply_bn_act,
    batch_moments,
    bn_affine,
    with_moments_gradient,
)
from rsfast.kernels.distillation_loss import (
    DISTILL_MODES,
    distillation_loss,
    distillation_loss_and_gradients,
    distillation_loss_reference,
    teacher_weights,
)
from rsfast.kernels.folded_conv2d import (
    FoldedConvOutput,
    folded_conv2d,
    folded_conv2d_reference,
)
from rsfast.kernels.global_avg_pool import global_avg_pool, global_avg_pool_reference
from rsfast.kernels.normalize import normalize, normalize_reference
from rsfast.kernels.switchable_bn_act import switchable_bn_act, switchable_bn_act_reference

__all__ = [
    "BACKENDS",
    "DISTILL_MODES",
    "FoldedConvOutput",
    "MAX_LEVELS",
    "apply_bn_act",
    "batch_moments",
    "bn_act_max_pool",
    "bn_act_max_pool_reference",
    "bn_affine",
    "check_backend",
    "choose_backend",
    "conv2d",
    "conv2d_reference",
    "distillation_loss",
    "distillation_loss_and_gradients",
    "distillation_loss_reference",
    "folded_conv2d",
    "folded_conv2d_reference",
    "global_avg_pool",
    "global_avg_pool_reference",
    "normalize",
    "normalize_reference",
    "switchable_bn_act",
    "switchable_bn_act_reference",
    "teacher_weights",
    "with_moments_gradient",
    "without_extension",
]
