"""The loss of mixed images, two labels and a share: the Triton kernel against float64.

Without a CUDA device the kernel runs in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.support.inputs import make_loss_inputs, make_mix
from kernel_helpers import CPU_OR_GPU, GPU_ONLY, PLACES, capture_without_host_sync, run_python
from loss_helpers import DRAWS, UPSTREAMS, Inputs, assert_as_good_as_pytorch, run
from rsfast.kernels import (
    DISTILL_MODES,
    distillation_loss,
    distillation_loss_and_gradients,
    distillation_loss_reference,
)
from sampling import pairwise

OPERATORS = torch.ops.rsfast

# The reference multiplies matrices, which cuBLAS does not promise to repeat.
pytestmark = pytest.mark.filterwarnings("ignore:.*CuBLAS:UserWarning")


def make_inputs(
    shape: tuple[int, ...],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    share: float | None = None,
    seed: int = 0,
) -> Inputs:
    """Those of the loss, partner labels and shares; all shares the same if one is given."""
    partner_labels, shares = make_mix(*shape[1:], device, seed)
    shares = shares if share is None else torch.full_like(shares, share)
    return *make_loss_inputs(*shape, device, dtype, seed=seed), partner_labels, shares


@pairwise(
    {
        "num_resolutions, num_images": [(1, 3), (2, 1), (5, 3), (8, 1)],
        "num_classes": [pytest.param(k, id=f"K{k}") for k in (1, 3, 65, 1000, 2047, 4099)],
        "share": [pytest.param(s, id=f"share-{s}") for s in (0.0, 0.3, 1.0, None)],
        "place": PLACES,
    },
    indirect=["place"],
)
def test_terms_and_gradients_match_the_float64_reference(
    num_resolutions: int,
    num_images: int,
    num_classes: int,
    share: float | None,
    place: tuple[str, torch.dtype],
) -> None:
    shape = (num_resolutions, num_images, num_classes)
    draws = [make_inputs(shape, *place, share, seed) for seed in range(DRAWS)]
    assert_as_good_as_pytorch(draws, label_smoothing=0.1)


@pairwise(
    {
        "mode": DISTILL_MODES,
        "upstream": tuple(UPSTREAMS),
        "smoothing, num_classes": [(0.0, 65), (0.1, 7), (0.0, 2500)],
        "place": PLACES,
    },
    indirect=["place"],
)
def test_every_mode_and_upstream_gradient_matches_the_float64_reference(
    mode: str, upstream: str, smoothing: float, num_classes: int, place: tuple[str, torch.dtype]
) -> None:
    draws = [make_inputs((5, 3, num_classes), *place, seed=seed) for seed in range(DRAWS)]
    options = {"mode": mode, "label_smoothing": smoothing}
    assert_as_good_as_pytorch(draws, UPSTREAMS[upstream], **options)


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("num_classes", [65, 2500], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
def test_a_share_of_one_or_zero_gives_the_bits_of_the_one_label(
    smoothing: float, num_classes: int, place: tuple[str, torch.dtype]
) -> None:
    logits, labels, alpha, partner_labels, share = make_inputs((5, 3, num_classes), *place)
    options = {"backend": "triton", "label_smoothing": smoothing}
    for value, target in ((1.0, labels), (0.0, partner_labels)):
        mixed = (logits, labels, alpha, partner_labels, torch.full_like(share, value))
        ours = run(distillation_loss, mixed, **options)
        exact = run(distillation_loss, (logits, target, alpha), **options)
        assert all(torch.equal(one, other) for one, other in zip(ours, exact, strict=True))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_equal_labels_are_one(backend: str, device: str) -> None:
    logits, labels, alpha, _, share = make_inputs((3, 4, 65), device)
    options = {"backend": backend, "label_smoothing": 0.1}
    ours = run(distillation_loss, (logits, labels, alpha, labels, share), **options)
    exact = run(distillation_loss, (logits, labels, alpha), **options)
    for value, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_distillation_does_not_know_of_the_mixture(backend: str, device: str) -> None:
    inputs = make_inputs((5, 3, 65), device)
    mixed = run(distillation_loss, inputs, UPSTREAMS["distill"], backend=backend)
    plain = run(distillation_loss, inputs[:3], UPSTREAMS["distill"], backend=backend)
    assert mixed.ce != plain.ce
    assert mixed.ensemble != plain.ensemble
    assert torch.equal(mixed.distill, plain.distill)
    torch.testing.assert_close(mixed.dlogits, plain.dlogits)
    assert not mixed.dalpha.any()


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("num_classes", [65, 2500], ids=lambda k: f"K{k}")
def test_one_launch_gives_the_terms_and_gradients_of_two(
    num_classes: int, place: tuple[str, torch.dtype]
) -> None:
    logits, labels, alpha, partner_labels, share = inputs = make_inputs((5, 3, num_classes), *place)
    options: dict[str, Any] = {"label_smoothing": 0.1}
    mix = {"partner_labels": partner_labels, "share": share}
    for function, backend, bounds in (
        (distillation_loss, "triton", {"rtol": 0.0, "atol": 0.0}),
        (distillation_loss_reference, "torch", {}),
    ):
        chosen = {"backend": backend} if backend == "triton" else {}
        two = run(function, inputs, UPSTREAMS["total"], **options, **chosen)
        terms, *grads = distillation_loss_and_gradients(
            logits, labels, alpha, **options, **mix, backend=backend
        )
        for ours, want in zip((*terms, *grads), two, strict=True):
            torch.testing.assert_close(ours, want, **bounds)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_operators_pass_opcheck(device: str) -> None:
    logits, labels, alpha, *mix = make_inputs((3, 2, 7), device)
    upstream = torch.tensor([1.0, 2.0, 3.0], device=device)
    arguments = (logits, labels, alpha, "full", 0.1, *mix)
    torch.library.opcheck(OPERATORS.distillation_loss_bwd.default, (upstream, *arguments))
    torch.library.opcheck(OPERATORS.distillation_loss_fwd_bwd.default, (upstream, *arguments))
    logits.requires_grad_()
    alpha.requires_grad_()
    torch.library.opcheck(OPERATORS.distillation_loss_fwd.default, arguments)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_whole_graph_compiles(device: str) -> None:
    inputs = make_inputs((3, 2, 65), device)
    compiled = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True)
    ours = run(compiled, inputs, backend="triton")
    eager = run(distillation_loss, inputs, backend="triton")
    for value, want in zip(ours, eager, strict=True):
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_a_share_gets_no_gradient(backend: str, device: str) -> None:
    logits, labels, alpha, partner_labels, share = make_inputs((3, 2, 7), device)
    terms = distillation_loss(
        logits,
        labels,
        alpha.requires_grad_(),
        partner_labels=partner_labels,
        share=share.requires_grad_(),
        backend=backend,
    )
    sum(terms).backward()
    assert alpha.grad is not None
    assert share.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": None}, "must be given together, got only partner_labels"),
        ({"partner_labels": None}, "must be given together, got only share"),
        ({"partner_labels": torch.zeros(3)}, r"partner_labels must be int64 \[3\]"),
        ({"partner_labels": torch.zeros(3, 7).long()}, r"partner_labels must be int64 \[3\], got"),
        ({"partner_labels": torch.tensor([0, 1, 7])}, r"partner_labels must be in \[0, 7\)"),
        ({"partner_labels": torch.tensor([0, -1, 1])}, r"partner_labels must be in \[0, 7\)"),
        ({"partner_labels": torch.zeros(3, device="meta").long()}, "partner_labels must be on cpu"),
        ({"share": torch.zeros(2)}, r"share must be float32 \[3\], got torch.float32 \(2,\)"),
        ({"share": torch.zeros(3).double()}, r"share must be float32 \[3\], got torch.float64"),
        ({"share": torch.tensor([0.0, 0.5, 1.1])}, r"share must be in \[0, 1\]"),
        ({"share": torch.tensor([0.0, -0.1, 1.0])}, r"share must be in \[0, 1\]"),
        ({"share": torch.tensor([0.0, float("nan"), 1.0])}, r"share must be in \[0, 1\]"),
        ({"share": torch.zeros(3, device="meta")}, "share must be on cpu like logits, got meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_input_is_named(backend: str, change: dict[str, Any], message: str) -> None:
    *inputs, partner_labels, share = make_inputs((5, 3, 7))
    mix = {"partner_labels": partner_labels, "share": share, **change}
    with pytest.raises(ValueError, match=message):
        distillation_loss(*inputs, **mix, backend=backend)


def test_the_kernel_wants_labels_and_shares_without_gaps() -> None:
    *inputs, partner_labels, share = make_inputs((5, 3, 7))
    for name, gaps in (
        ("partner_labels", torch.zeros(6).long()[::2]),
        ("share", torch.ones(6)[::2]),
    ):
        mix = {"partner_labels": partner_labels, "share": share, name: gaps}
        distillation_loss(*inputs, **mix)
        with pytest.raises(ValueError, match=f"{name} must be contiguous"):
            distillation_loss(*inputs, **mix, backend="triton")


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    def test_partner_labels_out_of_range_fail_an_assertion(self, device: str) -> None:
        done = run_python("""
import torch
from rsfast.kernels import distillation_loss
inputs = torch.zeros(2, 1, 3).cuda(), torch.tensor([2]).cuda(), torch.zeros(2).cuda()
mix = {"partner_labels": torch.tensor([3]).cuda(), "share": torch.ones(1).cuda()}
distillation_loss(*inputs, **mix, backend="triton")
torch.cuda.synchronize()
""")
        assert done.returncode != 0
        assert "partner_labels must be in [0, K)" in done.stderr

    def test_the_host_never_waits_and_a_graph_captures_it(self, device: str) -> None:
        inputs = make_inputs((5, 33, 1000), device, torch.bfloat16)
        exact = run(distillation_loss, inputs, backend="triton")
        captured = capture_without_host_sync(
            lambda: run(distillation_loss, inputs, backend="triton")
        )
        assert all(torch.equal(one, other) for one, other in zip(captured, exact, strict=True))
