"""TrainStep: forward, loss, backward, gradient averaging and the optimiser's step."""

from __future__ import annotations

import dataclasses
import gc
import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rsfast.data import Batch, Mix
from rsfast.engine.guard import StepGuard, skips_on_device
from rsfast.engine.lead import HostLead
from rsfast.engine.snapshot import Snapshot
from rsfast.engine.terms import Terms
from rsfast.pyramid import Pyramid
from rsfast.runtime.nvtx import name_all_reduces, nvtx_range

__all__ = ["PRECISIONS", "TrainStep", "is_out_of_memory"]

PRECISIONS: dict[str, torch.dtype | None] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": None,
}

# Eager steps before a capture: cuDNN picks its algorithms, Triton compiles, momentum appears. DDP
# rebuilds its buckets and waits for its eleventh step before it settles.
_WARMUP_STEPS = {"alone": 3, "ddp": 11}

_DDP_KNOWS = inspect.signature(DistributedDataParallel).parameters
_DDP_OPTIONS: Any = {
    # Batch-norm statistics stay per rank. Renamed in torch 2.13.
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_KNOWS else "broadcast_buffers": False,
    "gradient_as_bucket_view": True,
}
if "batched_grad_copy" in _DDP_KNOWS:  # two launches per bucket instead of two per parameter
    _DDP_OPTIONS["batched_grad_copy"] = True


