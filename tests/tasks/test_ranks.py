"""Two processes that train on pixels against one with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import torchrun
from mask_helpers import network
from rsfast import Pyramid, convert
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.engine.optim import build_optimizer
from rsfast.losses import PixelDistillation

RESOLUTIONS = (32, 24)

STEPS = """
import torch
import torch.distributed as dist
from rsfast.runtime import distributed
from test_ranks import RESOLUTIONS, steps_of

rank = distributed.join("cpu")
images, labels = torch.load("batch.pt")
half = slice(3 * rank.index, 3 * rank.index + 3)
losses, params = steps_of([level[half] for level in images], labels[half])
losses = distributed.sum_over_ranks(losses) / 2
other = params.clone()
dist.broadcast(other, 0)
assert torch.equal(params, other), "ranks differ"
if rank.is_main:
    torch.save({"losses": losses, "params": params}, "result.pt")
distributed.leave()
"""


def steps_of(images: list[torch.Tensor], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms of three steps with synchronised batch norm in float64, and the parameters."""
    torch.manual_seed(0)
    model = convert(network(3), RESOLUTIONS, task="segmentation").double()
    model.network.dropout.p = 0.0  # each rank draws its own
    loss = PixelDistillation(2, "full", 0.1).double()
    step = TrainStep(model, loss, build_optimizer(model, loss, lr=0.05), precision="fp32")
    model.train().sync_batch_norm(dist.is_initialized())
    batch = Batch(Pyramid.pack(images), labels, torch.arange(len(labels)))
    losses = torch.stack([torch.stack(step(batch)) for _ in range(3)])
    trained = (*model.parameters(), *loss.parameters())
    return losses, torch.cat([p.detach().flatten() for p in trained])


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_where_as_many_of_their_pixels_count(
    tmp_path: Path,
) -> None:
    torch.manual_seed(1)
    images = [torch.randn(6, 3, r, r, dtype=torch.float64) for r in RESOLUTIONS]
    labels = torch.randint(0, 3, (6, 32, 32)).byte()
    labels[0] = 255  # nothing of this image counts, nor of the last one, on the other rank
    labels[5] = 255
    labels[1:5, :4] = 255
    torch.save((images, labels), tmp_path / "batch.pt")
    folder = str(Path(__file__).parent)
    (tmp_path / "steps.py").write_text(f"import sys\nsys.path.append({folder!r})\n{STEPS}")
    torchrun("steps.py", folder=tmp_path)
    result = torch.load(tmp_path / "result.pt")
    losses, params = steps_of(images, labels)
    close = {"rtol": 1e-9, "atol": 1e-9}  # sums in another order
    torch.testing.assert_close(result["losses"], losses, **close)
    torch.testing.assert_close(result["params"], params, **close)
    assert not torch.equal(losses[0], losses[2])
