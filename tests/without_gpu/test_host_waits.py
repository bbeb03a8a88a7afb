"""Steps of the training loop on a CPU, in which nothing may make a GPU's host wait.

They are those of `rsfast.train` itself: the learning rate, the step, the sums of the losses and the
averaged weights. The first step is left out: kernels are compiled there, and constants made.
"""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernel_helpers import skip_unless_it_runs_on
from rsfast import train
from rsfast.tasks.segmentation import Scores
from rsfast.training.run import Run
from without_gpu.watch import HostWaits

FLAGS = """--arch tiny:network --resolutions 16 8 --batch-size 2 --epochs 1 --steps-per-epoch 3
    --log-every 3 --loader synthetic --workers 0 --device cpu""".split()


def steps_under_watch(
    output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, also: Any = None
) -> HostWaits:
    """What was seen in a run's second step and what follows it; the third one is logged.

    `also` is called with the run after the second step, under watch.
    """
    watch = HostWaits()
    save_if_due = train.save_if_due

    def switch(run: Run, interrupt: Any) -> None:
        save_if_due(run, interrupt)
        if run.steps_done == 2 and also:
            also(run)
        if run.steps_done == 2:
            stack.close()
        if run.steps_done == 1:
            stack.enter_context(watch)

    monkeypatch.setattr(train, "save_if_due", switch)
    with contextlib.ExitStack() as stack:
        assert train.main([*FLAGS, "--output", str(output / "run"), *flags]) == 0
    return watch


@pytest.mark.parametrize("ema", [[], ["--ema-decay", "0.99"]], ids=["plain", "ema"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_no_step_makes_a_gpus_host_wait(
    kernels: str,
    precision: str,
    ema: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernels == "triton":
        skip_unless_it_runs_on("cpu")
    flags = ["--kernels", kernels, "--precision", precision, *ema]
    watch = steps_under_watch(tmp_path, monkeypatch, *flags)
    assert "aten._fused_sgd_.default" in watch.seen
    assert ("rsfast.distillation_loss_fwd.default" in watch.seen) == (kernels == "triton")
    assert not watch.found


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_mixing_erasing_picking_and_lighting_make_no_host_wait(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "triton":
        skip_unless_it_runs_on("cpu")
    mixing = ["--mixup", "0.4", "--cutmix", "1", "--random-erasing", "0.9"]
    picking = ["--levels", "nearest", "--lighting", "0.1"]
    watch = steps_under_watch(tmp_path, monkeypatch, "--kernels", kernels, *mixing, *picking)
    assert {"aten.lerp.Tensor", "aten.masked_fill_.Scalar"} <= watch.seen
    assert {"aten.index_select.out", "aten.add_.Tensor"} <= watch.seen
    assert ("rsfast.distillation_loss_fwd.default" in watch.seen) == (kernels == "triton")
    assert not watch.found


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_steps_of_segmentation_make_no_host_wait(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "triton":
        skip_unless_it_runs_on("cpu")
    maps = "--arch mask_helpers:network --task segmentation --decoder-lr 10".split()
    watch = steps_under_watch(tmp_path, monkeypatch, "--kernels", kernels, *maps)
    assert ("rsfast.distillation_loss_fwd.default" in watch.seen) == (kernels == "triton")
    assert not watch.found


def test_scores_of_segmentation_make_no_host_wait() -> None:
    scores = Scores(2, 3, 255, torch.device("cpu"), torch.tensor([0.5, 0.5]))
    masks = torch.zeros(5, 4).byte(), torch.ones(3, 6).byte()
    batch = types.SimpleNamespace(masks=masks, indices=(4, 2))  # those of a Batch are on the CPU
    with HostWaits() as watch:
        scores.add([torch.zeros(2, 3, size, size) for size in (4, 2)], batch)
    assert "aten.scatter_add_.default" in watch.seen
    assert not watch.found


@pytest.mark.parametrize("ema", [[], ["--ema-decay", "0.99"]], ids=["plain", "ema"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_learned_quantisers_make_no_host_wait(
    kernels: str, ema: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "triton":
        skip_unless_it_runs_on("cpu")
    flags = ["--arch", "tiny:quantised", "--kernels", kernels, *ema]
    watch = steps_under_watch(tmp_path, monkeypatch, *flags)
    assert "aten.pow.Scalar" in watch.seen  # of the moving average
    assert not watch.found


@pytest.mark.parametrize("bits", ["32", "2"])
def test_quantised_resnets_make_no_host_wait(
    bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--arch", "resnet18_lq", "--activation-bits", bits, "--resolutions", "32", "24"]
    flags += ["--fix-activation-basis"] if bits == "2" else []
    watch = steps_under_watch(tmp_path, monkeypatch, "--kernels", "torch", *flags)
    assert "aten.pow.Scalar" in watch.seen
    assert not watch.found


def test_a_step_that_waits_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(run: Run) -> None:
        run.step.guard.read()

    watch = steps_under_watch(tmp_path, monkeypatch, also=wait)
    assert {name for name, _ in watch.found} >= {"Tensor.tolist", "aten.lift_fresh.default"}


MASK = torch.tensor([True, False])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("item", lambda x: x.sum().item()),
        ("bool", lambda x: bool(x.any())),
        ("equal", lambda x: torch.equal(x, x)),
        ("mask", lambda x: x[MASK]),
        ("assignment", lambda x: x.clone().__setitem__(MASK, 0.0)),
        ("nonzero", lambda x: x.nonzero()),
        ("list", lambda x: x.tolist()),
        ("copy", lambda x: x.cpu()),
        ("array", lambda x: np.asarray(x)),
        ("new tensor", lambda x: x.new_tensor([1.0, 2.0])),
        ("tensor", lambda x: torch.tensor(1.0)),
        ("repeat", lambda x: x.repeat_interleave(torch.ones(2, dtype=torch.int64))),
    ],
)
def test_what_makes_a_host_wait_is_known(name: str, function: Any) -> None:
    with HostWaits() as watch:
        function(torch.ones(2))
    assert watch.found, watch.seen


def test_what_does_not_is_let_pass() -> None:
    def harmless(x: Tensor) -> None:
        torch.where(x > 0, 1.0, torch.nan).add_(2.0).clamp_min(0.0)
        x[torch.arange(2)].fill_(3.0)
        torch.zeros(2), torch.full((2,), 5.0), x[1:], x.to(torch.float16)

    with HostWaits() as watch:
        harmless(torch.ones(2))
    assert not watch.found
