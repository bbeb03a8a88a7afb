"""Two processes on a CPU, as torchrun starts them."""

from __future__ import annotations

import csv
import json
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import make_image_folder, torchrun
from kernel_helpers import skip_unless_it_runs_on
from rsfast import Pyramid, create_model
from rsfast.data import Batch, Mix
from rsfast.engine import TrainStep
from rsfast.engine.optim import build_optimizer
from rsfast.kernels import switchable_bn_act_reference
from rsfast.losses import MultiResolutionDistillation

RESOLUTIONS = (48, 32)


STEPS = """
import sys
import torch
import torch.distributed as dist
from rsfast import Pyramid, create_model
from rsfast.runtime import distributed
from rsfast.data import Batch, Mix
from rsfast.engine import TrainStep
from rsfast.losses import MultiResolutionDistillation
from rsfast.engine.optim import build_optimizer

rank = distributed.join("cpu")
torch.manual_seed(rank.index)  # different weights at first: they must become the first rank's
model, loss = create_model(sys.argv[2], (48, 32), 4), MultiResolutionDistillation(2)
if rank.is_main:
    model.load_state_dict(torch.load("start.pt"))
model, loss = model.double(), loss.double()
step = TrainStep(model, loss, build_optimizer(model, loss, lr=0.01), precision="fp32")
images, labels = torch.load("batch.pt")
half = slice(4 * rank.index, 4 * rank.index + 4)
mix = Mix(labels.flip(0)[half], labels[half] / 4) if sys.argv[1] == "synced" else None
batch = Batch(Pyramid.pack([level[half] for level in images]), labels[half], labels[half], mix)
model.train(sys.argv[1] != "eval").sync_batch_norm(sys.argv[1] == "synced")
losses = []
if sys.argv[1] == "train":  # a NaN on one rank: both leave the step out
    before = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    bad = batch.images.rows.clone()
    bad[0] = float("nan") if rank.index == 1 else 0.0
    terms = step(Batch(batch.images.with_rows(bad), batch.labels, batch.labels))
    assert bool(terms.total.isfinite()) == (rank.index == 0)
    after = (*model.parameters(), *model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert step.guard.read() == (1, 1)
for _ in range(3):
    losses.append(distributed.sum_over_ranks(torch.stack(step(batch))) / 2)
    bases = [b for name, b in model.named_buffers() if name.endswith("basis")]
    trained = (*model.parameters(), *loss.parameters(), *bases)
    params = torch.cat([p.detach().flatten() for p in trained])
    other = params.clone()
    dist.broadcast(other, 0)
    assert torch.equal(params, other), "ranks differ after a step"
if rank.is_main:
    torch.save({"losses": torch.stack(losses), "params": params}, "result.pt")
if sys.argv[1] == "train":
    means = torch.cat([norm.running_mean.flatten() for norm in model.batch_norms()])
    everyone = [torch.empty_like(means) for _ in range(2)]
    dist.all_gather(everyone, means)
    assert not torch.equal(*everyone), "statistics are per rank in training"
    distributed.average_bn_statistics(model)
    found = torch.cat([norm.running_mean.flatten() for norm in model.batch_norms()])
    assert torch.allclose(found, sum(everyone) / 2, atol=1e-7)
distributed.leave()
"""


