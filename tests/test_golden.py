"""Losses of a few steps against recorded ones, line by line: what a refactor must not change.

A change of numbers needs a reason, and the new file in the same commit:
`python tests/test_golden.py` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rsfast import Pyramid, create_model
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.engine.optim import build_optimizer, set_lr
from rsfast.losses import MultiResolutionDistillation

FILE = Path(__file__).parent / "golden" / "losses.json"
RESOLUTIONS = (64, 48, 32)
STEPS = 4
# How much a step makes at most of a difference in the last bits, as another number of threads has.
GROWTH = {"resnet18": 3, "resnet50": 300, "mobilenetv2": 30}


def train(arch: str) -> list[list[float]]:
    """(ce, ensemble, distill) of each step on the CPU.

    In float64, and from uniform random numbers: float32, and normal ones, differ in their last bits
    from one instruction set or number of threads to the next, and training makes more of it.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    model = create_model(arch, RESOLUTIONS, 10).double()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 2:
                param.copy_(uniform(*param.shape) * (6 / param[0].numel()) ** 0.5)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        head.weight.copy_(0.05 * uniform(*head.weight.shape))
        head.bias.zero_()
    loss = MultiResolutionDistillation(len(RESOLUTIONS)).double()
    optimizer = build_optimizer(model, loss, lr=0.001)
    step = TrainStep(model, loss, optimizer, precision="fp32")
    losses = []
    for index in range(STEPS):
        images = [uniform(8, 3, r, r) for r in RESOLUTIONS]
        labels = torch.randint(0, 10, (8,), generator=generator)
        set_lr(optimizer, 0.001 * (1 - index / STEPS))
        losses.append([float(term) for term in step(Batch(Pyramid.pack(images), labels, labels))])
    return losses


@pytest.mark.parametrize("arch", GROWTH)
def test_losses_are_those_on_record(arch: str) -> None:
    recorded = json.loads(FILE.read_text())[arch]
    for number, (ours, golden) in enumerate(zip(train(arch), recorded, strict=True)):
        rel = min(1e-12 * GROWTH[arch] ** number, 1e-6)
        assert ours == pytest.approx(golden, rel=rel, abs=0.0), f"step {number}"


if __name__ == "__main__":
    made = {arch: train(arch) for arch in GROWTH}
    FILE.write_text(json.dumps(made, indent=1) + "\n")
