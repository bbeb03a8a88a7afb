"""Averaged weights, against PyTorch's."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rsfast.engine.ema import AveragedModel


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@torch.no_grad()
def test_parameters_and_statistics_are_those_of_pytorch_and_counters_are_copied() -> None:
    model = make_model()
    ours = AveragedModel(model, 0.9)
    theirs = TorchAveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(4):
        for tensor in model.state_dict().values():
            tensor += torch.ones_like(tensor) * (step + 1)
        ours.update(model)
        theirs.update_parameters(model)
        assert ours.updates == step + 1
        expected = theirs.module.state_dict()
        expected["1.num_batches_tracked"] = model.state_dict()["1.num_batches_tracked"]
        for name, tensor in ours.module.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_the_average_is_no_part_of_the_network() -> None:
    model = make_model()
    average = AveragedModel(model, 0.5)
    with torch.no_grad():
        model[0].weight.zero_()
    assert average.module[0].weight.any()
    assert not any(param.requires_grad for param in average.module.parameters())


@torch.no_grad()
def test_with_warm_up_the_average_forgets_what_came_before_training() -> None:
    model = make_model()
    cold, warm = AveragedModel(model, 0.9999), AveragedModel(model, 0.9999, warmup=True)
    model[0].weight.fill_(-1000.0)  # of weights from before training
    for average in (cold, warm):
        average.update(model)
    model[0].weight.fill_(1.0)
    decays = []
    for _ in range(120):
        decays.append(warm.decay())
        for average in (cold, warm):
            average.update(model)
    assert decays[:2] == [2 / 11, 3 / 12]
    assert decays == sorted(decays)
    assert torch.allclose(warm.module[0].weight, model[0].weight)
    assert (cold.module[0].weight < -900).all()
    warm.updates = 10**6
    assert warm.decay() == 0.9999
