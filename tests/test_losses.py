"""The loss module: alpha, precision under autocast, and its settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from rsfast.data import Mix
from rsfast.losses import LossTerms, MultiResolutionDistillation


def test_alpha_starts_with_equal_shares_and_equal_logits_cost_six_ln_k() -> None:
    loss = MultiResolutionDistillation(5)
    torch.testing.assert_close(loss.ensemble_weights, torch.full((5,), 0.2))
    total = loss(torch.zeros(5, 2, 1000), torch.tensor([3, 999])).total
    assert total.item() == pytest.approx(6 * math.log(1000))
    assert total.item() == pytest.approx(41.4465, abs=1e-3)


def test_total_is_the_sum_of_the_named_terms() -> None:
    terms = LossTerms(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0))
    assert terms.total == 7.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_is_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 10), torch.tensor([0, 1, 2, 3])
    loss = MultiResolutionDistillation(3)
    exact = loss(logits, labels)
    with torch.autocast("cpu", dtype):
        terms = loss(logits, labels)
    for term, exact_term in zip(terms, exact, strict=True):
        assert term.dtype == torch.float32
        assert torch.equal(term, exact_term)


def test_alpha_is_trained_towards_the_better_resolution() -> None:
    torch.manual_seed(0)
    labels = torch.arange(8) % 4
    good = 4.0 * one_hot(labels, 4).float()
    loss = MultiResolutionDistillation(2)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss(torch.stack([good, torch.randn(8, 4)]), labels).total.backward()
        optimizer.step()
    assert loss.ensemble_weights[0] > 0.7


def test_label_smoothing_reaches_both_cross_entropies() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 10), torch.tensor([0, 1, 2, 3])
    hard = MultiResolutionDistillation(3)(logits, labels)
    soft = MultiResolutionDistillation(3, label_smoothing=0.1)(logits, labels)
    exact = sum(cross_entropy(z, labels, label_smoothing=0.1) for z in logits)
    torch.testing.assert_close(soft.ce, exact)
    assert soft.ensemble != hard.ensemble
    torch.testing.assert_close(soft.distill, hard.distill)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
def test_mixed_labels_reach_both_cross_entropies_of_all_levels(
    smoothing: float, copies: int
) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2 * copies, 4, 10), torch.tensor([0, 1, 2, 3])
    mix = Mix(labels=torch.tensor([3, 1, 9, 0]), share=torch.tensor([0.25, 0.5, 0.0, 1.0]))
    loss = MultiResolutionDistillation(2, label_smoothing=smoothing, copies=copies)
    mixed, plain = loss(logits, labels, mix), loss(logits, labels)
    own, other = (one_hot(classes, 10).float() for classes in (labels, mix.labels))
    target = mix.share[:, None] * own + (1 - mix.share[:, None]) * other  # [N, K]
    exact = [cross_entropy(z, target, label_smoothing=smoothing) for z in logits]
    torch.testing.assert_close(mixed.ce, sum(exact))
    of_all = cross_entropy(logits.mean(0), target, label_smoothing=smoothing)  # shares are equal
    torch.testing.assert_close(mixed.ensemble, of_all)
    assert torch.equal(mixed.distill, plain.distill)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_resolutions": 0}, "num_resolutions must be at least 1"),
        ({"num_resolutions": 3, "mode": "half"}, "mode must be one of"),
    ],
    ids=["no resolution", "mode"],
)
def test_bad_settings_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiResolutionDistillation(**arguments)


def test_copies_of_a_resolution_share_its_weight_in_the_ensemble() -> None:
    loss = MultiResolutionDistillation(2, copies=3)
    assert loss.alpha.shape == (6,)
    torch.testing.assert_close(loss.ensemble_weights, torch.tensor([0.5, 0.5]))
    with torch.no_grad():
        loss.alpha.copy_(torch.tensor([1.0, 2.0, 3.0, 0.0, -1.0, 4.0]))
    shares = torch.softmax(loss.alpha, 0)
    expected = torch.stack([shares[:3].sum(), shares[3:].sum()])
    torch.testing.assert_close(loss.ensemble_weights, expected)
    torch.testing.assert_close(torch.softmax(loss.scores, 0), expected)


def test_without_copies_the_scores_are_alpha_to_the_bit() -> None:
    loss = MultiResolutionDistillation(5)
    torch.manual_seed(0)
    with torch.no_grad():
        loss.alpha.normal_(std=3.0)
    assert torch.equal(loss.scores, loss.alpha)


def test_no_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        MultiResolutionDistillation(2, copies=0)
