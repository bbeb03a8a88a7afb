"""Accuracy counts."""

from __future__ import annotations

import math

import pytest
import torch

from rsfast import Pyramid, create_model
from rsfast.data import Batch
from rsfast.losses import LossTerms
from rsfast.metrics import LossMeter, TopK
from rsfast.validation import Accuracy, validate


def test_top_k_counts_by_hand() -> None:
    counts = TopK(2, torch.device("cpu"))
    order = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    logits = torch.stack([order.expand(4, 6), order.flip(0).expand(4, 6)])
    counts.add(logits[:, :3], torch.tensor([0, 4, 5]))
    counts.add(logits[:, 3:], torch.tensor([5]))
    assert counts.read() == ([(25.0, 50.0), (50.0, 75.0)], 4)


def test_two_classes_have_a_top_two_instead_of_a_top_five() -> None:
    counts = TopK(1, torch.device("cpu"))
    counts.add(torch.tensor([[[1.0, 0.0]]]), torch.tensor([1]))
    assert counts.read() == ([(0.0, 100.0)], 1)


def test_loss_meter_averages_since_the_last_read() -> None:
    meter = LossMeter(torch.device("cpu"))
    for value in (1.0, 3.0):
        meter.add(LossTerms(*(torch.tensor(value * k) for k in (1.0, 10.0, 100.0))))
    assert meter.read() == {"loss": 222.0, "ce": 2.0, "ensemble": 20.0, "distill": 200.0}
    meter.add(LossTerms(*(torch.tensor(5.0) for _ in range(3))))
    assert meter.read()["ce"] == 5.0


def test_loss_meter_leaves_out_what_is_not_finite() -> None:
    meter = LossMeter(torch.device("cpu"))
    for ensemble in (1.0, math.nan, 3.0, math.inf):
        meter.add(LossTerms(torch.tensor(4.0), torch.tensor(ensemble), torch.tensor(0.0)))
    assert meter.read() == {"loss": 6.0, "ce": 4.0, "ensemble": 2.0, "distill": 0.0}
    meter.add(LossTerms(*(torch.tensor(math.nan) for _ in range(3))))
    assert all(math.isnan(value) for value in meter.read().values())
    meter.add(LossTerms(*(torch.tensor(1.0) for _ in range(3))))
    assert meter.read()["loss"] == 3.0


def test_validation_counts_levels_and_ensemble_and_restores_the_mode() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", (48, 32), 7).train()
    for norm in model.batch_norms():
        norm.running_mean.normal_(std=0.1)
    images = [torch.randn(10, 3, r, r) for r in (48, 32)]
    labels = torch.randint(0, 7, (10,))
    batches = [
        Batch(Pyramid.pack([level[part] for level in images]), labels[part], part)
        for part in (torch.arange(6), torch.arange(6, 10))
    ]
    weights = torch.tensor([0.7, 0.3])
    accuracy = validate(model, weights, batches)
    assert model.training
    with torch.no_grad():
        logits = model.eval()(images)
    mixed = 0.7 * logits[0] + 0.3 * logits[1]
    exact = [100 * (z.argmax(1) == labels).float().mean().item() for z in (*logits, mixed)]
    found = [*accuracy.levels, accuracy.ensemble]
    assert [top1 for top1, _ in found] == pytest.approx(exact)
    assert all(top5 >= top1 for top1, top5 in found)
    assert accuracy.num_images == 10


def test_score_is_the_largest_resolution_then_the_mean() -> None:
    def score(*levels: tuple[float, float]) -> tuple[float, float]:
        return Accuracy(list(levels), (0.0, 0.0), 1).score

    assert score((70.0, 90.0), (60.0, 80.0)) > score((69.0, 99.0), (69.0, 99.0))
    assert score((70.0, 90.0), (61.0, 80.0)) > score((70.04, 90.0), (60.0, 80.0))
