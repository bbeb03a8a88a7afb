"""Parts of a network by name, and those that are not trained."""

from __future__ import annotations

import pytest
import torch

from rsfast import create_model
from rsfast.data import Batch
from rsfast.engine.optim import build_optimizer
from rsfast.engine.step import TrainStep
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import RSNet
from rsfast.models.parts import freeze, frozen_by, parts_of
from rsfast.pyramid import Pyramid

RESOLUTIONS = (32, 24)


def names_of(model: RSNet) -> set[str]:
    return {name for name, _ in model.network.named_parameters()}


@pytest.mark.parametrize(
    ("arch", "stem", "classifier"),
    [
        ("resnet18", {"conv1.weight", "bn1.weight", "bn1.bias"}, "fc"),
        ("resnet50", {"conv1.weight", "bn1.weight", "bn1.bias"}, "fc"),
        (
            "mobilenetv2",
            {"features.0.0.weight", "features.0.1.weight", "features.0.1.bias"},
            "classifier.1",
        ),
        ("tiny:network", {"conv1.weight", "bn1.weight", "bn1.bias"}, "fc"),
    ],
)
def test_named_parts_mean_the_same_in_every_network(
    arch: str, stem: set[str], classifier: str
) -> None:
    model = create_model(arch, RESOLUTIONS, 3)
    last = {f"{classifier}.weight", f"{classifier}.bias"}
    assert frozen_by(model, ["stem"]) == stem
    assert frozen_by(model, ["classifier"]) == last
    assert frozen_by(model, ["backbone"]) == names_of(model) - last
    assert frozen_by(model, ["all-but-classifier"]) == names_of(model) - last
    norms = frozen_by(model, ["batch-norms"])
    assert len(norms) == 2 * len(model.batch_norms())
    assert frozen_by(model, ["all-but-batch-norms"]) == names_of(model) - norms


def test_the_backbone_of_segmentation_is_the_trunk_so_that_the_decoder_is_trained() -> None:
    model = create_model("refinenet18", (64, 32), 3)
    trunk = {n for n in names_of(model) if n.startswith("trunk.")}
    assert frozen_by(model, ["backbone"]) == frozen_by(model, ["trunk"]) == trunk
    known = parts_of(model)
    assert len(known) == len(set(known))


def test_paths_of_modules_are_parts() -> None:
    model = create_model("resnet18", RESOLUTIONS, 3)
    assert frozen_by(model, ["layer1"]) == {n for n in names_of(model) if n.startswith("layer1.")}
    assert frozen_by(model, ["layer1.0", "fc"]) == {
        n for n in names_of(model) if n.startswith(("layer1.0.", "fc."))
    }
    assert parts_of(model)[4:] == "conv1 bn1 layer1 layer2 layer3 layer4 fc all-but-PART".split()
    assert "features.18" in parts_of(create_model("mobilenetv2", RESOLUTIONS, 3))


@pytest.mark.parametrize("part", ["layer", "layer5", "all-but-layer5", "conv1.weigh", "all-but-"])
def test_an_unknown_part_is_refused_with_those_there_are(part: str) -> None:
    model = create_model("resnet18", RESOLUTIONS, 3)
    with pytest.raises(ValueError, match="must name parts of resnet18: classifier, .*layer4, fc"):
        freeze(model, ["stem", part])
    assert all(param.requires_grad for param in model.parameters())


def test_something_must_be_left_to_train() -> None:
    model = create_model("tiny:network", RESOLUTIONS, 3)
    with pytest.raises(ValueError, match="must leave something to train, got backbone fc"):
        freeze(model, ["backbone", "fc"])


@pytest.mark.parametrize("parts", [["stem"], ["backbone"], ["batch-norms"], ["conv2", "bn3"]])
@pytest.mark.parametrize("decay", ["all", "weights"])
def test_frozen_parts_stay_and_have_no_state_but_their_statistics_move(
    parts: list[str], decay: str
) -> None:
    torch.manual_seed(0)
    model = create_model("tiny:network", RESOLUTIONS, 3)
    loss = MultiResolutionDistillation(2)
    frozen = freeze(model, parts)
    optimizer = build_optimizer(model, loss, lr=0.1, weight_decay=0.1, decay=decay)
    step = TrainStep(model, loss, optimizer, precision="fp32")
    before = {name: t.clone() for name, t in model.network.state_dict().items()}
    rows = [torch.randn(4, 3, r, r) for r in RESOLUTIONS]
    for banks in (None, (0,), None):  # the second leaves a bank out
        levels = rows if banks is None else rows[:1]
        images = Pyramid.pack(levels, banks)
        labels = torch.arange(4) % 3
        if banks is None:
            step(Batch(images, labels, torch.arange(4)))
        else:
            model(images).sum().backward()
            optimizer.step()
    params = dict(model.network.named_parameters())
    trained = {name for name, param in params.items() if not torch.equal(param, before[name])}
    assert trained == set(params) - set(frozen)
    assert all(params[name].grad is None for name in frozen)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert held == {id(p) for p in (*model.parameters(), *loss.parameters()) if p.requires_grad}
    assert len(optimizer.state_dict()["state"]) == len(held)
    for norm in ("bn1", "bn2", "bn3"):
        moved = model.network.get_submodule(norm).running_mean != before[f"{norm}.running_mean"]
        assert moved.any(dim=1).tolist() == [True, True], norm
