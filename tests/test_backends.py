"""The choice of backend: networks and loss on the Triton kernels against plain PyTorch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernel_helpers import CPU_OR_GPU, gpu, max_error
from rsfast import Pyramid, convert, create_model, kernels
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.engine.optim import build_optimizer
from rsfast.kernels import choose_backend
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import RSNet
from rsfast.models.mobilenetv2 import InvertedResidual
from rsfast.models.parts import freeze
from rsfast.models.resnet import BasicBlock, Bottleneck
from rsfast.pyramid import SwitchableBatchNorm2d

RESOLUTIONS = (32, 16)
SMALL = (16, 8)  # of one-of-each, for Triton's slow interpreter
STEPS = 2


def make_network(arch: str) -> RSNet:
    """An RS-Net; "one-of-each" has one block of every kind."""
    torch.manual_seed(0)
    if arch != "one-of-each":
        return create_model(arch, RESOLUTIONS, 4)
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Bottleneck(16, 8, 1, 1, 64), InvertedResidual(32, 32, 1, 2)]
    blocks += [BasicBlock(32, 32, 2, 1, 64)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    return convert(nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head), SMALL)


def make_batch(model: RSNet, device: str, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(4, 3, r, r, generator=generator, dtype=dtype) for r in model.resolutions]
    labels = torch.tensor([0, 3, 1, 3])
    return Batch(Pyramid.pack(levels).to(device), labels.to(device), torch.arange(4))


def train(
    model: RSNet, backend: str, device: str, dtype: torch.dtype, frozen: Sequence[str] = ()
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of a few steps, and the state of the network after them."""
    model = copy.deepcopy(model).to(device, dtype).use_backend(backend)
    loss = MultiResolutionDistillation(len(model.resolutions), backend=backend).to(device, dtype)
    freeze(model, frozen)
    optimizer = build_optimizer(model, loss, lr=0.01)
    step = TrainStep(model.train(), loss, optimizer, precision="fp32", graph=False)
    losses = [step(make_batch(model, device, dtype)).total for _ in range(STEPS)]
    return losses, {**model.state_dict(), "alpha": loss.alpha.detach()}


