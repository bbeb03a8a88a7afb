"""The choice of backend: networks and loss on the Triton kernels against plain PyTorch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernel_helpers import CPU_OR_GPU, gpu, max_error
from rsfast import Pyramid, create_model
from rsfast.config import TrainConfig
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.engine.optim import build_optimizer
from rsfast.kernels import choose_backend
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import RSNet
from rsfast.models.layers import Conv2d, MaxPool2d, SwitchableBatchNorm2d, global_avg_pool
from rsfast.models.mobilenetv2 import InvertedResidual
from rsfast.models.resnet import BasicBlock, Bottleneck
from rsfast.models.rsnet import FOLDS

RESOLUTIONS = (32, 16)
STEPS = 2


def make_network(arch: str) -> RSNet:
    """An RS-Net; "one-of-each" has one block of every kind, for Triton's slow interpreter."""
    torch.manual_seed(0)
    model = create_model("resnet18" if arch == "one-of-each" else arch, RESOLUTIONS, 4)
    if arch == "one-of-each":
        stem = [Conv2d(3, 16, 3), SwitchableBatchNorm2d(16, 2, "relu"), MaxPool2d(3, 2, 1)]
        blocks = [Bottleneck(16, 8, 1, 2), InvertedResidual(32, 32, 1, 2, 2)]
        model.backbone = nn.Sequential(*stem, *blocks, BasicBlock(32, 32, 2, 2))
        model.classifier = nn.Linear(32, 4)
    return model


def make_batch(device: str, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(4, 3, r, r, generator=generator, dtype=dtype) for r in RESOLUTIONS]
    labels = torch.tensor([0, 3, 1, 3])
    return Batch(Pyramid.pack(levels).to(device), labels.to(device), torch.arange(4))


def train(
    model: RSNet, backend: str, device: str, dtype: torch.dtype, into: str = "none"
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of a few steps, and the state of the network after them."""
    model = copy.deepcopy(model).to(device, dtype).use_backend(backend).fold_batch_norm(into)
    loss = MultiResolutionDistillation(len(RESOLUTIONS), backend=backend).to(device, dtype)
    optimizer = build_optimizer(model, loss, lr=0.01)
    step = TrainStep(model.train(), loss, optimizer, precision="fp32", graph=False)
    losses = [step(make_batch(device, dtype)).total for _ in range(STEPS)]
    return losses, {**model.state_dict(), "alpha": loss.alpha.detach()}


@pytest.mark.parametrize(
    ("arch", "device"),
    [
        ("one-of-each", "cpu"),
        pytest.param("one-of-each", "cuda", marks=gpu),
        pytest.param("resnet18", "cuda", marks=gpu),
        pytest.param("resnet50", "cuda", marks=gpu),
    ],
    indirect=["device"],
)
@pytest.mark.parametrize("into", FOLDS)
def test_training_on_the_kernels_is_as_good_as_on_pytorch(
    arch: str, device: str, into: str
) -> None:
    model = make_network(arch)
    exact_losses, exact = train(model, "torch", "cpu", torch.float64)
    eager_losses, eager = train(model, "torch", device, torch.float32)
    losses, state = train(model, "triton", device, torch.float32, into)
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
    images = make_batch(device, torch.float32).images
    with torch.no_grad():
        want = model(images)
        ours = model.use_backend("triton")(images)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_layers_and_loss_compile_as_one_graph(device: str) -> None:
    torch.manual_seed(0)
    norm = SwitchableBatchNorm2d(6, 2, "relu").to(device)
    norm.backend = "triton"
    loss = MultiResolutionDistillation(2, backend="triton").to(device)
    labels = torch.tensor([1, 5], device=device)

    def objective(rows: Tensor) -> Tensor:
        x = Pyramid(rows, sizes=((4, 4), (2, 2)), num_images=2)
        return loss(global_avg_pool(norm(x, x), "triton"), labels).total

    rows = torch.randn(40, 6, device=device, requires_grad=True)
    leaves = (rows, *norm.parameters(), *loss.parameters())
    eager = objective(rows)
    eager_grads = torch.autograd.grad(eager, leaves)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)(rows)
    torch.testing.assert_close(compiled, eager)
    for grad, want in zip(torch.autograd.grad(compiled, leaves), eager_grads, strict=True):
        torch.testing.assert_close(grad, want)
    assert norm.num_batches_tracked.tolist() == [2, 2]


def test_the_backend_is_chosen_for_all_layers_at_once() -> None:
    model = create_model("resnet18", RESOLUTIONS, 4)
    assert {norm.backend for norm in model.batch_norms()} == {"torch"}
    model.use_backend("triton")
    assert {norm.backend for norm in model.batch_norms()} == {model.backend} == {"triton"}
    assert "backend" not in model.settings()


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
        MultiResolutionDistillation(2, backend="cuda")


def test_cuda_is_for_batch_norm_and_triton_for_the_rest() -> None:
    model = create_model("resnet18", RESOLUTIONS, 4, backend="cuda")
    assert {norm.backend for norm in model.batch_norms()} == {model.backend} == {"cuda"}
    assert {conv.backend for conv in model.convolutions()} == {"triton"}
    with pytest.raises(ValueError, match="batch norm of backend cuda cannot be folded, got 'all'"):
        model.fold_batch_norm("all")
    model.use_backend("triton").fold_batch_norm("1x1")
    with pytest.raises(ValueError, match="batch norm of backend cuda cannot be folded, got '1x1'"):
        model.use_backend("cuda")
    assert model.backend == "triton"
    with pytest.raises(ValueError, match="fold_bn must be none for kernels cuda, got '1x1'"):
        TrainConfig(kernels="cuda", fold_bn="1x1")


def test_a_missing_extension_is_named_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from rsfast.kernels import _launch

    monkeypatch.setitem(sys.modules, "rsfast._C", None)
    monkeypatch.setattr(_launch, "missing_on", lambda _: None)
    with pytest.raises(ImportError, match="RSFAST_BUILD_CUDA=1 pip install --no-build-isolation"):
        choose_backend("cuda", torch.device("cuda"))
    monkeypatch.setattr(_launch, "missing_on", lambda device: f"a GPU, the device is {device}")
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
