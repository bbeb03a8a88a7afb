"""Fifty steps of a small network, eager and as one graph: `python -m bench.first_day.training`.

The loss must fall to a fifth, and both ways must lose the same at every step, bit for bit. Exits
with 1 if not, after losses.json is written.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.support.timing import DEVICE, ON_GPU
from rsfast import Pyramid, create_model
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.engine.optim import build_optimizer
from rsfast.kernels import choose_backend
from rsfast.losses import MultiResolutionDistillation

__all__ = ["main"]

_RESOLUTIONS = (64, 48, 32) if ON_GPU else (32, 16)
_IMAGES, _CLASSES, _STEPS = 16, 4, 50
_ENOUGH = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.first_day.training", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of losses.json")
    args = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)  # as a run does: gradients of learnt images are that small
    if not ON_GPU:
        torch.set_num_threads(1)  # on maps this small, threads mostly wait for each other
    losses = {name: _losses(graph=name == "graph") for name in ("eager", "graph")}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    first, last = losses["graph"][0], losses["graph"][-1]
    differing = [a == b for a, b in zip(*losses.values(), strict=True)].count(False)
    print(
        f"loss {first:.3f} -> {last:.3f} in {_STEPS} steps, eager and graph differ at {differing}"
    )
    return 0 if last <= _ENOUGH * first and not differing else 1


def _losses(*, graph: bool) -> list[float]:
    torch.manual_seed(0)
    backend = choose_backend("auto", DEVICE)
    model = create_model("resnet18", _RESOLUTIONS, _CLASSES, backend=backend).to(DEVICE)
    loss = MultiResolutionDistillation(len(_RESOLUTIONS), backend=backend).to(DEVICE)
    optimizer = build_optimizer(model, loss, lr=0.01)
    precision = "bf16" if ON_GPU else "fp32"
    step = TrainStep(model, loss, optimizer, precision=precision, graph=graph)
    levels = [torch.randn(_IMAGES, 3, r, r) for r in _RESOLUTIONS]
    labels = torch.arange(_IMAGES) % _CLASSES
    batch = Batch(Pyramid.pack(levels).to(DEVICE), labels.to(DEVICE), labels)
    return torch.stack([step(batch).total for _ in range(_STEPS)]).tolist()


if __name__ == "__main__":
    raise SystemExit(main())
