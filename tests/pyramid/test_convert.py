"""Single-resolution networks: which batch-norm bank they get, and what they are made of."""

from __future__ import annotations

import copy

import pytest
import torch

from rsfast import RSNet, create_model
from rsfast.models.deploy import calibrate
from rsfast.pyramid.convert import bn_mixture

RESOLUTIONS = (64, 48, 32)
PLAIN = {
    "AdaptiveAvgPool2d",
    "BasicBlock",
    "BatchNorm2d",
    "Bottleneck",
    "Conv2d",
    "InvertedResidual",
    "Linear",
    "MaxPool2d",
    "MobileNetV2",
    "ResNet",
    "Sequential",
    "Identity",
    "ReLU",
    "ReLU6",
}


def make_model(arch: str = "resnet18", bn: str = "private") -> RSNet:
    """A network whose batch-norm banks differ from each other."""
    torch.manual_seed(0)
    model = create_model(arch, RESOLUTIONS, 7, bn)
    for norm in model.batch_norms():
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("resolution", "between", "mixture"),
    [
        (64, "interpolate", ((0, 1.0),)),
        (48, "interpolate", ((1, 1.0),)),
        (52, "interpolate", ((0, 0.25), (1, 0.75))),
        (36, "interpolate", ((1, 0.25), (2, 0.75))),
        (52, "nearest", ((1, 1.0),)),
        (56, "nearest", ((0, 1.0),)),
        (96, "interpolate", ((0, 1.0),)),
        (16, "interpolate", ((2, 1.0),)),
        (16, "nearest", ((2, 1.0),)),
    ],
    ids=str,
)
def test_mixture_of_sets(resolution: int, between: str, mixture: tuple) -> None:
    assert bn_mixture(RESOLUTIONS, resolution, between) == mixture


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenetv2"])
@pytest.mark.parametrize("level", range(3), ids=[str(r) for r in RESOLUTIONS])
def test_a_trained_resolution_gives_the_networks_own_logits(arch: str, level: int) -> None:
    model = make_model(arch).double()
    images = [torch.randn(2, 3, r, r, dtype=torch.float64) for r in RESOLUTIONS]
    single = model.at(RESOLUTIONS[level])
    torch.testing.assert_close(single(images[level]), model(images)[level])


def test_between_two_resolutions_everything_is_interpolated() -> None:
    model = make_model()
    first = model.at(52).bn1
    norm = model.batch_norms()[0]
    for name in ("weight", "bias", "running_mean", "running_var"):
        banks = getattr(norm, name)
        torch.testing.assert_close(getattr(first, name), 0.25 * banks[0] + 0.75 * banks[1])
    assert model.at(52)(torch.randn(2, 3, 52, 52)).shape == (2, 7)


def test_the_copy_is_plain_torch_in_eval_mode_and_independent() -> None:
    model = make_model("mobilenetv2")
    single = model.at(48)
    assert {type(module).__name__ for module in single.modules()} <= PLAIN
    assert not single.training
    image = torch.randn(1, 3, 48, 48)
    before = single(image)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    assert torch.equal(single(image), before)


def test_the_copy_exports() -> None:
    single = make_model().at(32)
    image = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(single, (image,)).module()
    torch.testing.assert_close(exported(image), single(image))


def test_shared_batch_norm_serves_every_resolution() -> None:
    model = make_model(bn="shared")
    a, b = model.at(32).state_dict(), model.at(57).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_calibration_averages_the_batch_statistics() -> None:
    single = make_model().at(40)
    other = copy.deepcopy(single)
    batches = [torch.randn(4, 3, 40, 40) for _ in range(3)]
    calibrate(single, iter(batches))
    convolved = [other.conv1(batch) for batch in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in convolved]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in convolved]).mean(0)
    torch.testing.assert_close(single.bn1.running_mean, mean)
    torch.testing.assert_close(single.bn1.running_var, var)
    assert torch.equal(single.bn1.weight, other.bn1.weight)
    assert not any(module.training for module in single.modules())


def test_bad_arguments_are_named() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="between must be one of"):
        model.at(40, "calibrate")
    with pytest.raises(ValueError, match="resolution must be positive"):
        model.at(0)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        calibrate(model.at(40), iter(()))
