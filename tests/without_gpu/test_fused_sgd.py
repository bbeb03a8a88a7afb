"""Gradients and momenta lie in memory as PyTorch's fused SGD asks for on a GPU, also resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rsfast import Pyramid, train
from rsfast.training.run import Run
from run_helpers import stop_when
from without_gpu.watch import FusedSgd

FLAGS = """--resolutions 32 16 --batch-size 2 --epochs 1 --steps-per-epoch 3 --log-every 3
    --loader synthetic --workers 0 --device cpu""".split()


@pytest.mark.parametrize("layout", ["by level", "packed"])
@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        ("mobilenetv2", "fp32"),
        ("resnext50_32x4d", "bf16"),
        ("tiny:network", "fp16"),
    ],
)
def test_gradients_and_momenta_lie_in_memory_as_their_weights_do(
    arch: str, precision: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "packed":  # as on a GPU
        monkeypatch.setattr(Pyramid, "by_level", lambda pyramid: pyramid)
    flags = [*FLAGS, "--arch", arch, "--precision", precision, "--output", str(tmp_path / "run")]
    runs: list[int] = []
    train_epochs = train.train_epochs

    def count(run: Run, interrupt: Any) -> Any:
        runs.append(sum(1 for _ in (*run.model.parameters(), *run.loss.parameters())))
        return train_epochs(run, interrupt)

    monkeypatch.setattr(train, "train_epochs", count)
    with FusedSgd() as watch:
        with monkeypatch.context() as patch:
            stop_when(patch, lambda run: run.steps_done == 1)
            assert train.main(flags) == 75
        assert train.main([*flags, "--resume", "auto"]) == 0
    assert watch.tensors == runs[0] + 2 * runs[1]
    assert not watch.faults


@pytest.mark.parametrize("fault", ["gradient", "momentum", "lr"])
def test_what_fused_sgd_refuses_is_seen(fault: str) -> None:
    weight = nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    other = torch.zeros(4, 3, 2, 2)
    if fault == "gradient":
        weight.grad = other
    elif fault == "momentum":
        optimizer.state[weight]["momentum_buffer"] = other
    else:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    with FusedSgd() as watch:
        optimizer.step()
    assert [found.startswith(fault) for found in watch.faults] == [True]
