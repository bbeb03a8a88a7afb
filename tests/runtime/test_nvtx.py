"""Ranges and the profiler's window, against a recording stand-in: a CPU build has neither."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rsfast import create_model
from rsfast.runtime import nvtx

CONV2D = importlib.import_module("rsfast.kernels.conv2d.op")  # not the function of that name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the CUDA libraries."""
    made: list[str] = []

    def returns_depth(*call: str) -> int:  # as those of PyTorch do
        made.append(" ".join(call))
        return 0

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: returns_depth("push", name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: returns_depth("pop"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: made.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: made.append("stop"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("synchronize"))
    monkeypatch.setattr(nvtx, "_enabled", False)
    monkeypatch.setattr(CONV2D, "level_range", CONV2D.level_range)
    return made


def test_ranges_are_silent_until_they_are_switched_on(calls: list[str]) -> None:
    with nvtx.nvtx_range("loss"):
        pass
    assert calls == []
    nvtx.enable_ranges()
    with nvtx.nvtx_range("loss"), nvtx.nvtx_range("inner"):
        calls.append("work")
    assert calls == ["push loss", "push inner", "work", "pop", "pop"]


def test_a_range_ends_when_its_block_fails(calls: list[str]) -> None:
    nvtx.enable_ranges()
    with pytest.raises(RuntimeError), nvtx.nvtx_range("loss"):
        raise RuntimeError
    assert calls == ["push loss", "pop"]


def test_every_layer_has_a_range_with_its_name(calls: list[str]) -> None:
    model = create_model("resnet18", (32,), 2).eval()
    nvtx.name_layers(model)
    with torch.no_grad():
        model([torch.zeros(1, 3, 32, 32)])
    assert calls[0] == "push Conv2d network.conv1"
    assert calls[2] == "push SwitchableBatchNorm2d network.bn1"
    assert calls[-2:] == ["push Linear network.fc", "pop"]
    # Convolutions, norms, activations, the two poolings and the classifier.
    assert calls.count("pop") == len(calls) / 2 == 20 + 20 + 17 + 2 + 1


def test_every_level_of_a_convolution_has_a_range(calls: list[str]) -> None:
    nvtx.enable_ranges()
    rows = torch.randn(16 + 4, 2, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, requires_grad=True)
    y = CONV2D.conv2d(rows, weight, ((4, 4), (2, 2)), 1, padding=1)
    assert calls == ["push level 4x4", "pop", "push level 2x2", "pop"]
    y.sum().backward()
    assert calls == 2 * ["push level 4x4", "pop", "push level 2x2", "pop"]


def test_the_reductions_of_ddp_have_ranges(calls: list[str], tmp_path: Path) -> None:
    nvtx.enable_ranges()
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
        nvtx.name_all_reduces(ddp)
        ddp(torch.randn(4, 3)).sum().backward()
        del ddp
    finally:
        dist.destroy_process_group()
    assert calls == ["push all-reduce of bucket 0", "pop"]


def test_the_window_opens_and_closes_once(calls: list[str]) -> None:
    window = nvtx.ProfileWindow(2, 5)
    opened = []
    for step in range(8):
        window.before(step)
        opened.append("start" in calls and "stop" not in calls)
    window.close()
    assert calls == ["start", "synchronize", "stop"]
    assert [step for step, is_open in enumerate(opened) if is_open] == [2, 3, 4]


def test_a_run_that_ends_inside_the_window_closes_it(calls: list[str]) -> None:
    window = nvtx.ProfileWindow(0, 100)
    window.before(0)
    window.close()
    window.close()
    assert calls == ["start", "synchronize", "stop"]
