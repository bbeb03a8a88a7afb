"""The kernels of the loss beside plain PyTorch, both against float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_helpers import max_error
from rsfast.kernels import distillation_loss, distillation_loss_reference

__all__ = ["DRAWS", "UPSTREAMS", "Inputs", "Results", "assert_as_good_as_pytorch", "run"]

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
            step = rounding_step(name, value.dtype, want, inputs, upstream)
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
) -> float:
    """One rounding of the result, and one float32 rounding of what it is a difference of."""
    num_images = inputs[0].shape[1]
    operands = {
        "dlogits": max(map(abs, upstream)) / num_images,  # probabilities
        "dalpha": abs(upstream[1]) * inputs[0].abs().max().item(),  # logits
    }.get(name, 1.0)  # nats
    result = exact.abs().max().item()
    return torch.finfo(dtype).eps * result + torch.finfo(torch.float32).eps * operands