class _Objective(nn.Module):
    """Network and loss in one module, so that all gradients, alpha's too, are averaged alike."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, images: Pyramid, labels: Tensor, mix: Mix | None) -> Terms:
        with nvtx_range("network"):
            logits = self.model(images)
        with nvtx_range("loss"):  # a loss that knows no mixed labels is never given any
            return self.loss(logits, labels) if mix is None else self.loss(logits, labels, mix)


class TrainStep:
    """One training step. Loss terms stay on the device; no step waits for it, but the host
    is at most two steps ahead.

    In a process group of several ranks, gradients are averaged over them while the backward runs.
    Batch-norm statistics stay per rank, as in the paper; the bases of quantised activations are
    fitted to the activations of all ranks.

    With `graph`, the first call on a GPU takes a few steps to warm up, puts everything back as it
    was (weights, momentum, batch-norm statistics, alpha, scaler, random numbers), and captures the
    step. From then on a call copies its batch into the captured step's buffers and replays it: one
    launch instead of thousands. The learning rate becomes a tensor on the device. Every batch must
    have the shape of the first, and mixed labels if the first one has.

    A step whose loss or gradients are not finite changes nothing and is counted: see `StepGuard`.

    Args:
        model: images (Pyramid) -> logits [R, N, K].
        loss: (logits, labels) -> a named tuple of scalars with a `total`, `Terms`; called with
            (logits, labels, mix) for batches that have a `mix`.
        optimizer: SGD over the parameters of both. A graph needs a fused one of PyTorch's.
        precision: "bf16" or "fp16" autocast (fp16 with a gradient scaler), or "fp32".
        graph: whether to replay the step as one CUDA graph. A CPU has none and runs the same
            operations either way.

    Attributes:
        scaler: gradient scaler; does nothing except in fp16.
        guard: counts the steps that were left out.

    Raises:
        ValueError: if the precision is unknown or does not run on the device, or the optimiser
            cannot be captured.
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
        self._device = next(model.parameters()).device
        self._dtype = PRECISIONS[precision]
        self._optimizer = optimizer
        self._modules = _Objective(model, loss)
        self._objective: nn.Module = self._modules
        self._graph: _CapturedStep | None = None
        self._wants_graph = graph and self._device.type == "cuda"
        if self._device.type == "cuda":
            _check_gpu(precision, self._device)
        if self._wants_graph and not skips_on_device(optimizer):
            raise ValueError(
                f"optimizer must be a fused one of PyTorch's to be captured (fused=True), "
                f"got {type(optimizer).__name__}"
            )
        # Graphs are captured on another stream than the default one, and DDP belongs to the stream
        # that it is built on.
        self._stream = torch.cuda.Stream(self._device) if self._wants_graph else None
        if dist.is_initialized() and dist.get_world_size() > 1:
            if self._stream:  # DDP reads the weights there
                self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._objective = ddp = DistributedDataParallel(
                    self._modules,
                    device_ids=[self._device] if self._device.type == "cuda" else None,
                    **_DDP_OPTIONS,
                )
            name_all_reduces(ddp)
            if self._stream:
                torch.cuda.current_stream().wait_stream(self._stream)
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")
        self.guard = StepGuard(self._modules, optimizer, self.scaler)
        self._lead = HostLead(self._device)

    def __call__(self, batch: Batch) -> Terms:
        """Trains on one batch and returns its loss terms, detached.

        Raises:
            ValueError: if a captured step gets a batch of another shape, or mixed labels where the
                first batch had none, or none where it had.
            torch.OutOfMemoryError: naming the batch size, and one that fits.
        """
        try:
            self._lead.wait()
            terms = self._take(batch)
            self._lead.mark()
            return terms
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Past the except block, whose traceback holds what did not fit.
        raise torch.OutOfMemoryError(self._what_fits(batch))

    def close(self) -> None:
        """Drops the captured step and its memory; the next call captures again.

        To be called before a process group is left: NCCL waits for every graph that holds its work.
        """
        self._graph = None

    def _take(self, batch: Batch) -> Terms:
        if not self._wants_graph:
            return self._run(batch)
        if self._graph is None:
            self._graph = self._capture(batch)
        return self._graph(batch)

    def _run(self, batch: Batch) -> Terms:
        """The loss terms, detached, after one step."""
        self._optimizer.zero_grad(set_to_none=True)
        self.guard.begin()
        terms = self._forward(self._objective, batch)
        with nvtx_range("backward"):
            self.guard.loss_of(terms).backward()
        with nvtx_range("optimizer"):
            self.guard.step()
        return _copied(terms)

    def _forward(self, objective: nn.Module, batch: Batch) -> Terms:
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            return objective(batch.images, batch.labels, batch.mix)

    def _what_fits(self, batch: Batch) -> str:
        """Says so after an error: halves the batch until its forward and backward go through.

        On this rank alone: without DDP, whose hooks go with it, and with statistics of its own.
        """
        self._objective = self._modules
        gc.collect()
        modules: list[Any] = list(self._modules.modules())
        for module in modules:
            if hasattr(module, "synced"):
                module.synced = False
        num_images = batch.images.num_images
        size = num_images // 2
        while size and not self._fits(batch, size):
            size //= 2
        return (
            f"batch_size {num_images} does not fit into the memory of {self._device} at "
            f"{batch.images.sizes[0][0]} pixels and below: {size or 'not even 1'} does (tried)"
        )

    def _fits(self, batch: Batch, size: int) -> bool:
        self._optimizer.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        part = dataclasses.replace(
            batch,
            images=Pyramid.pack([v[:size] for v in batch.images.levels()], batch.images.banks),
            labels=batch.labels[:size],
            indices=batch.indices[:size],
            mix=batch.mix and Mix(*(values[:size] for values in batch.mix)),
        )
        try:
            self._forward(self._modules, part).total.backward()
        except RuntimeError as error:
            if is_out_of_memory(error):
                return False
            raise
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        return True

    def _capture(self, batch: Batch) -> _CapturedStep:
        for group in self._optimizer.param_groups:  # a number would be captured for good
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self._device)
        before = Snapshot(
            self._modules, self._optimizer, self.scaler, self._device, also=[self.guard.counts]
        )
        batch = dataclasses.replace(  # in memory that the replays read
            batch,
            images=batch.images.with_rows(batch.images.rows.clone()),
            labels=batch.labels.clone(),
            mix=batch.mix and Mix(*(values.clone() for values in batch.mix)),
        )
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        alone = self._objective is self._modules
        with torch.cuda.stream(self._stream):
            for _ in range(_WARMUP_STEPS["alone" if alone else "ddp"]):
                self._run(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's threads may allocate meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            terms = self._run(batch)
        before.restore()
        return _CapturedStep(graph, batch, terms)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what went wrong first; leaving a capture raises an error of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False


def _copied(terms: Terms) -> Terms:
    return terms._make(torch.stack([term.detach() for term in terms]).unbind())


def _check_gpu(precision: str, device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if precision == "bf16" and major < 8:
        raise ValueError(
            f"precision bf16 needs a GPU of compute capability 8.0, {device} has {major}.{minor}: "
            f"choose fp16"
        )


class _CapturedStep:
    """A CUDA graph of one step, with the memory that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, batch: Batch, terms: Terms) -> None:
        self._graph = graph
        self._batch = batch
        self._terms = terms

    def __call__(self, batch: Batch) -> Terms:
        captured, given = self._batch.images, batch.images
        same = given.sizes == captured.sizes and given.rows.shape == captured.rows.shape
        if not same or given.rows.dtype != captured.rows.dtype or given.banks != captured.banks:
            raise ValueError(
                f"batch must have the shape that was captured, {captured.num_images} images of "
                f"{captured.sizes} as {captured.rows.dtype} with {captured.num_channels} channels, "
                f"got {given.num_images} of {given.sizes} as {given.rows.dtype} with "
                f"{given.num_channels}"
            )
        if (batch.mix is None) != (self._batch.mix is None):
            words = ("without", "with") if batch.mix else ("with", "without")
            raise ValueError(
                f"batch must be {words[0]} mixed labels (mix) as the step was captured, got one "
                f"{words[1]}: give all batches of a step a mix, with share 1 where nothing is "
                f"mixed, or none"
            )
        captured.rows.copy_(given.rows)
        self._batch.labels.copy_(batch.labels)
        for ours, values in zip(self._batch.mix or (), batch.mix or (), strict=True):
            ours.copy_(values)
        self._graph.replay()
        return _copied(self._terms)  # the next replay writes over them
