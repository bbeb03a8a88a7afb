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
