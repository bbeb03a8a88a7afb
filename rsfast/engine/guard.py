"""Steps whose loss or gradients are not finite are left out, without the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rsfast.engine.terms import Terms
from rsfast.pyramid import moved_by_forward
from rsfast.runtime.vector import as_vector, by_dtype, fill_from_vector

__all__ = ["StepGuard", "skips_on_device"]


class StepGuard:
    """The optimiser's step, taken only if every gradient is finite; decided on the device.

    A step that is left out changes nothing: weights, momentum, and the batch-norm statistics and
    counters that its forward has already moved are as they were before it (averaged weights, which
    are not its business, take in the same weights once more). All ranks decide alike:
    they look at the averaged gradients, and a rank whose loss is not finite makes its own NaN.

    Args:
        modules: network and loss.
        optimizer: PyTorch's fused ones skip on the device; for any other the host waits.
        scaler: of the gradients, for fp16; asks for the same skips.

    Attributes:
        counts: [3] int64 on the device: steps left out since `read`, in a row up to the last step,
            and in a row at most since `read`.
    """

    def __init__(
        self, modules: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        self._params = list(modules.parameters())
        self._optimizer: Any = optimizer
        self._scaler = scaler
        self._buffers = by_dtype(moved_by_forward(modules))
        self._before: list[Tensor] = []
        self.counts = torch.zeros(3, dtype=torch.int64, device=self._params[0].device)

    def begin(self) -> None:
        """To be called before the forward."""
        self._before = [as_vector(buffers) for buffers in self._buffers]

    def loss_of(self, terms: Terms) -> Tensor:
        """What to run the backward of: the scaled total, or NaN where it is not finite."""
        total = terms.total
        # An infinite loss may have finite gradients; this one has none, on any rank.
        seal = torch.where(total.detach().isfinite(), 1.0, torch.nan)
        return self._scaler.scale(total * seal)

    def step(self) -> None:
        """Steps, or puts everything back."""
        grads = [param.grad for param in self._params if param.grad is not None]
        finite = _are_finite(grads)
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
            self._scaler.update()
        elif skips_on_device(self._optimizer):
            self._optimizer.found_inf = (~finite).float()
            self._optimizer.step()
            del self._optimizer.found_inf
        elif bool(finite):
            self._optimizer.step()
        for buffers, before in zip(self._buffers, self._before, strict=True):
            fill_from_vector(buffers, torch.where(finite, as_vector(buffers), before))
        self._before = []
        self._count(finite)

    def read(self) -> tuple[int, int]:
        """Steps left out since the last call, and how many of them in a row at most; waits."""
        skipped, in_a_row, longest = self.counts.tolist()
        self.counts.copy_(torch.tensor([0, in_a_row, in_a_row]))
        return skipped, longest

    def _count(self, finite: Tensor) -> None:
        skipped, in_a_row, longest = self.counts.unbind()
        skipped += ~finite
        in_a_row.copy_(torch.where(finite, 0, in_a_row + 1))
        longest.copy_(torch.maximum(longest, in_a_row))


def _are_finite(grads: list[Tensor]) -> Tensor:
    """Whether all are, decided on the device, by the check of PyTorch's gradient scaler.

    It multiplies by 1 on its way. The largest absolute value would say the same, but takes a CPU
    many times as long.
    """
    device = grads[0].device
    one, found = torch.ones((), device=device), torch.zeros((), device=device)
    for group in by_dtype(grads):
        torch._amp_foreach_non_finite_check_and_unscale_(group, found, one)
    return found == 0


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser looks at a flag on the device by itself."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