@pytest.mark.parametrize(
    ("arch", "mode"),
    [
        *(("tiny:network", mode) for mode in ("train", "eval", "synced")),
        *(("tiny:quantised", mode) for mode in ("train", "synced")),
    ],
)
def test_ranks_stay_equal_and_match_one_process_with_the_whole_batch(
    tmp_path: Path, arch: str, mode: str
) -> None:
    """In eval mode batch norm does not see the batch, and synced it sees the whole one.

    That one has mixed labels. Bases of quantisers are those of the whole batch in training.
    """
    torch.manual_seed(0)
    model, loss = create_model(arch, RESOLUTIONS, 4), MultiResolutionDistillation(2)
    images = [torch.randn(8, 3, r, r, dtype=torch.float64) for r in RESOLUTIONS]
    labels = torch.arange(8) % 4
    torch.save(model.state_dict(), tmp_path / "start.pt")
    torch.save((images, labels), tmp_path / "batch.pt")
    (tmp_path / "steps.py").write_text(textwrap.dedent(STEPS))
    torchrun("steps.py", mode, arch, folder=tmp_path)
    result = torch.load(tmp_path / "result.pt")
    if mode == "train":
        return

    model, loss = model.double(), loss.double()
    step = TrainStep(model, loss, build_optimizer(model, loss, lr=0.01), precision="fp32")
    model.train(mode == "synced")
    mix = Mix(labels.flip(0), labels / 4) if mode == "synced" else None
    batch = Batch(Pyramid.pack(images), labels, labels, mix)
    losses = torch.stack([torch.stack(step(batch)) for _ in range(3)])
    bases = [b for name, b in model.named_buffers() if name.endswith("basis")]
    trained = (*model.parameters(), *loss.parameters(), *bases)
    params = torch.cat([p.detach().flatten() for p in trained])
    close = {"rtol": 1e-9, "atol": 1e-9}  # sums in another order
    torch.testing.assert_close(result["losses"], losses, **close)
    torch.testing.assert_close(result["params"], params, **close)


FULL = """
import sys
import torch
from rsfast import Pyramid, create_model
from rsfast.runtime import distributed
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.losses import MultiResolutionDistillation
from rsfast.engine.optim import build_optimizer

rank = distributed.join("cpu")
model, loss = create_model(sys.argv[1], (48, 32), 4), MultiResolutionDistillation(2)
model.sync_batch_norm()
step = TrainStep(model, loss, build_optimizer(model, loss, lr=0.01), precision="fp32")

def full_in_the_backward(module, inputs, logits):  # [R, N, K]
    def check(grad):
        if grad.shape[1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
    logits.register_hook(check)

model.register_forward_hook(full_in_the_backward)
images = [torch.randn(8, 3, r, r) for r in (48, 32)]
try:
    step(Batch(Pyramid.pack(images), torch.arange(8) % 4, torch.arange(8)))
except torch.OutOfMemoryError as error:
    print(error, flush=True)
    distributed.abandon(7)
"""


@pytest.mark.parametrize("arch", ["tiny:network", "tiny:quantised"])
def test_memory_that_runs_out_in_the_backward_of_ddp_is_named_by_every_rank(
    tmp_path: Path, arch: str
) -> None:
    (tmp_path / "full.py").write_text(FULL)
    said = torchrun("full.py", arch, folder=tmp_path, expect=1)
    named = "batch_size 8 does not fit into the memory of cpu at 48 pixels and below: 2 does"
    assert named in said
    assert 'Traceback (most recent call last):\n  File "full.py"' not in said


