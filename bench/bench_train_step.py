"""One training step: rsfast against a list of tensors through every layer (the authors' way).

Same network, weights, images and loss; the losses are compared before the clock starts. Without a
GPU the shapes are small and say only that both run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.rivals import AuthorsNet, authors_loss
from rsfast import Pyramid
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import official
from rsfast.optim import build_optimizer

LARGE = {"resolutions": (224, 192, 160, 128, 96), "batch": 64, "precision": "bf16"}
SMALL = {"resolutions": (64, 48, 32), "batch": 8, "precision": "fp32"}
IMPLEMENTATIONS = ("authors", "rsfast_eager")


def make_steps(arch: str, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """One callable per implementation; each trains on the same batch and returns the loss."""
    shape = LARGE if device.type == "cuda" else SMALL
    resolutions, count = shape["resolutions"], shape["batch"]
    torch.manual_seed(0)
    theirs = AuthorsNet(arch, len(resolutions)).to(device, memory_format=torch.channels_last)
    ours = official.from_state_dict(theirs.state_dict(), resolutions).to(device).train()
    loss = MultiResolutionDistillation(len(resolutions)).to(device)
    images = [torch.randn(count, 3, r, r, device=device) for r in resolutions]
    images = [image.contiguous(memory_format=torch.channels_last) for image in images]
    labels = torch.randint(0, 1000, (count,), device=device)
    batch = Batch(Pyramid.pack(images), labels, labels)
    step = TrainStep(
        ours, loss, build_optimizer(ours, loss, lr=1e-4), precision=shape["precision"], graph=False
    )
    optimizer = torch.optim.SGD(
        theirs.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=device.type == "cuda"
    )

    def authors_step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=shape["precision"] == "bf16"):
            logits = theirs(images)
        total = authors_loss([z.float() for z in logits], labels, theirs.alpha)
        total.backward()
        optimizer.step()
        return total.detach()

    return {"authors": authors_step, "rsfast_eager": lambda: step(batch).total}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenetv2"])
def test_train_step(benchmark, arch: str, impl: str, device: torch.device) -> None:
    steps = make_steps(arch, device)
    losses = {name: float(step()) for name, step in steps.items()}
    assert losses["rsfast_eager"] == pytest.approx(losses["authors"], rel=0.02), losses
    benchmark.group = f"train_step/{arch}"
    large = device.type == "cuda"
    benchmark.pedantic(steps[impl], rounds=20 if large else 3, warmup_rounds=5 if large else 1)
