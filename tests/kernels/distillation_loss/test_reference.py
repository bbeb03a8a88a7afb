"""The loss in closed form: against the paper's sums, term by term, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.kernels import DISTILL_MODES, distillation_loss, teacher_weights


def make_inputs(
    num_resolutions: int = 5, num_images: int = 6, num_classes: int = 11, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_resolutions, num_images, num_classes)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes, (num_images,), generator=generator)
    alpha = torch.randn(num_resolutions, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), labels, alpha.requires_grad_()


def paper_loss(
    logits: Tensor, labels: Tensor, alpha: Tensor, mode: str, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 1 to 10 as written: one KL term for each teacher and student.

    Labels are classes [N] or, as PyTorch's cross entropy takes them, probabilities [N, K].
    """
    count = len(logits)
    ce = sum(F.cross_entropy(z, labels, label_smoothing=smoothing) for z in logits)
    shares = torch.softmax(alpha, dim=0)
    z0 = sum(share * z.detach() for share, z in zip(shares, logits, strict=True))
    ensemble = F.cross_entropy(z0, labels, label_smoothing=smoothing)
    teachers = [z0, *logits]
    pairs = {
        "full": [(t, s) for s in range(1, count + 1) for t in range(s)],
        "vanilla": [(0, s) for s in range(1, count + 1)],
        "no_ensemble": [(t, s) for s in range(1, count + 1) for t in range(1, s)],
        "largest": [(1, s) for s in range(2, count + 1)],
        "none": [],
    }[mode]
    factor = 2 / (count + 1) if mode in ("full", "no_ensemble") else 1.0
    distill = logits.new_zeros(())
    for t, s in pairs:
        p = F.softmax(teachers[t].detach(), dim=1)
        divergence = p * (p.log() - F.log_softmax(logits[s - 1], dim=1))
        distill = distill + factor * divergence.sum() / len(labels)
    return ce, ensemble, distill


@pytest.mark.parametrize("num_resolutions", [1, 2, 5, 8], ids=lambda r: f"R{r}")
@pytest.mark.parametrize("mode", DISTILL_MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
def test_terms_and_gradients_match_the_papers_sums(
    mode: str, num_resolutions: int, smoothing: float
) -> None:
    logits, labels, alpha = make_inputs(num_resolutions)
    exact = paper_loss(logits, labels, alpha, mode, smoothing)
    ours = distillation_loss(logits, labels, alpha, mode, smoothing)
    for value, exact_value in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, exact_value, rtol=1e-12, atol=1e-12)
    exact_grads = torch.autograd.grad(sum(exact), (logits, alpha))
    grads = torch.autograd.grad(sum(ours), (logits, alpha))
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, exact_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_resolutions", [1, 5], ids=lambda r: f"R{r}")
@pytest.mark.parametrize("mode", DISTILL_MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
def test_two_labels_and_a_share_are_soft_labels(
    mode: str, num_resolutions: int, smoothing: float
) -> None:
    logits, labels, alpha = make_inputs(num_resolutions)
    partner_labels = labels.flip(0)
    partner_labels[3] = labels[3]
    share = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.7, 0.1])
    own, other = (F.one_hot(target, 11).double() for target in (labels, partner_labels))
    weight = share.double()[:, None]
    exact = paper_loss(logits, weight * own + (1 - weight) * other, alpha, mode, smoothing)
    ours = distillation_loss(
        logits, labels, alpha, mode, smoothing, partner_labels=partner_labels, share=share
    )
    for value, exact_value in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, exact_value, rtol=1e-12, atol=1e-12)
    exact_grads = torch.autograd.grad(sum(exact), (logits, alpha))
    grads = torch.autograd.grad(sum(ours), (logits, alpha))
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, exact_grad, rtol=1e-12, atol=1e-12)


