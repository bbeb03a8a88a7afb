"""Inputs of the operations, for their tests and their benchmarks alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["make_bn_inputs", "make_loss_inputs", "make_mix"]


def make_bn_inputs(
    level_rows: Sequence[int],
    channels: int,
    num_banks: int,
    *,
    residual: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    shift: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Tensor arguments of `switchable_bn_act`, and dy.

    Parameters and statistics are float64 for float64 rows, else float32.
    """
    generator = torch.Generator(device).manual_seed(seed)
    params = torch.float64 if dtype == torch.float64 else torch.float32
    rows = sum(level_rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return {
        "x": (scale * normal(rows, channels) + shift).to(dtype),
        "weight": (1 + 0.3 * normal(num_banks, channels)).to(params),
        "bias": normal(num_banks, channels).to(params),
        "running_mean": normal(num_banks, channels).to(params),
        "running_var": (0.5 + normal(num_banks, channels) ** 2).to(params),
        "num_batches_tracked": torch.zeros(num_banks, dtype=torch.int64, device=device),
        "dy": normal(rows, channels).to(dtype),
        "residual": normal(rows, channels).to(dtype) if residual else None,
    }


def make_loss_inputs(
    num_resolutions: int,
    num_images: int,
    num_classes: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [R, N, K], labels [N] and alpha [R]."""
    options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    shape = (num_resolutions, num_images, num_classes)
    logits = scale * torch.randn(shape, **options)
    labels = torch.randint(0, num_classes, (num_images,), **options)
    alpha = torch.randn(num_resolutions, **options)
    return logits.to(dtype), labels, alpha


def make_mix(
    num_images: int, num_classes: int, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Partner labels [N] and shares [N] of mixed images."""
    options = {"generator": torch.Generator(device).manual_seed(seed + 1), "device": device}
    partner_labels = torch.randint(0, num_classes, (num_images,), **options)
    return partner_labels, torch.rand(num_images, **options)
