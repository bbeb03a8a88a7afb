"""What the loss asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from rsfast.kernels.common.checks import check_companion, check_kernel_dtype
from rsfast.kernels.distillation_loss.reference import DISTILL_MODES

__all__ = ["check_arguments", "check_for_triton"]

MAX_RESOLUTIONS = 8  # of the Triton kernel: registers
LABEL_DTYPES = (torch.int64, torch.uint8)


def check_arguments(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str,
    label_smoothing: float,
    partner_labels: Tensor | None,
    share: Tensor | None,
    ignore_index: int | None,
) -> None:
    """Refuses what the loss is not defined for; arguments as in :func:`distillation_loss`.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point [R, N, K], got {logits.dtype} {tuple(logits.shape)}"
        )
    num_resolutions, num_images, num_classes = logits.shape
    _check_labels("labels", labels, num_images, num_classes, LABEL_DTYPES, ignore_index)
    if alpha.shape != (num_resolutions,):
        raise ValueError(f"alpha must be [{num_resolutions}], got shape {tuple(alpha.shape)}")
    if mode not in DISTILL_MODES:
        raise ValueError(f"mode must be one of {DISTILL_MODES}, got {mode!r}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if ignore_index is not None and partner_labels is not None:
        raise ValueError(
            "ignore_index must be None where images are mixed: a row of which one label counts and "
            f"the other does not has no loss, got {ignore_index} and partner_labels"
        )
    if partner_labels is not None and share is not None:
        _check_labels("partner_labels", partner_labels, num_images, num_classes)
        _check_share(share, num_images)
        for name, tensor in (("partner_labels", partner_labels), ("share", share)):
            if tensor.device != logits.device:
                raise ValueError(
                    f"{name} must be on {logits.device} like logits, got {tensor.device}"
                )
    elif partner_labels is not None or share is not None:
        raise ValueError(
            "partner_labels and share must be given together, "
            f"got only {'partner_labels' if share is None else 'share'}"
        )


def _check_labels(
    name: str,
    labels: Tensor,
    num_images: int,
    num_classes: int,
    dtypes: tuple[torch.dtype, ...] = (torch.int64,),
    ignore_index: int | None = None,
) -> None:
    if labels.dtype not in dtypes or labels.shape != (num_images,):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be {names} [{num_images}], got {labels.dtype} {tuple(labels.shape)}"
        )
    # Torch compares bytes with a number's last byte: with -100, label 156 would not count.
    if ignore_index is not None and labels.dtype == torch.uint8 and not 0 <= ignore_index <= 255:
        raise ValueError(
            f"ignore_index must be in [0, 256) for uint8 labels, or None, got {ignore_index}"
        )
    if not _has_values(labels):
        return
    counted = labels if ignore_index is None else labels[labels != ignore_index]
    if counted.numel():
        low, high = counted.aminmax()
        if low < 0 or high >= num_classes:
            ignored = "" if ignore_index is None else f" or ignore_index ({ignore_index})"
            raise ValueError(
                f"{name} must be in [0, {num_classes}){ignored}, got values from {low} to {high}"
            )


def _check_share(share: Tensor, num_images: int) -> None:
    if share.dtype != torch.float32 or share.shape != (num_images,):
        raise ValueError(
            f"share must be float32 [{num_images}], got {share.dtype} {tuple(share.shape)}"
        )
    if _has_values(share):
        low, high = share.aminmax()
        if not (low >= 0 and high <= 1):  # also NaN
            raise ValueError(f"share must be in [0, 1], got values from {low} to {high}")


def _has_values(tensor: Tensor) -> bool:
    """Whether there are some on the CPU; the compiler cannot trace a branch on them."""
    on_cpu = tensor.device.type == "cpu" and tensor.numel() > 0
    return on_cpu and not torch.compiler.is_compiling()


def check_for_triton(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    partner_labels: Tensor | None,
    share: Tensor | None,
) -> None:
    """Refuses what is defined and the Triton kernel does not compute.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    check_kernel_dtype("logits", logits)
    if not logits.is_contiguous() or not logits.numel() or len(logits) > MAX_RESOLUTIONS:
        raise ValueError(
            f"logits must be contiguous, not empty, with at most {MAX_RESOLUTIONS} resolutions, "
            f"got shape {tuple(logits.shape)}, strides {logits.stride()}"
        )
    check_companion("labels", labels, labels.dtype, logits.device)
    check_companion("alpha", alpha, torch.float32, logits.device)
    if partner_labels is not None and share is not None:
        check_companion("partner_labels", partner_labels, torch.int64, logits.device)
        check_companion("share", share, torch.float32, logits.device)
