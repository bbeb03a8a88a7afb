"""The kernels of the loss beside plain PyTorch, both against float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_helpers import max_error
from rsfast.kernels import distillation_loss, distillation_loss_reference, teacher_weights

__all__ = [
    "DRAWS",
    "UPSTREAMS",
    "Inputs",
    "Results",
    "assert_as_good_as_pytorch",
    "loss_of_each_row",
    "run",
]

UPSTREAMS = {
    "total": (1.0, 1.0, 1.0),
    "apart": (2.0, -3.0, 0.5),
    "distill": (0.0, 0.0, 1.0),
    "scaled": (1024.0, 1024.0, 1024.0),
}

Inputs = tuple[Tensor, ...]  # logits, labels, alpha; then partner labels and shares, if any
DRAWS = 4


class Results(NamedTuple):
    ce: Tensor
    ensemble: Tensor
    distill: Tensor
    dlogits: Tensor
    dalpha: Tensor


def run(
    function: Any,
    inputs: Inputs,
    upstream: tuple[float, ...] = UPSTREAMS["apart"],
    **options: Any,
) -> Results:
    logits, labels, alpha, *mix = inputs
    options |= dict(zip(("partner_labels", "share"), mix, strict=False))
    logits = logits.detach().requires_grad_()
    alpha = alpha.detach().requires_grad_()
    terms = function(logits, labels, alpha, **options)
    total = sum(factor * term for factor, term in zip(upstream, terms, strict=True))
    grads = torch.autograd.grad(total, (logits, alpha))
    return Results(*(term.detach() for term in terms), *grads)


def loss_of_each_row(
    logits: Tensor,
    labels: Tensor,
    alpha: Tensor,
    mode: str = "full",
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 1 to 10, row by row: the mean over those whose label is not `ignore_index`."""
    num_resolutions, _, num_classes = logits.shape
    table = teacher_weights(mode, num_resolutions)
    shares = torch.softmax(alpha, dim=0)
    sums = [logits.new_zeros(()) for _ in range(3)]
    counted = 0
    for row, label in enumerate(labels.tolist()):
        if label == ignore_index:
            continue
        counted += 1
        target = logits.new_full((num_classes,), label_smoothing / num_classes)
        target[label] += 1 - label_smoothing
        students = [torch.log_softmax(z[row], dim=0) for z in logits]
        mean = sum(share * z[row].detach() for share, z in zip(shares, logits, strict=True))
        ensemble = torch.log_softmax(mean, dim=0)
        teachers = [log_probs.detach() for log_probs in (ensemble, *students)]
        sums[0] = sums[0] - sum((target * log_probs).sum() for log_probs in students)
        sums[1] = sums[1] - (target * ensemble).sum()
        for log_probs, weights in zip(students, table, strict=True):
            for weight, teacher in zip(weights, teachers, strict=True):
                sums[2] = sums[2] + weight * (teacher.exp() * (teacher - log_probs)).sum()
    return sums[0] / counted, sums[1] / counted, sums[2] / counted


def assert_as_good_as_pytorch(
    draws: list[Inputs], upstream: tuple[float, ...] = UPSTREAMS["apart"], **options: Any
) -> None:
    """Compares the largest errors over all draws: that of one scalar would be a matter of luck."""
    errors, eager_errors, steps = (dict.fromkeys(Results._fields, 0.0) for _ in range(3))
    for inputs in draws:
        logits, labels, alpha, *mix = inputs
        in_float64 = (logits.double(), labels, alpha.double(), *mix)
        exact = run(distillation_loss_reference, in_float64, upstream, **options)
        eager = run(distillation_loss_reference, inputs, upstream, **options)
        ours = run(distillation_loss, inputs, upstream, backend="triton", **options)
        for name, value, eager_value, want in zip(Results._fields, ours, eager, exact, strict=True):
            assert value.dtype == eager_value.dtype
            assert torch.isfinite(value).all(), name
            ignored = options.get("ignore_index")
            counted = labels.numel() if ignored is None else (labels != ignored).sum().item()
            step = rounding_step(name, value.dtype, want, inputs, upstream, counted)
            errors[name] = max(errors[name], max_error(value, want))
            eager_errors[name] = max(eager_errors[name], max_error(eager_value, want))
            steps[name] = max(steps[name], step)
    for name, error in errors.items():
        bound = 2 * eager_errors[name] + steps[name]
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


def rounding_step(
    name: str,
    dtype: torch.dtype,
    exact: Tensor,
    inputs: Inputs,
    upstream: tuple[float, ...],
    counted: int,
) -> float:
    """One rounding of the result, and one float32 rounding of what it is a difference of."""
    operands = {
        "dlogits": max(map(abs, upstream)) / counted,  # probabilities
        "dalpha": abs(upstream[1]) * inputs[0].abs().max().item(),  # logits
    }.get(name, 1.0)  # nats
    result = exact.abs().max().item()
    return torch.finfo(dtype).eps * result + torch.finfo(torch.float32).eps * operands