@pytest.mark.parametrize(
    ("arch", "device", "frozen"),
    [
        ("one-of-each", "cpu", ()),
        pytest.param("one-of-each", "cpu", ("stem", "batch-norms", "5"), marks=pytest.mark.slow),
        pytest.param("one-of-each", "cuda", (), marks=gpu),
        pytest.param("one-of-each", "cuda", ("stem", "batch-norms", "5"), marks=gpu),
        pytest.param("resnet18", "cuda", (), marks=gpu),
        pytest.param("resnet50", "cuda", (), marks=gpu),
        pytest.param("resnet50", "cuda", ("stem", "layer1", "layer4.0"), marks=gpu),
    ],
    indirect=["device"],
    ids=str,
)
def test_training_on_the_kernels_is_as_good_as_on_pytorch(
    arch: str, device: str, frozen: tuple[str, ...]
) -> None:
    model = make_network(arch)
    exact_losses, exact = train(model, "torch", "cpu", torch.float64, frozen)
    eager_losses, eager = train(model, "torch", device, torch.float32, frozen)
    losses, state = train(model, "triton", device, torch.float32, frozen)
    eps = torch.finfo(torch.float32).eps
    for ours, theirs, want in zip(losses, eager_losses, exact_losses, strict=True):
        assert abs(ours.cpu() - want) <= 2 * abs(theirs.cpu() - want) + 4 * eps * want
    worst, eager_worst = 0.0, 0.0
    for name, want in exact.items():
        size = want.abs().max().double().clamp_min(1e-3).item()
        worst = max(worst, max_error(state[name].cpu(), want) / size)
        eager_worst = max(eager_worst, max_error(eager[name].cpu(), want) / size)
    assert worst <= 2 * eager_worst + 4 * eps


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_evaluation_on_the_kernels_is_that_of_pytorch(device: str) -> None:
    model = make_network("one-of-each").to(device).eval()
    images = make_batch(model, device, torch.float32).images
    with torch.no_grad():
        want = model(images)
        ours = model.use_backend("triton")(images)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_layers_and_loss_compile_as_one_graph(device: str) -> None:
    torch.manual_seed(0)
    norm = SwitchableBatchNorm2d(6, 2).to(device)
    state = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked
    loss = MultiResolutionDistillation(2, backend="triton").to(device)
    labels = torch.tensor([1, 5], device=device)
    level_rows = 2 * 16, 2 * 4

    def objective(rows: Tensor) -> Tensor:
        options = {"residual": rows, "activation": "relu", "training": True, "backend": "triton"}
        y = kernels.switchable_bn_act(rows, *state, level_rows, (0, 1), **options)
        pooled = kernels.global_avg_pool(y, level_rows, 2, backend="triton")
        return loss(pooled.unflatten(0, (2, 2)), labels).total

    rows = torch.randn(40, 6, device=device, requires_grad=True)
    leaves = (rows, *norm.parameters(), *loss.parameters())
    eager = objective(rows)
    eager_grads = torch.autograd.grad(eager, leaves)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)(rows)
    torch.testing.assert_close(compiled, eager)
    for grad, want in zip(torch.autograd.grad(compiled, leaves), eager_grads, strict=True):
        torch.testing.assert_close(grad, want)
    assert norm.num_batches_tracked.tolist() == [2, 2]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_backend_is_chosen_for_all_layers_at_once_and_cuda_for_batch_norm_only(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    model = make_network("one-of-each")
    assert model.backend == "torch"
    assert model.use_backend(backend).backend == backend
    assert "backend" not in model.settings()
    seen: dict[str, set[str]] = {}

    def on_pytorch(name: str) -> Callable[..., Tensor]:
        function = getattr(kernels, name)

        def call(*arguments: Any, backend: str, **options: Any) -> Tensor:
            seen.setdefault(name, set()).add(backend)
            return function(*arguments, **options, backend="torch")

        return call

    for name in ("switchable_bn_act", "bn_act_max_pool", "global_avg_pool", "subsample"):
        monkeypatch.setattr(kernels, name, on_pytorch(name))
    model(make_batch(model, "cpu", torch.float32).images)
    assert seen == {
        "switchable_bn_act": {backend},
        "bn_act_max_pool": {backend},
        "global_avg_pool": {backend},
        "subsample": {backend},
    }
    # Batch norm is in the extension; for what is not, "cuda" is Triton.
    assert kernels.check_backend(backend, extension=True) == backend
    assert kernels.check_backend(backend) == "triton"
    assert create_model("resnet18", RESOLUTIONS, 4, backend=backend).backend == backend


def test_auto_is_triton_on_a_gpu_and_pytorch_elsewhere() -> None:
    assert choose_backend("auto", torch.device("cpu")) == "torch"
    assert choose_backend("torch", torch.device("cuda")) == "torch"
    with pytest.raises(ValueError, match="backend must be one of"):
        choose_backend("hip", torch.device("cpu"))


def test_triton_kernels_on_a_cpu_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    flags = ["--kernels", "triton", "--device", "cpu", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "rsfast.train", "--loader", "synthetic", *flags],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 2
    assert "error: kernels triton needs a GPU, the device is cpu: choose torch" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_triton_is_named_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for choice in ("auto", "triton"):
        with pytest.raises(ImportError, match="needs Triton: pip install triton, or choose"):
            choose_backend(choice, torch.device("cuda"))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        create_model("resnet18", RESOLUTIONS, 4, backend="hip")
    with pytest.raises(ValueError, match="backend must be one of"):
        MultiResolutionDistillation(2, backend="hip")


def test_a_missing_extension_is_named_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from rsfast.kernels.common import launch

    monkeypatch.setitem(sys.modules, "rsfast._C", None)
    monkeypatch.setattr(launch, "missing_on", lambda _: None)
    with pytest.raises(ImportError, match="RSFAST_BUILD_CUDA=1 pip install --no-build-isolation"):
        choose_backend("cuda", torch.device("cuda"))
    monkeypatch.setattr(launch, "missing_on", lambda device: f"a GPU, the device is {device}")
    with pytest.raises(ValueError, match="kernels cuda needs a GPU, the device is cpu: choose"):
        choose_backend("cuda", torch.device("cpu"))


def test_an_old_triton_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(ImportError, match=r"needs Triton 3.6 or newer, found 3.5.1: pip install"):
        choose_backend("auto", torch.device("cuda"))
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1234")
    assert choose_backend("triton", torch.device("cpu")) == "triton"


def test_an_old_gpu_and_a_missing_compiler_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8.0 or above, cuda:0 has 7.5: choo"):
        choose_backend("auto", device)
    assert choose_backend("torch", device) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose_backend("auto", device) == "triton"
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match=r"needs a C compiler .*: choose torch"):
        choose_backend("auto", device)
    monkeypatch.setenv("CC", "/opt/cc")
    assert choose_backend("auto", device) == "triton"
