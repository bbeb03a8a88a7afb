"""TrainStep: forward, loss, backward, gradient averaging and the optimiser's step."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rsfast.data import Batch
from rsfast.losses import LossTerms
from rsfast.pyramid import Pyramid

__all__ = ["PRECISIONS", "TrainStep"]

PRECISIONS: dict[str, torch.dtype | None] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": None,
}

# What DDP calls the switch for copying buffers from rank 0 at every step; renamed in torch 2.13.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: Any = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class _Objective(nn.Module):
    """Network and loss in one module, so that all gradients, alpha's too, are averaged alike."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, images: Pyramid, labels: Tensor) -> LossTerms:
        return self.loss(self.model(images), labels)


class TrainStep:
    """One training step. Loss terms stay on the device; nothing waits for it.

    In a process group of several ranks, gradients are averaged over them while the backward runs.
    Batch-norm statistics stay per rank, as in the paper.

    Args:
        model: images (Pyramid) -> logits [R, N, K].
        loss: (logits, labels) -> LossTerms.
        optimizer: over the parameters of both.
        precision: "bf16" or "fp16" autocast (fp16 with a gradient scaler), or "fp32".
        graph: whether to replay the step as one CUDA graph. A CPU has none and runs the same
            operations either way. On a GPU only False works in this version.

    Attributes:
        scaler: gradient scaler; does nothing except in fp16.

    Raises:
        ValueError: if the precision is unknown, or a graph is asked for on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "bf16",
        graph: bool = True,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
        device = next(model.parameters()).device
        if graph and device.type == "cuda":
            raise ValueError("graph must be False on a GPU: this version does not capture the step")
        self._dtype = PRECISIONS[precision]
        self._device_type = device.type
        self._optimizer = optimizer
        self._objective: nn.Module = _Objective(model, loss)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._objective = DistributedDataParallel(
                self._objective,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_KEEP_BUFFERS,  # batch-norm statistics stay per rank
            )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def __call__(self, batch: Batch) -> LossTerms:
        """Trains on one batch and returns its loss terms, detached."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device_type, self._dtype, enabled=self._dtype is not None):
            terms = self._objective(batch.images, batch.labels)
        self.scaler.scale(terms.total).backward()
        self.scaler.step(self._optimizer)
        self.scaler.update()
        return LossTerms(*(term.detach() for term in terms))
