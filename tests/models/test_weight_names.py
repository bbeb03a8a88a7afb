"""Names that other programs have for the layers of rsfast's networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rsfast import create_model, load_pretrained
from rsfast.models.registry import build
from rsfast.models.weight_names import looks_like, other_names, without_prefixes

# Layer -> shape of its weight, as the packages build the networks.
FOREIGN = json.loads((Path(__file__).parent / "foreign_layers.json").read_text())
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def shapes_of(layers: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Of a state dict: batch norms have five tensors, classifiers two, convolutions one."""
    found: dict[str, tuple[int, ...]] = {}
    for layer, shape in layers.items():
        fields = {1: NORM, 2: ("weight", "bias"), 4: ("weight",)}[len(shape)]
        for field in fields:
            own = tuple(shape) if field == "weight" else (shape[0],)
            found[f"{layer}.{field}"] = () if field == "num_batches_tracked" else own
    return found


@pytest.mark.parametrize(
    ("arch", "foreign"),
    [
        ("resnet18", "torchvision/resnet18"),
        ("mobilenetv2", "torchvision/mobilenet_v2"),
        ("mobilenetv2", "timm/mobilenetv2_100"),
    ],
)
def test_every_tensor_of_a_foreign_network_has_its_place(
    tmp_path: Path, arch: str, foreign: str
) -> None:
    torch.manual_seed(0)
    state = {
        name: torch.randn(shape) if shape else torch.tensor(3)
        for name, shape in shapes_of(FOREIGN[foreign]).items()
    }
    torch.save(state, tmp_path / "a.pth")
    model = create_model(arch, (48, 32))
    loaded = load_pretrained(model, tmp_path / "a.pth")
    assert loaded.source == "another program"
    assert loaded.classifier == "its classifier of 1000 classes was taken over"
    found = model.at(32).state_dict()
    # Which layer is which: by order for torchvision, whose names are ours too.
    if foreign.startswith("torchvision"):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    else:
        left = list(state.values())
        for tensor in found.values():
            at = next(i for i, own in enumerate(left) if torch.equal(own, tensor))
            left.pop(at)
        assert not left, "each of them once"
        assert torch.equal(found["features.2.conv.1.0.weight"], state["blocks.1.0.conv_dw.weight"])
        assert torch.equal(found["features.1.conv.2.weight"], state["blocks.0.0.bn2.weight"])
        assert torch.equal(found["features.18.1.bias"], state["bn2.bias"])


def test_timm_s_mobilenet_is_recognised_and_a_stranger_is_not() -> None:
    timm = {n: torch.zeros(s) for n, s in shapes_of(FOREIGN["timm/mobilenetv2_100"]).items()}
    assert looks_like(timm) == "mobilenetv2"
    assert looks_like(build("tiny:network", 5).state_dict()) is None


def test_densenets_as_torchvision_stores_them_get_its_names() -> None:
    stored = {"features.denseblock1.denselayer2.norm.1.weight": torch.zeros(1)}
    names = {name for state in other_names(stored) for name in state}
    assert "features.denseblock1.denselayer2.norm1.weight" in names


def test_prefixes_come_off_one_by_one_and_never_make_two_names_one() -> None:
    state = {"module.model.a": torch.zeros(1), "module.model.b": torch.zeros(1)}
    names = [sorted(found) for found in without_prefixes(state)]
    assert names == [["module.model.a", "module.model.b"], ["model.a", "model.b"], ["a", "b"]]
    twice = {"model.a": torch.zeros(1), "model.b": torch.zeros(1), "a": torch.ones(1)}
    assert [sorted(found) for found in without_prefixes(twice)] == [sorted(twice)]
    compiled = {"layer._orig_mod.a": torch.zeros(1)}
    assert [list(found) for found in without_prefixes(compiled)] == [["layer.a"]]
