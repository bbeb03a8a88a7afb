"""Whole steps on a pretended GPU: forward, loss, backward, guard, scaler and fused SGD.

Nothing has values here. What is seen are devices, dtypes and strides, what makes the host wait, and
what is forbidden while a step is captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.support.hollow import hollow, hollow_batch, hollow_network
from rsfast.engine import TrainStep
from rsfast.engine.metrics import LossMeter
from rsfast.engine.optim import build_optimizer
from rsfast.losses import LossTerms
from rsfast.models.parts import freeze
from without_gpu.pretended import BACKWARDS, pretended_gpu
from without_gpu.watch import FusedSgd, HostWaits

pytestmark = BACKWARDS
RESOLUTIONS = (224, 160)
KINDS = ("resnet18", "resnet50", "resnext50_32x4d", "mobilenetv2", "refinenet18")
CASES = [
    (backend, precision)
    for backend in ("triton", "torch", "cuda")
    for precision in ("fp32", "bf16", "fp16")
    if (backend, precision) != ("cuda", "fp32")  # which it does not know
]


@pytest.fixture
def _gpu() -> Iterator[None]:
    with pretended_gpu(), torch.autograd.set_multithreading_enabled(False):
        yield


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("arch", "mixed"), [*((arch, False) for arch in KINDS), ("resnet18", True)]
)
@pytest.mark.parametrize(("backend", "precision"), CASES)
def test_a_step_neither_waits_nor_lays_out_memory_as_fused_sgd_refuses(
    backend: str, precision: str, arch: str, mixed: bool
) -> None:
    with hollow(), FusedSgd() as sgd:
        model, loss = hollow_network(arch, RESOLUTIONS, 100, backend)
        batch = hollow_batch(RESOLUTIONS, 8, precision, mixed=mixed, task=model.task)
        optimizer = build_optimizer(model, loss, lr=0.1)
        step = TrainStep(model, loss, optimizer, precision=precision, graph=False)
        meter = LossMeter(LossTerms._fields, torch.device("cuda"))
        meter.add(step(batch))
        sgd.tensors = 0
        with HostWaits() as watch:
            meter.add(step(batch))
    assert sgd.tensors == sum(1 for _ in (*model.parameters(), *loss.parameters()))
    assert not sgd.faults
    assert not watch.found


class Graph:
    """What a CUDA graph and a stream are asked for here."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def replay(self) -> None:
        pass


FROZEN = ("stem", "batch-norms", "layer4")


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("backend", "precision", "frozen", "mixed"),
    [
        *((*case, (), mixed) for case in CASES for mixed in (False, True)),
        *((backend, "bf16", FROZEN, False) for backend in ("triton", "torch", "cuda")),
    ],
    ids=str,
)
def test_a_captured_step_does_not_wait_and_its_rate_is_on_the_device(
    backend: str,
    precision: str,
    frozen: tuple[str, ...],
    mixed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = HostWaits()
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: watch)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: None)
    with hollow(), FusedSgd() as sgd:
        model, loss = hollow_network("resnet18", RESOLUTIONS, 1000, backend)
        freeze(model, frozen)
        batch = hollow_batch(RESOLUTIONS, 8, precision, mixed=mixed)
        optimizer = build_optimizer(model, loss, lr=0.1)
        step = TrainStep(model, loss, optimizer, precision=precision)
        step(batch)
        assert watch.seen, "nothing was captured"
        with watch:
            step(batch)
    assert {group["lr"].device.type for group in optimizer.param_groups} == {"cuda"}
    assert not sgd.faults
    assert not watch.found
