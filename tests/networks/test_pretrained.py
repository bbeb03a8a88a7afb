"""Weights of torchvision and timm in networks of rsfast: the same logits, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="needs torchvision and timm: make check-networks")
pytest.importorskip("timm", reason="needs torchvision and timm: make check-networks")

import timm
import torch
import torchvision
from torch import nn

from rsfast import convert, create_model, load_pretrained

RESOLUTIONS = (96, 64)
SAME = {
    **{
        f"{package}/{name}": name
        for package in ("torchvision", "timm")
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    },
    "torchvision/resnext50_32x4d": "resnext50_32x4d",
    "timm/resnext50_32x4d": "resnext50_32x4d",
    "torchvision/resnext101_32x8d": "resnext101_32x8d",
    "torchvision/mobilenet_v2": "mobilenetv2",
    "timm/mobilenetv2_100": "mobilenetv2",
}

LARGE = [name for name in SAME if any(size in name for size in ("101", "152"))]


def theirs(name: str, classes: int = 10) -> nn.Module:
    """Built by its package, with statistics that no two layers share."""
    package, _, arch = name.partition("/")
    torch.manual_seed(0)
    if package == "torchvision":
        extra = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
        network = torchvision.models.get_model(arch, weights=None, num_classes=classes, **extra)
    else:
        network = timm.create_model(arch, num_classes=classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.1)
    return network.double().eval()


@torch.no_grad()
def assert_same_logits(model, network: nn.Module) -> None:
    for resolution in RESOLUTIONS:
        images = torch.randn(2, 3, resolution, resolution, dtype=torch.float64)
        ours, expected = model.at(resolution)(images), network(images)
        assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.filterwarnings("default")  # of packages that are not ours
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in SAME],
)
def test_networks_of_both_packages_fit_into_ours(tmp_path: Path, name: str) -> None:
    network = theirs(name)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "a.pth")
    model = create_model(SAME[name], RESOLUTIONS, 10).double()
    loaded = load_pretrained(model, tmp_path / "a.pth")
    assert loaded.classifier == "its classifier of 10 classes was taken over"
    assert_same_logits(model, network)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "name",
    [
        "torchvision/regnet_y_400mf",
        "torchvision/mobilenet_v3_small",
        "torchvision/densenet121",
        "torchvision/googlenet",
        "timm/efficientnet_b0",
        "timm/mobilenetv2_100",
        "timm/mobilenetv4_conv_small",
        "timm/resnet18d",
    ],
)
def test_and_into_their_own_converted(tmp_path: Path, name: str) -> None:
    network = theirs(name)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    model = create_model(name, RESOLUTIONS, 10).double()
    load_pretrained(model, tmp_path / "a.pth")
    assert_same_logits(model, network)
    other = create_model(name, RESOLUTIONS, 7)
    sentence = "its classifier is for 10 classes, a fresh one for 7 takes its place"
    assert load_pretrained(other, tmp_path / "a.pth").classifier == sentence


@pytest.mark.filterwarnings("default")
def test_a_converted_module_takes_ours_and_a_deep_stem_is_refused(tmp_path: Path) -> None:
    source = create_model("mobilenetv2", RESOLUTIONS, 10).double()
    torch.save(source.at(96).state_dict(), tmp_path / "a.pth")
    model = convert(timm.create_model("mobilenetv2_100", num_classes=10).double(), RESOLUTIONS)
    load_pretrained(model, tmp_path / "a.pth")
    assert_same_logits(model, source.at(96))
    torch.save(theirs("timm/resnet18d").state_dict(), tmp_path / "d.pth")
    with pytest.raises(ValueError, match=r"does not fit resnet18: .*conv1.0.weight"):
        load_pretrained(create_model("resnet18", RESOLUTIONS, 10), tmp_path / "d.pth")
