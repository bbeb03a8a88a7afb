"""RefineNet: its size, its parts, and that levels are networks of one resolution."""

from __future__ import annotations

import pytest
import torch

from rsfast import create_model
from rsfast.losses import PixelDistillation
from rsfast.models.refinenet import REFINENETS, ChainedResidualPooling, Refinement, refinenet

SIZES = (98, 67, 33)


def size_of(module: torch.nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def test_the_papers_network_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        switchable = create_model("refinenet101", (352, 224, 96), num_classes=40)
        single = refinenet("refinenet101", 40)
    assert size_of(switchable) + size_of(PixelDistillation(3)) == 118_306_923
    assert size_of(single) == 118_096_232


@pytest.mark.parametrize("name", REFINENETS)
def test_four_cascades_go_from_the_coarsest_stage_to_the_finest(name: str) -> None:
    with torch.device("meta"):
        network = refinenet(name, 5)
    cascades = list(network.refinements)
    assert all(isinstance(cascade, Refinement) for cascade in cascades)
    assert [cascade.fuse is None for cascade in cascades] == [True, False, False, False]
    assert [cascade.hand_on is None for cascade in cascades] == [False, False, False, True]
    assert [len(cascade.adapt) for cascade in cascades] == [2] * 4
    assert [len(cascade.refine) for cascade in cascades] == [3] * 4
    assert [cascade.dropout.p for cascade in cascades] == [0.5, 0.5, 0.0, 0.0]
    widths = [cascade.reduce.in_channels for cascade in cascades]
    assert widths == sorted(widths, reverse=True)
    assert [len(cascade.pooling.convs) for cascade in cascades] == [4] * 4


def test_chained_pooling_spreads_a_pixel_over_five_more_with_each_link() -> None:
    pooling = ChainedResidualPooling(1, poolings=2).double()
    for conv in pooling.convs:
        torch.nn.init.zeros_(conv.weight)
        conv.weight.data[0, 0, 1, 1] = 1.0
    x = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    x[0, 0, 7, 7] = 1.0
    found = pooling(x)[0, 0, 7]
    assert found.tolist() == [0] * 3 + [1, 1, 2, 2, 3, 2, 2, 1, 1] + [0] * 3


def test_levels_are_the_networks_of_one_resolution_at_odd_sizes() -> None:
    torch.manual_seed(0)
    model = create_model("refinenet18", SIZES, 3).double().eval()
    for norm in model.batch_norms():
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 1.5)
    images = [torch.randn(2, 3, size, size, dtype=torch.float64) for size in SIZES]
    with torch.no_grad():
        logits = model(images)
        for number, (size, image) in enumerate(zip(SIZES, images, strict=True)):
            level = logits.level(number)
            assert level.shape == (2, 3, -(-size // 4), -(-size // 4))
            torch.testing.assert_close(level, model.at(size)(image), rtol=1e-9, atol=1e-12)
