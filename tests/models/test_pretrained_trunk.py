"""Weights of others put into the trunk of a network of segmentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rsfast
from rsfast import create_model, load_pretrained
from rsfast.models import RSNet
from rsfast.models.registry import build
from rsfast.training import checkpoint
from weight_helpers import assert_is, plain, written

RESOLUTIONS = (48, 32)


def assert_trunk_is(model: RSNet, network: nn.Module) -> None:
    """At every resolution the trunk is the plain network without its classifier."""
    expected = {n: t for n, t in network.state_dict().items() if not n.startswith("fc.")}
    for resolution in model.resolutions:
        trunk = model.at(resolution).get_submodule("trunk").state_dict()
        assert trunk.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(trunk[name], tensor), f"{resolution} {name}"


def decoder_of(model: RSNet) -> dict[str, Tensor]:
    state = model.network.state_dict()
    return {name: t.clone() for name, t in state.items() if not name.startswith("trunk.")}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_resnet_fills_the_trunk_and_leaves_the_decoder(tmp_path: Path, prefix: str) -> None:
    network = plain("resnet18", 7)
    state = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    model = create_model("refinenet18", RESOLUTIONS, 3)
    before = decoder_of(model)
    loaded = load_pretrained(model, written(tmp_path / "a.pth", state))
    assert_trunk_is(model, network)
    after = decoder_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert loaded.classifier == "the decoder and its classifier of 3 start afresh"
    assert loaded.banks == "its one batch norm was copied into 2 banks"
    without = {n: t for n, t in state.items() if "fc." not in n}
    load_pretrained(create_model("refinenet18", RESOLUTIONS, 3), written(tmp_path / "b", without))


def test_a_trunk_takes_the_banks_of_an_rs_net_by_resolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = create_model("resnet18", (64, 32), 4)
    for bank, norm in enumerate(theirs.batch_norms()):
        norm.running_mean.copy_(torch.tensor([[1.0 + bank], [3.0]]).expand_as(norm.running_mean))
    loss = rsfast.losses.MultiResolutionDistillation(2)
    content = {**checkpoint.model_payload(theirs), "loss": loss.state_dict()}
    checkpoint.save(content, tmp_path / "a.pt")
    model = create_model("refinenet18", RESOLUTIONS, 3)
    loaded = load_pretrained(model, tmp_path / "a.pt")
    assert loaded.banks == (
        "its batch-norm banks were taken by resolution: 48 from 64 and 32, 32 from 32"
    )
    assert torch.equal(
        model.network.trunk.bn1.running_mean[:, 0], torch.tensor([(1.0 + 3.0) / 2, 3.0])
    )


def test_a_refinenet_goes_in_whole_and_its_other_classifier_stays_away(tmp_path: Path) -> None:
    network = plain("refinenet18", 3)
    path = written(tmp_path / "a.pth", network.state_dict())
    model = create_model("refinenet18", RESOLUTIONS, 3)
    load_pretrained(model, path)
    assert_is(model, network)
    other = create_model("refinenet18", RESOLUTIONS, 4)
    loaded = load_pretrained(other, path)
    assert loaded.classifier == "its classifier is for 3 classes, a fresh one for 4 takes its place"
    assert torch.equal(
        other.network.refinements[0].reduce.weight, network.refinements[0].reduce.weight
    )


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            "resnet34",
            r"does not fit refinenet18: .* are unknown here \(trunk.layer1.2.*a resnet34$",
        ),
        (
            "resnet50",
            r"does not fit refinenet18: .* of another shape \(.*its keys look like a resnet50$",
        ),
        ("mobilenetv2", "does not fit refinenet18: .*its keys look like a mobilenetv2$"),
    ],
)
def test_another_trunk_is_refused(tmp_path: Path, theirs: str, message: str) -> None:
    path = written(tmp_path / "a.pth", build(theirs, 5).state_dict())
    model = create_model("refinenet18", RESOLUTIONS, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, path)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_refinenet_is_no_resnet(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", build("refinenet18", 5).state_dict())
    with pytest.raises(ValueError, match="is not of resnet18: no tensor of it has a name"):
        load_pretrained(create_model("resnet18", RESOLUTIONS, 5), path)
