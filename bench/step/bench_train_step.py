"""One training step: rsfast against what users would run instead.

Same network, weights, images and loss; the losses are compared before the clock starts. Without a
GPU the shapes are small and say only that all run. `python -m bench.step` interleaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench.rivals.authors import AuthorsNet, authors_loss
from bench.support.installed import INSTALLED
from bench.support.shapes import PAPER_ARCHITECTURES, RESOLUTIONS
from bench.support.timing import DEVICE, ON_GPU
from rsfast import Pyramid
from rsfast.data import Batch
from rsfast.engine import PRECISIONS, TrainStep
from rsfast.engine.optim import build_optimizer
from rsfast.kernels import choose_backend
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import official

BATCH = 64 if ON_GPU else 8
PRECISION = "bf16" if ON_GPU else "fp32"
COMPILE_MODES = {
    "authors_compile": "default",
    "authors_compile_max": "max-autotune",
    "authors_compile_graph": "reduce-overhead",
}
# In the names of design: authors_fp32 and authors_amp are a list of tensors through every layer,
# eager; the next three are that compiled; separate_amp is one training for each resolution.
# rsfast_eager and rsfast_graph are rsfast as it comes: Triton kernels over packed rows on a GPU,
# PyTorch's operations level by level on a CPU. rsfast_cuda has batch norm in CUDA C++.
IMPLEMENTATIONS = ["authors_fp32", "authors_amp", "separate_amp", "rsfast_eager"]
if ON_GPU:
    IMPLEMENTATIONS[2:2] = COMPILE_MODES
    IMPLEMENTATIONS += [*sorted(INSTALLED & {"rsfast_cuda"}), "rsfast_graph"]

Step = Callable[[], Tensor]


class Setting(NamedTuple):
    """What is trained on."""

    arch: str
    batch: int = BATCH
    precision: str = PRECISION
    resolutions: tuple[int, ...] = RESOLUTIONS


class _Data(NamedTuple):
    images: list[Tensor]
    labels: Tensor


def implementations(precision: str) -> list[str]:
    """Those that differ from each other: in float32, authors_amp is authors_fp32."""
    return [i for i in IMPLEMENTATIONS if i != "authors_amp" or precision != "fp32"]


def make_data(setting: Setting) -> _Data:
    """Channels-last float32 images and labels on the device."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    images = [
        torch.randn(setting.batch, 3, r, r, device=DEVICE, generator=generator)
        for r in setting.resolutions
    ]
    labels = torch.randint(0, 1000, (setting.batch,), device=DEVICE, generator=generator)
    return _Data([x.contiguous(memory_format=torch.channels_last) for x in images], labels)


def make_step(setting: Setting, impl: str) -> Step:
    """Trains on one batch and returns the loss, detached."""
    if impl.startswith("rsfast"):
        backend = "cuda" if impl == "rsfast_cuda" else "auto"
        return _rsfast(setting, graph=impl != "rsfast_eager", backend=backend)
    if impl == "separate_amp":
        return _separate(setting)
    precision = "fp32" if impl == "authors_fp32" else setting.precision
    return _authors(setting._replace(precision=precision), COMPILE_MODES.get(impl))


def _network(setting: Setting) -> AuthorsNet:
    torch.manual_seed(0)
    net = AuthorsNet(setting.arch, len(setting.resolutions))
    return net.to(DEVICE, memory_format=torch.channels_last)


def _sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=ON_GPU)


def _authors(setting: Setting, compile_mode: str | None) -> Step:
    net, data = _network(setting), make_data(setting)
    optimizer, dtype = _sgd(net), PRECISIONS[setting.precision]

    def objective(images: list[Tensor], labels: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            logits = net(images)
        return authors_loss([z.float() for z in logits], labels, net.alpha)

    if compile_mode is not None:
        torch._dynamo.reset()
        objective = torch.compile(objective, mode=compile_mode, dynamic=False, fullgraph=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = objective(data.images, data.labels)
        total.backward()
        optimizer.step()
        return total.detach().clone()

    return step


def _separate(setting: Setting) -> Step:
    images, labels = make_data(setting)
    dtype = PRECISIONS[setting.precision]
    runs = []
    for levels in images:
        net = _network(setting._replace(resolutions=(levels.shape[-1],)))
        runs.append((net, _sgd(net), levels))

    def step() -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for net, optimizer, levels in runs:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
                (logits,) = net([levels])
            loss = nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total

    return step


def rsfast_step(setting: Setting, *, graph: bool, backend: str = "auto") -> TrainStep:
    """rsfast's own, from the weights that the rivals start from."""
    backend = choose_backend(backend, DEVICE)
    net = official.from_state_dict(_network(setting).state_dict(), setting.resolutions)
    net.to(DEVICE).use_backend(backend).train()
    loss = MultiResolutionDistillation(len(setting.resolutions), backend=backend).to(DEVICE)
    optimizer = build_optimizer(net, loss, lr=1e-4)
    return TrainStep(net, loss, optimizer, precision=setting.precision, graph=graph)


def _rsfast(setting: Setting, *, graph: bool, backend: str) -> Step:
    images, labels = make_data(setting)
    pyramid = Pyramid.pack(images)
    if ON_GPU:  # what the loader hands over
        rows = nn.functional.pad(pyramid.rows, (0, 1))
        pyramid = pyramid.with_rows(rows.to(PRECISIONS[setting.precision] or torch.float32))
    batch = Batch(pyramid, labels, labels)
    step = rsfast_step(setting, graph=graph, backend=backend)
    return lambda: step(batch).total


def check_losses(losses: dict[str, float]) -> None:
    """All that train the same thing lose the same at the first step."""
    same = {name: loss for name, loss in losses.items() if name != "separate_amp"}
    for name, loss in same.items():
        assert loss == pytest.approx(next(iter(same.values())), rel=0.02), (name, losses)


@pytest.mark.parametrize("impl", implementations(PRECISION))
@pytest.mark.parametrize("arch", PAPER_ARCHITECTURES)
def test_train_step(benchmark, arch: str, impl: str) -> None:
    setting = Setting(arch)
    step = make_step(setting, impl)
    check_losses({"authors_fp32": float(make_step(setting, "authors_fp32")()), impl: float(step())})
    benchmark.group = f"train_step/{arch}"
    benchmark.pedantic(step, rounds=20 if ON_GPU else 3, warmup_rounds=5 if ON_GPU else 1)