def test_gradients_match_the_closed_form_of_the_full_version() -> None:
    logits, labels, alpha = make_inputs()
    count, images, classes = logits.shape
    grads = torch.autograd.grad(sum(distillation_loss(logits, labels, alpha)), (logits, alpha))
    p = torch.softmax(logits.detach(), dim=-1)
    shares = torch.softmax(alpha.detach(), dim=0)
    p0 = torch.softmax(torch.einsum("r,rnk->nk", shares, logits.detach()), dim=-1)
    onehot = F.one_hot(labels, classes)
    for s in range(1, count + 1):
        teachers = p0 + p[: s - 1].sum(0)
        exact = (p[s - 1] - onehot + 2 / (count + 1) * (s * p[s - 1] - teachers)) / images
        torch.testing.assert_close(grads[0][s - 1], exact, rtol=1e-12, atol=1e-13)
    g = torch.einsum("nk,rnk->r", p0 - onehot, logits.detach()) / images
    torch.testing.assert_close(grads[1], shares * (g - (shares * g).sum()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("num_resolutions", [1, 5])
def test_equal_logits_cost_r_plus_one_times_ln_k(num_resolutions: int) -> None:
    logits = torch.zeros(num_resolutions, 4, 1000)
    loss = sum(distillation_loss(logits, torch.arange(4), torch.ones(num_resolutions)))
    assert loss.item() == pytest.approx((num_resolutions + 1) * math.log(1000), rel=1e-6)


def test_the_ensemble_trains_alpha_only_and_the_rest_trains_the_network_only() -> None:
    logits, labels, alpha = make_inputs()
    ce, ensemble, distill = distillation_loss(logits, labels, alpha)
    of_logits, of_alpha = torch.autograd.grad(
        ensemble, (logits, alpha), retain_graph=True, allow_unused=True
    )
    assert of_logits is None or not of_logits.any()
    assert of_alpha.abs().max() > 0
    of_logits, of_alpha = torch.autograd.grad(ce + distill, (logits, alpha), allow_unused=True)
    assert of_alpha is None or not of_alpha.any()
    assert of_logits.abs().max() > 0


def test_permuting_the_resolutions_changes_who_teaches_whom() -> None:
    logits, labels, alpha = make_inputs()
    same = torch.zeros_like(alpha)
    here = distillation_loss(logits, labels, same)
    there = distillation_loss(logits.flip(0), labels, same)
    torch.testing.assert_close(here.ce, there.ce)
    assert abs(here.distill - there.distill) > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4], ids=["equal", "tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_logits_are_summed_in_float32(dtype: torch.dtype, scale: float) -> None:
    logits, labels, alpha = make_inputs(scale=scale)
    low = logits.detach().to(dtype)
    if not torch.isfinite(low).all():
        low = low.clamp(-6e4, 6e4)
    exact = distillation_loss(low.double(), labels, alpha.detach())
    ours = distillation_loss(low, labels, alpha.detach().float())
    for value, exact_value in zip(ours, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", DISTILL_MODES)
def test_the_weights_of_a_mode_are_those_of_the_paper(mode: str) -> None:
    table = torch.tensor(teacher_weights(mode, 5))
    totals = {"full": 5.0, "vanilla": 5.0, "no_ensemble": 10 / 3, "largest": 4.0, "none": 0.0}
    assert table.shape == (5, 6)
    assert table.sum().item() == pytest.approx(totals[mode])
    assert not table.triu(1).any(), "a student must not teach a larger resolution"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(6, 11)}, "logits must be floating point"),
        ({"logits": torch.zeros(5, 6, 11, dtype=torch.int64)}, "logits must be floating point"),
        ({"labels": torch.zeros(6)}, "labels must be int64"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 11])}, r"labels must be in \[0, 11\)"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, -1])}, r"labels must be in \[0, 11\)"),
        ({"alpha": torch.ones(4)}, r"alpha must be \[5\]"),
        ({"mode": "topdown"}, "mode must be one of"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    logits, labels, alpha = make_inputs()
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{"logits": logits, "labels": labels, "alpha": alpha, **change})
