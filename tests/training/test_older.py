"""Checkpoints of format 2: their networks are evaluated as they were, their runs not continued."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsfast import RSNet, create_model
from rsfast.files import seal
from rsfast.losses import MultiResolutionDistillation
from rsfast.training import checkpoint, older


def old_name(name: str, arch: str) -> str:
    """The layer's name in format 2."""
    name = name.removeprefix("network.")
    if arch != "mobilenetv2":
        return "classifier" if name == "fc" else f"backbone.{name}"
    outside = {
        "features.0.0": "stem",
        "features.0.1": "stem_bn",
        "features.18.0": "head",
        "features.18.1": "head_bn",
    }
    if name == "classifier.1":
        return "classifier"
    if name in outside:
        return f"backbone.{outside[name]}"
    number, part = re.fullmatch(r"features\.(\d+)\.conv\.(.*)", name).groups()
    inside = ["depthwise", "depthwise_bn", "project", "project_bn"]
    parts = ["0.0", "0.1", "1", "2"]
    if number != "1":
        inside, parts = ["expand.0", "expand.1", *inside], ["0.0", "0.1", "1.0", "1.1", "2", "3"]
    return f"backbone.blocks.{int(number) - 1}.{inside[parts.index(part)]}"


def old_state(model: RSNet) -> dict[str, Tensor]:
    found = {}
    for name, tensor in model.state_dict().items():
        layer, _, field = name.rpartition(".")
        found[f"{old_name(layer, str(model.arch))}.{field}"] = tensor
    return found


def make_network(arch: str) -> RSNet:
    torch.manual_seed(0)
    model = create_model(arch, (48, 32), 3)
    for norm in model.batch_norms():
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def write_old(path: Path, model: RSNet, **more: Any) -> Path:
    """As format 2 was written."""
    content = {**checkpoint.model_payload(model), "model": old_state(model)}
    loss = MultiResolutionDistillation(2).state_dict()
    buffer = io.BytesIO()
    torch.save({"format": 2, **content, "loss": loss, **more}, buffer)
    archive = buffer.getbuffer()
    seal.write_whole(path, [archive, seal.seal_zip(archive)])
    return path


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenetv2"])
def test_a_network_of_format_2_is_what_it_was(arch: str, tmp_path: Path) -> None:
    model = make_network(arch)
    found, _ = checkpoint.load_model(write_old(tmp_path / "a.pt", model))
    assert found.settings() == model.settings()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_names_of_format_2_are_those_that_it_had() -> None:
    assert set(old_state(make_network("resnet18"))) >= {
        "backbone.conv1.weight",
        "backbone.bn1.running_mean",
        "backbone.layer2.0.downsample.1.weight",
        "classifier.weight",
    }
    assert set(old_state(make_network("mobilenetv2"))) >= {
        "backbone.stem.weight",
        "backbone.stem_bn.bias",
        "backbone.blocks.0.depthwise.weight",
        "backbone.blocks.0.project_bn.running_var",
        "backbone.blocks.16.expand.1.num_batches_tracked",
        "backbone.head.weight",
        "classifier.bias",
    }


def test_averaged_weights_of_format_2_are_preferred(tmp_path: Path) -> None:
    model = make_network("resnet18")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in old_state(model).items()}
    found, _ = checkpoint.load_model(write_old(tmp_path / "a.pt", model, ema=zeros))
    assert not found.network.fc.weight.any()


def test_weights_as_safetensors_of_that_time_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_network("mobilenetv2")
    state = old_state(model)
    with monkeypatch.context() as patch:
        patch.setattr(model, "state_dict", lambda: state)
        checkpoint.save_weights(model, torch.ones(2), tmp_path / "a.safetensors")
    found, _ = checkpoint.load_model(tmp_path / "a.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv2"])
@pytest.mark.parametrize("odd", ["backbone.odd.weight", "backbone.blocks.3.odd.weight", "odd.bias"])
def test_a_layer_that_format_2_did_not_have_is_named(arch: str, odd: str, tmp_path: Path) -> None:
    model = make_network(arch)
    state = {**old_state(model), odd: torch.zeros(1)}
    assert older.is_old(state)
    path = write_old(tmp_path / "a.pt", model, ema=state)
    with pytest.raises(ValueError, match=rf"does not fit the {arch} it says it is(.|\n)*odd"):
        checkpoint.load_model(path)


def test_a_run_of_format_2_is_not_continued(tmp_path: Path) -> None:
    path = write_old(tmp_path / "last.pt", make_network("resnet18"), optimizer={}, config={})
    with pytest.raises(
        ValueError,
        match=r"last.pt is of an older rsfast \(format 2\) and can be evaluated, not continued: "
        r"start another --output, or continue it with the rsfast that wrote it$",
    ):
        checkpoint.load_state(path)
