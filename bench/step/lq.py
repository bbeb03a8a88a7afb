"""What the quantisers cost in a training step: `python -m bench.step.lq`.

Steps of ResNet-18 with and without quantisers take turns: the pre-activation network with weights
and activations of 2 bits beside the same without either, and the ordinary one with weights of 2
bits beside the ordinary one. On a CPU in one thread, in seconds that the process had the processor,
so that what else the machine does hardly counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from bench.support.results_file import Results
from bench.support.timing import DEVICE, ON_GPU, synchronized_clock
from rsfast import Pyramid, RSNet, create_model
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.engine.optim import build_optimizer
from rsfast.kernels import choose_backend
from rsfast.losses import MultiResolutionDistillation
from rsfast.models.lq import LQActivation, LQConv2d

__all__ = ["main"]

_RESOLUTIONS = (64, 55, 46, 37, 28)
_BITS = {"w2a2": (2, 2), "w2a32": (2, None)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.step.lq", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--resolutions", nargs="+", type=int, default=_RESOLUTIONS)
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    parser.add_argument("--networks", nargs="+", choices=list(_BITS), default=list(_BITS))
    parser.add_argument("--rounds", type=int, default=7, help="of each network (7)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as a run has it
    results = Results(args.output, "lq_quantiser", DEVICE)
    for precision in args.precisions:
        for name in args.networks:
            steps = {
                kind: _make_step(name, kind, precision, args.batch, tuple(args.resolutions))
                for kind in ("plain", "quantised")
            }
            times = _take_turns(steps, args.rounds)
            for kind, seconds in times.items():
                results.add(f"step/{name}/{precision}/{kind}", seconds, "s")
            pairs = zip(times["quantised"], times["plain"], strict=True)
            shares = [100 * (quantised / plain - 1) for quantised, plain in pairs]
            results.add(f"cost/{name}/{precision}", shares, "%")
    about = (
        f"Steps of ResNet-18, batch {args.batch} at {args.resolutions}, with 2-bit weights and "
        "activations (w2a2, pre-activation) or weights alone (w2a32), and of the same networks "
        "without quantisers, interleaved; one thread, processor seconds. cost is how much longer "
        "the quantised step takes than the plain one beside it."
    )
    results.finish(["bench.step.lq", *(sys.argv[1:] if argv is None else argv)], about)
    return 0


def _make_step(
    name: str, kind: str, precision: str, batch: int, resolutions: tuple[int, ...]
) -> Callable[[], object]:
    torch.manual_seed(0)
    weight_bits, activation_bits = _BITS[name]
    net = create_model(
        "resnet18_lq", resolutions, weight_bits=weight_bits, activation_bits=activation_bits
    )
    if kind == "plain":
        _without_quantisers(net)
    backend = choose_backend("auto", DEVICE)
    net.to(DEVICE).use_backend(backend).train()
    loss = MultiResolutionDistillation(len(resolutions), backend=backend).to(DEVICE)
    optimizer = build_optimizer(net, loss, lr=1e-4)
    step = TrainStep(net, loss, optimizer, precision=precision, graph=False)
    images = Pyramid.pack([torch.randn(batch, 3, r, r, device=DEVICE) for r in resolutions])
    labels = torch.randint(0, 1000, (batch,), device=DEVICE)
    return lambda: step(Batch(images, labels, labels))


def _without_quantisers(net: RSNet) -> None:
    for owner in list(net.modules()):
        for child, module in list(owner.named_children()):
            if isinstance(module, LQConv2d):
                shape = module.in_channels, module.out_channels, module.kernel_size
                conv = nn.Conv2d(*shape, module.stride, module.padding, bias=False)
                conv.weight = module.weight
                setattr(owner, child, conv)
            elif isinstance(module, LQActivation):
                setattr(owner, child, nn.Identity())


def _take_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of single steps; the first of each warms up."""
    clock = synchronized_clock if ON_GPU else time.process_time
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(rounds + 1):
        for kind, step in steps.items():
            start = clock()
            step()
            if number:
                times[kind].append(clock() - start)
    shown = {kind: round(statistics.median(seconds), 3) for kind, seconds in times.items()}
    print(f"medians {shown}", flush=True)
    return times


if __name__ == "__main__":
    raise SystemExit(main())
