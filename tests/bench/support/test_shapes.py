"""What the benchmarks are told of the networks is what the networks do."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.support import shapes
from bench.support.shapes import PAPER_RESOLUTIONS, batch_norm_layers, calls, conv_layers
from rsfast import kernels
from rsfast.pyramid import SwitchableBatchNorm2d

RESNET_50 = {("relu", False): 33, ("relu", True): 16, (None, False): 4}


@pytest.mark.parametrize(
    ("arch", "layers", "elements"),
    # Outputs of all convolutions of one image at 224 pixels.
    [
        ("resnet50", 53, 11.1),
        ("resnet18", 20, 2.48),
        ("mobilenetv2", 52, 6.68),
        ("resnext50_32x4d", 53, 14.4),
    ],
)
def test_batch_norms_are_those_of_the_network(arch: str, layers: int, elements: float) -> None:
    found = batch_norm_layers(arch)
    assert sum(found.values()) == layers
    at_224 = sum(count * layer.sizes[0][0] ** 2 * layer.channels for layer, count in found.items())
    assert at_224 / 1e6 == pytest.approx(elements, rel=0.01)


@pytest.mark.parametrize(
    ("arch", "kinds"),
    [
        ("resnet50", RESNET_50),
        ("resnext50_32x4d", RESNET_50),
        ("resnet18", {("relu", False): 9, ("relu", True): 8, (None, False): 3}),
        ("mobilenetv2", {("relu6", False): 35, (None, True): 10, (None, False): 7}),
    ],
)
def test_what_joins_a_norm_is_seen(arch: str, kinds: dict[tuple[str | None, bool], int]) -> None:
    found = batch_norm_layers(arch)
    joined: Counter[tuple[str | None, bool]] = Counter()
    for layer, count in found.items():
        joined[layer.activation, layer.residual] += count
    assert joined == kinds
    pooled = [(str(layer), count) for layer, count in found.items() if layer.pooled]
    assert pooled == ([("112px-C64-relu", 1)] if arch.startswith("res") else [])


@pytest.mark.parametrize("arch", shapes.ARCHITECTURES)
def test_every_norm_of_the_network_is_called_once(arch: str) -> None:
    model = shapes.hollow(arch, PAPER_RESOLUTIONS)
    norms = {
        name: module
        for name, module in model.network.named_modules()
        if isinstance(module, SwitchableBatchNorm2d)
    }
    seen = [(c.layer, shapes.batch_norm_of(c)) for c in shapes.observe(model)]
    channels = {name: layer.channels for name, layer in seen if layer is not None}
    assert channels == {name: norm.num_features for name, norm in norms.items()}
    assert sum(layer is not None for _, layer in seen) == len(norms)


def test_observing_leaves_the_operations_as_they_were() -> None:
    before = [getattr(kernels, op) for op in ("switchable_bn_act", "conv2d")]
    shapes.observe(shapes.hollow("resnet18", (32,)))
    assert [kernels.switchable_bn_act, kernels.conv2d] == before


def test_convolutions_are_those_of_the_network() -> None:
    found = conv_layers("resnet50")
    colours = 4 if shapes.ON_GPU else 3
    stem = shapes.ConvLayer(tuple((r, r) for r in PAPER_RESOLUTIONS), colours, 64, 7, 2, 1)
    assert found.pop(stem) == 1
    assert stem.out_sizes == tuple((r // 2, r // 2) for r in PAPER_RESOLUTIONS)
    by_kind: Counter[tuple[int, int, int]] = Counter()
    for layer, count in found.items():
        by_kind[layer.kernel, layer.stride, layer.groups] += count
    assert by_kind == {(3, 1, 1): 13, (3, 2, 1): 3}
    grouped = [layer for layer in conv_layers("resnext50_32x4d") if layer.groups > 1]
    assert {layer.groups for layer in grouped} == {32}
    assert str(grouped[0]) == "56px-C128-C128-k3s1-g32"
    depthwise = [layer for layer in conv_layers("mobilenetv2") if layer.groups > 1]
    assert all(layer.groups == layer.c_in == layer.c_out for layer in depthwise)
    assert str(depthwise[0]) == "112px-C32-C32-k3s1-depthwise"


def test_strided_maps_are_those_of_the_shortcuts() -> None:
    found = shapes.strided_maps("resnet50")
    assert Counter({str(layer): count for layer, count in found.items()}) == {
        "56px-C256-s2": 1,
        "28px-C512-s2": 1,
        "14px-C1024-s2": 1,
    }
    assert not shapes.strided_maps("mobilenetv2")


@pytest.mark.parametrize(
    ("arch", "channels"), [("resnet50", 2048), ("resnet18", 512), ("mobilenetv2", 1280)]
)
def test_the_pooled_map_is_the_smallest_and_widest(arch: str, channels: int) -> None:
    pooled = shapes.pooled_map(arch)
    assert pooled == (((7, 7), (6, 6), (5, 5), (4, 4), (3, 3)), channels)
    assert pooled.level_rows(2) == (98, 72, 50, 32, 18)


def test_padded_images_are_read_as_they_are() -> None:
    first = [calls("resnet18", (64, 32), channels)[0] for channels in (3, 4)]
    assert [call.op for call in first] == ["conv2d", "conv2d"]
    assert [call.arguments["weight"].shape[1] for call in first] == [3, 4]