SYNCED = """
import sys
import torch
from rsfast.runtime import distributed
from rsfast.kernels import switchable_bn_act

rank = distributed.join("cpu")
backend, training = sys.argv[1], sys.argv[2] == "train"
inputs = torch.load("inputs.pt")
own = [level[rank.index] for level in inputs.pop("levels")]
rows, norm = torch.cat(own).requires_grad_(), inputs.pop("norm")
residual = torch.cat([level[rank.index] for level in inputs.pop("residuals")]).requires_grad_()
dy = torch.cat([level[rank.index] for level in inputs.pop("dys")])
leaves = rows, residual, norm["weight"].requires_grad_(), norm["bias"].requires_grad_()
y = switchable_bn_act(rows, **norm, **inputs, level_rows=[len(level) for level in own],
                      residual=residual, training=training, synced=True, backend=backend)
grads = torch.autograd.grad(y, leaves, dy)
torch.save({"y": y.detach(), "grads": grads, "norm": norm}, f"result{rank.index}.pt")
distributed.leave()
"""


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_synced_batch_norm_is_that_of_the_whole_batch(
    tmp_path: Path, backend: str, mode: str
) -> None:
    if backend == "triton":
        skip_unless_it_runs_on("cpu")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    counts = (40, 6, 1)  # rows of each level on each of the two ranks
    # Ranks that differ much: statistics of one alone would be far off.
    levels = [normal(2, m, 8) + torch.tensor([0.0, 50.0]).view(2, 1, 1) for m in counts]
    residuals, dys = ([normal(2, m, 8) for m in counts] for _ in range(2))
    norm = {
        "weight": 1 + 0.3 * normal(2, 8),
        "bias": normal(2, 8),
        "running_mean": normal(2, 8),
        "running_var": 1 + normal(2, 8).square(),
        "num_batches_tracked": torch.zeros(2, dtype=torch.int64),
    }
    inputs = {"norm": norm, "banks": (1, 0, 1), "activation": "relu"}
    inputs |= {"levels": levels, "residuals": residuals, "dys": dys}
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "synced.py").write_text(SYNCED)
    torchrun("synced.py", backend, mode, folder=tmp_path)
    results = [torch.load(tmp_path / f"result{rank}.pt") for rank in range(2)]

    exact = {k: v.double() if v.is_floating_point() else v.clone() for k, v in norm.items()}
    whole = [torch.cat([v.flatten(0, 1) for v in part]).double() for part in (levels, residuals)]
    leaves = [t.requires_grad_() for t in (*whole, exact["weight"], exact["bias"])]
    y = switchable_bn_act_reference(
        leaves[0],
        **exact,
        level_rows=[2 * m for m in counts],
        banks=(1, 0, 1),
        residual=leaves[1],
        activation="relu",
        training=mode == "train",
    )
    dy = torch.cat([v.flatten(0, 1) for v in dys]).double()
    grads = torch.autograd.grad(y, leaves, dy)

    def joined(parts: list[Tensor]) -> Tensor:
        """Rows of both ranks, level by level."""
        ranks = [part.split(counts) for part in parts]
        return torch.cat([part for pair in zip(*ranks, strict=True) for part in pair]).double()

    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(joined([r["y"] for r in results]), y.detach(), **close)
    for index in (0, 1):
        torch.testing.assert_close(
            joined([r["grads"][index] for r in results]), grads[index], **close
        )
    for index in (2, 3):  # each rank's share: DDP adds them up
        total = sum(r["grads"][index].double() for r in results)
        torch.testing.assert_close(total, grads[index], **close)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for result in results:
            found = result["norm"][name].to(exact[name].dtype)
            torch.testing.assert_close(found, exact[name], **close)


IN_A_ROW = """
import json, sys
from rsfast import evaluate, train
for command, *arguments in json.loads(sys.argv[1]):
    assert {"rsfast.train": train, "rsfast.evaluate": evaluate}[command].main(arguments) == 0
"""


@pytest.mark.parametrize(
    ("arch", "loader"),
    [("tiny:network", "pil"), pytest.param("resnet18", "dali", marks=pytest.mark.slow)],
    ids=["tiny-pil", "resnet18-dali"],
)
def test_the_commands_train_resume_and_evaluate_in_two_processes(
    tmp_path: Path, arch: str, loader: str
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    make_image_folder(tmp_path / "images", train=5, val=4)  # 10 images: the ranks share 2 steps
    (tmp_path / "images" / "val" / "cat" / "0000.jpg").unlink()  # 7: an odd count for two ranks
    data = f"--arch {arch} --data images --workers 1 --loader {loader}"
    training = f"rsfast.train {data} --resolutions 48 32 --batch-size 3 --lr 0.01"
    training += " --epochs 2 --log-every 1 --output run"
    evaluation = f"rsfast.evaluate run/last.pt {data} --resolutions 40"
    commands = [line.split() for line in (training, f"{training} --resume auto", evaluation)]
    if arch == "resnet18":  # as people start them
        out = "".join(torchrun("-m", *command, folder=tmp_path) for command in commands)
    else:
        (tmp_path / "in_a_row.py").write_text(IN_A_ROW)
        out = torchrun("in_a_row.py", json.dumps(commands), folder=tmp_path)

    assert "resumed after epoch 2 of 2" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4]
    assert lines[0]["world_size"] == 2
    with open(tmp_path / "run" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # Each of the 7 validation images counts once: every figure is a multiple of 1/7.
    for name in ("top1_48", "top1_32", "top1_ensemble"):
        sevenths = float(rows[-1][name]) * 7 / 100
        assert sevenths == pytest.approx(round(sevenths), abs=1e-6)
    with open(tmp_path / "run" / "evaluation" / "accuracy.csv", newline="") as file:
        found = {row["resolution"]: row["top1"] for row in csv.DictReader(file)}
    assert float(found["48"]) == pytest.approx(float(rows[-1]["top1_48"]))
