"""Cross entropy, ensemble cross entropy and distillation between R resolutions."""

from rsfast.kernels.distillation_loss.op import (
    distillation_loss,
    distillation_loss_and_gradients,
)
from rsfast.kernels.distillation_loss.reference import (
    DISTILL_MODES,
    DistillationTerms,
    distillation_loss_reference,
    teacher_weights,
)

__all__ = [
    "DISTILL_MODES",
    "DistillationTerms",
    "distillation_loss",
    "distillation_loss_and_gradients",
    "distillation_loss_reference",
    "teacher_weights",
]
