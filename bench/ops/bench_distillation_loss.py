"""The loss and its gradients: rsfast's kernel against eager and compiled PyTorch.

`authors` are 15 separate KL terms, `apex_xentropy` the same with Apex's cross entropies,
`reference` the closed form; `rsfast` is two launches under autograd, `rsfast_fused` the one launch
of `distillation_loss_and_gradients`. For mixed images all but the authors' take two labels and a
share; `authors` makes soft labels [N, K] of them, as Mixup and CutMix are mostly written. Pixels
are many rows of few classes in float32, with 8-bit labels of which a tenth does not count; those
that know of no such labels are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.rivals.authors import authors_loss
from bench.support.inputs import make_loss_inputs, make_mix
from bench.support.installed import INSTALLED, apex_cross_entropy
from bench.support.record import check_alike, record
from bench.support.shapes import DTYPES, short_name
from bench.support.timing import DEVICE, ON_GPU
from rsfast.kernels import (
    distillation_loss,
    distillation_loss_and_gradients,
    distillation_loss_reference,
)

Shape = tuple[int, int, int]  # (R, N, K)
SHAPES = [(5, 256, 1000), (5, 32, 1000), (5, 256, 21841)] if ON_GPU else [(3, 8, 100)]
# 8 images: NYUDv2 as in the paper, CamVid, ADE20K.
PIXELS = [(3, 8 * 352 * 352, 40), (3, 8 * 352 * 352, 11), (3, 8 * 256 * 256, 150)]
PIXELS = PIXELS if ON_GPU else [(3, 24 * 24, 11)]
# One label for each image, one shape with mixed labels, and pixels.
CASES = [
    *((shape, "images") for shape in SHAPES),
    (SHAPES[0], "mixed"),
    *((shape, "pixels") for shape in PIXELS),
]
IGNORED = 255
IMPLEMENTATIONS = ["authors", "reference", "authors_compiled", "compiled", "rsfast", "rsfast_fused"]
if not ON_GPU:
    IMPLEMENTATIONS = ["authors", "reference"]
elif "apex_xentropy" in INSTALLED:
    IMPLEMENTATIONS.append("apex_xentropy")


def case_name(case: tuple[Shape, str]) -> str:
    shape, kind = case
    return "R{}-N{}-K{}".format(*shape) + ("" if kind == "images" else f"-{kind}")


def dtypes_of(case: tuple[Shape, str]) -> list[torch.dtype]:
    """Logits of pixels are resized, and float32 therefore."""
    return [torch.float32] if case[1] == "pixels" else list(DTYPES)


def moved_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """One read and one write of the logits."""
    return 2 * shape[0] * shape[1] * shape[2] * dtype.itemsize


def make_runs(
    shape: Shape, dtype: torch.dtype, kind: str = "images"
) -> dict[str, Callable[[], list[Tensor]]]:
    """One callable per implementation on the same numbers: total, d(logits), d(alpha)."""
    logits, labels, alpha = make_loss_inputs(*shape, DEVICE, dtype)
    partner_labels, share = make_mix(*shape[1:], DEVICE)
    options = {"partner_labels": partner_labels, "share": share} if kind == "mixed" else {}
    if kind == "pixels":
        labels = labels.to(torch.uint8)
        labels[::10] = IGNORED
        options = {"ignore_index": IGNORED}
    logits.requires_grad_()
    alpha.requires_grad_()

    def through_autograd(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        total = loss(logits, labels, alpha)
        return [total.detach(), *torch.autograd.grad(total, (logits, alpha))]

    def authors(logits: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
        if kind == "mixed":
            own, other = (F.one_hot(of, shape[2]).float() for of in (labels, partner_labels))
            labels = share[:, None] * own + (1 - share[:, None]) * other
        return authors_loss([z.float() for z in logits.unbind()], labels, alpha)

    def apex(logits: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
        levels = [z.float() for z in logits.unbind()]
        return authors_loss(levels, labels, alpha, apex_cross_entropy)

    def reference(logits: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
        ce, ensemble, distill = distillation_loss_reference(logits, labels, alpha, **options)
        return ce + ensemble + distill

    def ours(logits: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
        ce, ensemble, distill = distillation_loss(
            logits, labels, alpha, **options, backend="triton"
        )
        return ce + ensemble + distill

    def fused() -> list[Tensor]:
        terms, *grads = distillation_loss_and_gradients(
            logits, labels, alpha, **options, backend="triton"
        )
        return [terms.ce + terms.ensemble + terms.distill, *grads]

    def exact() -> list[Tensor]:
        leaves = [t.detach().double().requires_grad_() for t in (logits, alpha)]
        total = reference(leaves[0], labels, leaves[1])
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    runs = {
        "exact": exact,
        "authors": lambda: through_autograd(authors),
        "reference": lambda: through_autograd(reference),
    }
    if ON_GPU:
        torch._dynamo.reset()  # after 8 shapes it would go on without compiling
        authors_compiled = torch.compile(authors, dynamic=False, fullgraph=True)
        compiled = torch.compile(reference, dynamic=False, fullgraph=True)
        runs |= {
            "authors_compiled": lambda: through_autograd(authors_compiled),
            "compiled": lambda: through_autograd(compiled),
            "rsfast": lambda: through_autograd(ours),
            "rsfast_fused": fused,
        }
        if kind == "images":  # Apex knows one label for each image
            runs["apex_xentropy"] = lambda: through_autograd(apex)
    if kind == "pixels":
        del runs["authors"]
        runs.pop("authors_compiled", None)
    return runs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case_name(case)}-{short_name(dtype)}")
        for case in CASES
        for dtype in dtypes_of(case)
    ],
)
def test_distillation_loss(
    benchmark,
    copy_bandwidth: float,
    case: tuple[Shape, str],
    dtype: torch.dtype,
    impl: str,
) -> None:
    shape, kind = case
    runs = make_runs(shape, dtype, kind)
    if impl not in runs:
        pytest.skip(f"{impl} knows no labels of {kind}")
    check_alike(runs, [impl], list)
    group = f"distillation_loss/{case_name(case)}/{short_name(dtype)}/forward_backward"
    record(benchmark, runs[impl], group, moved_bytes(shape, dtype), copy_bandwidth)
