"""Accuracy counts."""

from __future__ import annotations

import math

import pytest
import torch

from rsfast import Pyramid, create_model
from rsfast.data import Batch
from rsfast.engine.metrics import LossMeter
from rsfast.losses import LossTerms
from rsfast.tasks.classification import Accuracy, TopK, label_places
from rsfast.training.validation import validate


def test_top_k_counts_by_hand() -> None:
    counts = TopK(2, torch.device("cpu"))
    order = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    logits = torch.stack([order.expand(4, 6), order.flip(0).expand(4, 6)])
    counts.add(logits[:, :3], torch.tensor([0, 4, 5]), torch.arange(3))
    counts.add(logits[:, 3:], torch.tensor([5]), torch.tensor([3]))
    assert counts.read() == ([(25.0, 50.0), (50.0, 75.0)], 4)


def test_two_classes_have_a_top_two_instead_of_a_top_five() -> None:
    counts = TopK(1, torch.device("cpu"))
    counts.add(torch.tensor([[[1.0, 0.0]]]), torch.tensor([1]), torch.tensor([0]))
    assert counts.read() == ([(0.0, 100.0)], 1)


def test_places_are_counted_from_one_and_kept_image_by_image() -> None:
    counts = TopK(2, torch.device("cpu"), num_images=4)
    order = torch.tensor([3.0, 1.0, 2.0])
    logits = torch.stack([order.expand(3, 3), -order.expand(3, 3)])
    counts.add(logits, torch.tensor([0, 1, 2]), torch.tensor([3, 0, 2]))
    assert counts.places().tolist() == [[3, 0, 2, 1], [1, 0, 2, 3]]


def test_of_equal_logits_the_lower_class_is_first_as_argmax_has_it() -> None:
    logits = torch.tensor([[[1.0, 2.0, 2.0, 0.0]] * 4])
    places = label_places(logits, torch.arange(4))
    assert places.tolist() == [[3, 1, 2, 4]]
    assert (places[0] == 1).nonzero().item() == logits[0, 0].argmax()


@pytest.mark.parametrize("label", [0, 1])
def test_a_network_that_answers_nan_is_never_right(label: int) -> None:
    for logits in ([math.nan, 1.0], [1.0, math.nan], [math.nan, math.nan]):
        places = label_places(torch.tensor([[logits]]), torch.tensor([label]))
        is_last = math.isnan(logits[label]) or math.isnan(logits[1 - label])
        assert (places.item() == 2) is is_last


def test_places_agree_with_sorting() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 50, 20), torch.randint(0, 20, (50,))
    order = logits.argsort(dim=-1, descending=True)
    exact = (order == labels[None, :, None]).int().argmax(-1) + 1
    assert torch.equal(label_places(logits, labels), exact)


def test_loss_meter_averages_since_the_last_read() -> None:
    meter = LossMeter(LossTerms._fields, torch.device("cpu"))
    for value in (1.0, 3.0):
        meter.add(LossTerms(*(torch.tensor(value * k) for k in (1.0, 10.0, 100.0))))
    assert meter.read() == {"loss": 222.0, "ce": 2.0, "ensemble": 20.0, "distill": 200.0}
    meter.add(LossTerms(*(torch.tensor(5.0) for _ in range(3))))
    assert meter.read()["ce"] == 5.0


def test_loss_meter_leaves_out_what_is_not_finite() -> None:
    meter = LossMeter(LossTerms._fields, torch.device("cpu"))
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
        return Accuracy(list(levels), (0.0, 0.0), 1, torch.empty(0)).score

    assert score((70.0, 90.0), (60.0, 80.0)) > score((69.0, 99.0), (69.0, 99.0))
    assert score((70.0, 90.0), (61.0, 80.0)) > score((70.04, 90.0), (60.0, 80.0))
