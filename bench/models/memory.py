"""Peak memory of a training step, from the sizes and lifetimes of its tensors.

    python tests/without_gpu/pretended.py bench.models.memory --output docs/memory.md

Runs `TrainStep` on tensors without content, so it needs no GPU, but a CUDA build of PyTorch and a
device that answers for one: `make memory` has both.
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.support.hollow import hollow, hollow_batch, hollow_network
from rsfast.engine import TrainStep
from rsfast.engine.optim import build_optimizer
from rsfast.models.registry import ARCHITECTURES, task_of

__all__ = ["Allocations", "Case", "Memory", "main", "memory_of", "rows_of_doc"]

RESOLUTIONS = (224, 192, 160, 128, 96)
_CLASSES = 1000
_BATCHES = (32, 64, 128, 256)
_VARIANTS = [
    *(("triton", precision) for precision in ("bf16", "fp16", "fp32")),
    ("cuda", "bf16"),
    *(("torch", precision) for precision in ("bf16", "fp32")),
]

_ABOUT = """GiB in use at the peak of a step with images of {sizes} pixels and {classes} classes,
modelled with torch {version} and made by `make memory`: the step runs on tensors without content,
and their sizes and lifetimes are added up. No GPU has measured it. A GPU needs more: CUDA itself
takes about half a GiB, the allocator leaves gaps, cuDNN has workspaces, operators have temporary
tensors of their own, and DALI decodes there. A captured step also holds a second batch of images,
and a copy of weights and momenta while it is captured. Numbers are for one GPU: take the batch that
leaves it a tenth and two GiB. A step that does not fit ends with the batch that does."""


class Case(NamedTuple):
    """What is trained: five resolutions, 1000 classes."""

    arch: str
    batch: int
    kernels: str = "triton"
    precision: str = "bf16"


class Memory(NamedTuple):
    """In GiB.

    Attributes:
        always: weights, momenta, statistics, and the batch itself.
        peak: the most that is in use at a time in a step.
    """

    always: float
    peak: float


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations of its block make, until they are freed.

    Args:
        device: the type of the devices to count.

    Attributes:
        now: bytes in use.
        peak: the most so far.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = device
        self._known: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != self._device or key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += self._known[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._fused_sgd_.default:  # allocates nothing, and knows no such GPU
            return None
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def memory_of(case: Case, resolutions: Sequence[int] = RESOLUTIONS) -> Memory:
    """Of the second step, on a GPU that need not be there."""
    count = Allocations("cuda")
    with hollow(), torch.autograd.set_multithreading_enabled(False):
        model, loss = hollow_network(case.arch, resolutions, _CLASSES, case.kernels)
        batch = hollow_batch(resolutions, case.batch, case.precision, task=model.task)
        optimizer = build_optimizer(model, loss, lr=0.1)
        step = TrainStep(model, loss, optimizer, precision=case.precision, graph=False)
        lasting = [*model.state_dict().values(), *loss.parameters(), batch.images.rows]
        lasting += [state["momentum_buffer"] for state in optimizer.state.values()]
        for tensor in lasting:
            count.add(tensor)
        always = count.now
        with count:
            step(batch)
            count.peak = count.now
            step(batch)
    return Memory(always / 2**30, count.peak / 2**30)


def network_rows() -> Iterator[str]:
    """A line of the first table for each classifier."""
    for arch in (name for name in ARCHITECTURES if task_of(name) == "classification"):
        found = [memory_of(Case(arch, batch)) for batch in _BATCHES]
        image = (found[-1].peak - found[-2].peak) / (_BATCHES[-1] - _BATCHES[-2])
        peaks = " | ".join(f"{memory.peak:.2f}" for memory in found)
        yield f"| {arch} | {peaks} | {1024 * image:.1f} |"


def variant_rows() -> Iterator[str]:
    """A line of the second table for each kind of kernels and precision."""
    for kernels, precision in _VARIANTS:
        found = memory_of(Case("resnet50", _BATCHES[-1], kernels, precision))
        yield f"| {kernels} | {precision} | {found.always:.2f} | {found.peak:.2f} |"


def rows_of_doc(text: str) -> dict[tuple[str, ...], list[float]]:
    """The numbers of both tables by the words before them."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        words = tuple(itertools.takewhile(lambda cell: not _is_number(cell), cells))
        numbers = cells[len(words) :]
        if line.startswith("|") and numbers and all(map(_is_number, numbers)):
            rows[words] = [float(number) for number in numbers]
    return rows


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).isdigit()


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.models.memory", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/memory.md"))
    args = parser.parse_args(argv)
    if torch.version.cuda is None:
        parser.error(f"needs a PyTorch with CUDA, {torch.__version__} is without: make memory")
    sizes = ", ".join(map(str, RESOLUTIONS))
    version = torch.__version__.partition("+")[0]
    lines = [
        "# Memory of a training step",
        "",
        textwrap.fill(_ABOUT.format(sizes=sizes, classes=_CLASSES, version=version), 100),
        "",
        "With `--precision bf16` and `--kernels triton`, by batch size; last, what one more image",
        "takes, in MiB:",
        "",
        f"| network | {' | '.join(map(str, _BATCHES))} | one image |",
        f"|---|{'---|' * (len(_BATCHES) + 1)}",
        *network_rows(),
        "",
        f"ResNet-50 with batches of {_BATCHES[-1]}; before a step there are weights, momenta, "
        "statistics",
        "and images:",
        "",
        "| kernels | precision | before a step | peak |",
        "|---|---|---|---|",
        *variant_rows(),
    ]
    args.output.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
