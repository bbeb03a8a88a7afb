"""The state of training, so that steps taken for warm-up leave no trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]


class Snapshot:
    """Copies of all that a training step changes, put back in place: every tensor keeps its memory.

    Parameters, buffers (batch-norm statistics and counters), momentum, the gradient scaler and the
    random number generators.

    Args:
        modules: network and loss.
        optimizer: SGD over their parameters.
        scaler: of the gradients.
        device: whose generator the step draws from.
        also: other tensors that the step changes.
    """

    def __init__(
        self,
        modules: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        also: Sequence[Tensor] = (),
    ) -> None:
        changed = (*modules.state_dict().values(), *also)
        self._tensors = [(t, t.detach().clone()) for t in changed]
        self._optimizer = optimizer
        self._momentum: dict[Tensor, Tensor] = {
            param: state["momentum_buffer"].clone()
            for param, state in optimizer.state.items()
            if state.get("momentum_buffer") is not None
        }
        self._scaler = scaler
        self._scaler_state = scaler.state_dict()
        self._device = device
        self._cpu_rng = torch.get_rng_state()
        self._gpu_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        for tensor, before in self._tensors:
            tensor.copy_(before)
        for param, state in self._optimizer.state.items():
            buffer = state.get("momentum_buffer")
            if buffer is None:
                continue
            before = self._momentum.get(param)
            if before is None:  # an optimiser that has only now made it
                buffer.zero_()
            else:
                buffer.copy_(before)
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(self._scaler_state)
        torch.set_rng_state(self._cpu_rng)
        if self._gpu_rng is not None:
            torch.cuda.set_rng_state(self._gpu_rng, self._device)
