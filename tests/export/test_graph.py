"""One graph of every size computes what the network of that size computes."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rsfast
from deploy_helpers import pixels, unlike_banks
from rsfast.export.graph import FromShape, sizes_of, to_onnx
from rsfast.models import RSNet

RESOLUTIONS = (64, 48, 32)


class SqueezeExcite(nn.Module):
    """A block as torchvision's MobileNetV3 has it, and a norm as DenseNet has it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 1)
        )
        self.norm = nn.BatchNorm2d(8)  # in front of its convolution
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.squeeze(x))
        x = self.conv(torch.relu(self.norm(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class OfOneSize(nn.Module):
    """Whose classifier is as wide as the maps of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 32 * 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).flatten(1))


class Branching(OfOneSize):
    """Whose way depends on what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return pooled if self.training or bool((pooled > 0).any()) else -pooled


def build(arch: str, **options: object) -> RSNet:
    torch.manual_seed(0)
    if arch == "squeeze_excite":
        model = rsfast.convert(SqueezeExcite(5), RESOLUTIONS)
    else:
        model = rsfast.create_model(arch, RESOLUTIONS, num_classes=5, **options)
    return unlike_banks(model)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("size", [128, 64, 56, 50, 48, 40, 32, 16, 5])
def test_batch_norm_follows_from_the_size_as_at_says(size: int) -> None:
    model = build("resnet18")
    images = torch.from_numpy(pixels(2, size))
    assert error(FromShape(model)(images), model.at(size)(images)) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2", "squeeze_excite"])
def test_the_graph_equals_the_network_at_every_size_and_batch(arch: str) -> None:
    model = build(arch)
    graph = to_onnx(model)
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for size in (128, 64, 57, 48, 33, 32, 20):
        for batch in (1, 3):
            images = pixels(batch, size)
            (logits,) = session.run(["logits"], {"images": images})
            wanted = model.at(size)(torch.from_numpy(images))
            assert error(torch.from_numpy(logits), wanted) < 1e-4, (size, batch)


@torch.inference_mode()
def test_pixels_go_in_as_they_are_stored_where_the_graph_normalises() -> None:
    model = build("tiny:network")
    model.input_mean, model.input_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    session = onnxruntime.InferenceSession(to_onnx(model, preprocess=True).SerializeToString())
    stored = (pixels(2, 48) * 50 + 128).clip(0, 255).astype("uint8")
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (model.input_mean, model.input_std))
    images = (torch.from_numpy(stored).float() / 255 - mean) / std
    (logits,) = session.run(["logits"], {"images": stored})
    assert error(torch.from_numpy(logits), model.at(48)(images)) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("options", [{"bn": "shared"}, {"resolutions": (64,)}], ids=str)
def test_a_network_of_one_bank_is_exported_as_it_is(options: dict) -> None:
    torch.manual_seed(0)
    arguments = {"resolutions": RESOLUTIONS, **options}
    model = unlike_banks(rsfast.create_model("tiny:network", num_classes=5, **arguments))
    graph = to_onnx(model)
    assert not {"Shape", "Split"} & {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for size in (64, 40):
        images = pixels(2, size)
        (logits,) = session.run(["logits"], {"images": images})
        assert error(torch.from_numpy(logits), model.at(size)(torch.from_numpy(images))) < 1e-4


def test_the_choice_of_a_bank_costs_a_few_nodes_whatever_the_depth() -> None:
    nodes = [
        sum(node.op_type not in ("Conv", "BatchNormalization", "Relu") for node in graph.graph.node)
        for graph in (to_onnx(build("tiny:network")), to_onnx(build("resnet18")))
    ]
    assert nodes[1] - nodes[0] < 15


def test_kernels_of_one_pixel_do_not_make_operators_of_their_strides() -> None:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1)]
    pooled = [nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
    network = nn.Sequential(*layers, *pooled, nn.Linear(16, 4))
    model = rsfast.convert(network.to(memory_format=torch.channels_last), (32, 24))
    kinds = {node.op_type for node in to_onnx(model.eval()).graph.node}
    assert not kinds & {"Gather", "GatherND", "Range"}, kinds


def test_exporting_leaves_the_network_as_it_was() -> None:
    model = build("tiny:network")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strides = [param.stride() for param in model.parameters()]
    to_onnx(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [param.stride() for param in model.parameters()] == strides


def test_no_path_of_this_machine_is_in_the_file() -> None:
    text = to_onnx(build("tiny:network")).SerializeToString()
    assert b".py" not in text


def test_weights_are_not_copied_for_resolutions() -> None:
    model = build("resnet18")
    size = len(to_onnx(model).SerializeToString())
    single = sum(param.numel() for param in model.at(64).parameters()) * 4
    banks = sum(4 * norm.weight.numel() for norm in model.batch_norms()) * 4
    assert size < 1.01 * (single + banks)


def test_the_sizes_are_those_that_the_network_runs_at() -> None:
    assert sizes_of(build("tiny:network")) == (16, 128)
    assert sizes_of(rsfast.convert(OfOneSize(), (64,))) == (64, 64)


def test_what_cannot_be_exported_is_refused_in_one_sentence() -> None:
    model = rsfast.convert(Branching(), (64, 32))
    with pytest.raises(ValueError, match="network cannot be exported: ") as caught:
        to_onnx(model)
    assert "\n" not in str(caught.value)
