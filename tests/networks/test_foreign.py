"""Networks of torchvision and timm, converted, against copies for each resolution in float64."""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision", reason="needs torchvision and timm: make check-networks")
pytest.importorskip("timm", reason="needs torchvision and timm: make check-networks")

from bench.models.networks import compare

NETWORKS = {
    "torchvision/resnet18": (96, 64),
    "torchvision/regnet_y_400mf": (96, 64),
    "torchvision/mobilenet_v3_small": (96, 64),
    "torchvision/efficientnet_b0": (96, 64),
    "torchvision/densenet121": (96, 64),
    "torchvision/shufflenet_v2_x1_0": (96, 64),
    "torchvision/googlenet": (96, 64),
    "torchvision/mnasnet0_5": (96, 64),
    "torchvision/inception_v3": (224, 160),
    "timm/resnest14d": (96, 64),
    "timm/skresnet18": (96, 64),
    "timm/ecaresnet26t": (96, 64),
    "timm/seresnet50": (96, 64),
    "timm/res2next50": (96, 64),
    "timm/ghostnet_050": (96, 64),
    "timm/hrnet_w18_small": (96, 64),
    "timm/tf_efficientnet_b0": (96, 64),  # pads as TensorFlow does
    "timm/repvgg_a0": (96, 64),
    "timm/mobilenetv4_conv_small": (96, 64),
}


@pytest.mark.filterwarnings("default")  # of packages that are not ours
@pytest.mark.parametrize("arch", NETWORKS)
def test_a_converted_network_equals_copies_for_each_resolution(arch: str) -> None:
    differences = compare(arch, NETWORKS[arch])
    assert max(differences) < 1e-9, differences
