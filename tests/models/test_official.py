"""Checkpoints of the authors' code: in, out, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.rivals.authors import AuthorsNet
from rsfast import create_model
from rsfast.models import official
from rsfast.training import checkpoint

RESOLUTIONS = (64, 48, 32)


def authors_file(path: Path, arch: str = "resnet18", count: int = 3) -> AuthorsNet:
    """What their training script writes: DataParallel prefix, optimiser and all."""
    torch.manual_seed(0)
    net = AuthorsNet(arch, count, num_classes=7)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    torch.save(
        {
            "epoch": 120,
            "arch": f"parallel_{arch}",
            "state_dict": {f"module.{key}": value for key, value in net.state_dict().items()},
            "best_acc0": 73.1,
            "best_acc": 70.0,
            "optimizer": optimizer.state_dict(),
        },
        path,
    )
    return net.eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "mobilenetv2"])
def test_loading_reproduces_the_logits_on_unnormalised_images(tmp_path: Path, arch: str) -> None:
    net = authors_file(tmp_path / "checkpoint.pth.tar", arch)
    model = official.load(tmp_path / "checkpoint.pth.tar", RESOLUTIONS)
    assert (model.arch, model.input_mean, model.input_std) == (arch, (0.0,) * 3, (1.0,) * 3)
    images = [torch.rand(2, 3, r, r) for r in RESOLUTIONS]
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.stack(net(images)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "entries"), [("resnet18", 522), ("resnet50", 1380), ("mobilenetv2", 1354)]
)
def test_a_saved_network_has_their_keys(tmp_path: Path, arch: str, entries: int) -> None:
    model = create_model(arch, num_classes=7)
    official.save(model, tmp_path / "out.pth.tar", torch.arange(5.0))
    content = torch.load(tmp_path / "out.pth.tar", weights_only=True)
    with torch.device("meta"):
        theirs = AuthorsNet(arch, 5, num_classes=7)
    expected = {f"module.{key}" for key in theirs.state_dict()}
    assert set(content["state_dict"]) == expected
    assert len(expected) == entries + 1  # alpha
    again = official.load(tmp_path / "out.pth.tar")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert torch.equal(official.alpha_of(content), torch.arange(5.0))


@pytest.mark.parametrize("arch", ["resnet101", "resnet152"])
def test_deep_networks_are_told_apart(arch: str) -> None:
    with torch.device("meta"):
        state = AuthorsNet(arch, 1).state_dict()
    zeros = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
    assert official.from_state_dict(zeros, (224,)).arch == arch


def test_evaluation_takes_their_files_directly(tmp_path: Path) -> None:
    authors_file(tmp_path / "checkpoint.pth.tar", count=5)
    model, alpha = checkpoint.load_model(tmp_path / "checkpoint.pth.tar")
    assert model.resolutions == (224, 192, 160, 128, 96)
    assert torch.equal(alpha, torch.ones(5))
    assert not model.training


def test_loading_needs_the_sizes_unless_there_are_five(tmp_path: Path) -> None:
    authors_file(tmp_path / "a.pth.tar")
    with pytest.raises(ValueError, match="resolutions must be given: .* 3 batch-norm banks"):
        official.load(tmp_path / "a.pth.tar")
    with pytest.raises(ValueError, match="resolutions must be 3"):
        official.load(tmp_path / "a.pth.tar", (64, 32))


def drop(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    authors_file(tmp_path / "a.pth.tar")
    state = torch.load(tmp_path / "a.pth.tar", weights_only=True)["state_dict"]
    with pytest.raises(ValueError, match="checkpoint lacks layer1.0.conv1.module.weight"):
        official.from_state_dict(drop(state, "module.layer1.0.conv1.module.weight"), RESOLUTIONS)
    with pytest.raises(ValueError, match="checkpoint lacks fc.module.bias"):
        official.from_state_dict(drop(state, "module.fc.module.bias"), RESOLUTIONS)
    wrong = {**state, "module.conv1.module.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(ValueError, match=r"conv1.module.weight must be \(64, 3, 7, 7\)"):
        official.from_state_dict(wrong, RESOLUTIONS)
    with pytest.raises(ValueError, match="1 keys that resnet18 lacks: .*'extra'"):
        official.from_state_dict({**state, "module.extra": torch.zeros(1)}, RESOLUTIONS)
    with pytest.raises(ValueError, match="no bn_0 keys"):
        official.from_state_dict({"module.conv1.weight": torch.zeros(1)}, RESOLUTIONS)
    odd = {key: value for key, value in state.items() if ".layer1." not in key}
    with pytest.raises(ValueError, match="fits no architecture"):
        official.from_state_dict(odd, RESOLUTIONS)


def test_shared_batch_norm_cannot_be_saved_in_their_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have private batch norm"):
        official.save(create_model("resnet18", RESOLUTIONS, 7, "shared"), tmp_path / "x")
