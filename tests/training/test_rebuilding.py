"""Networks that a checkpoint names: whose code runs, whose package is there, whose name fits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from rsfast import RSNet, convert, create_model
from rsfast.files.unpickle import load_dict
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import official
from rsfast.training import checkpoint
from run_helpers import network_payload

NETWORK_FILE = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("imported").touch()

def network(num_classes):
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


@pytest.fixture
def somebodys_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """MODULE:FUNCTION, whose import leaves a file "imported" in tmp_path."""
    (tmp_path / "somebodys.py").write_text(NETWORK_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "somebodys:network"
    sys.modules.pop("somebodys", None)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_code_that_a_checkpoint_names_runs_only_if_the_caller_names_it_too(
    name: str, somebodys_network: str, tmp_path: Path
) -> None:
    model = create_model(somebodys_network, (48, 32), 3)
    loss = MultiResolutionDistillation(2)
    checkpoint.save(
        {**checkpoint.model_payload(model), "loss": loss.state_dict()}, tmp_path / "a.pt"
    )
    checkpoint.save_weights(model, loss.scores, tmp_path / "a.safetensors")
    del sys.modules["somebodys"]
    (tmp_path / "imported").unlink()
    message = r"is of somebodys:network: add --arch somebodys:network if you trust that code$"
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(tmp_path / name)
    for other in ("somebodys:other", "resnet18"):
        with pytest.raises(ValueError, match=rf"is of somebodys:network, got --arch {other}$"):
            checkpoint.load_model(tmp_path / name, arch=other)
    assert not (tmp_path / "imported").exists()
    assert "somebodys" not in sys.modules
    found, _ = checkpoint.load_model(tmp_path / name, arch=somebodys_network)
    assert (tmp_path / "imported").exists()
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_the_name_that_the_caller_gives_must_be_the_networks(tmp_path: Path) -> None:
    checkpoint.save(network_payload(), tmp_path / "a.pt")
    assert checkpoint.load_model(tmp_path / "a.pt", arch="resnet18")[0].arch == "resnet18"
    with pytest.raises(ValueError, match=r"a.pt is of resnet18, got --arch resnet50"):
        checkpoint.load_model(tmp_path / "a.pt", arch="resnet50")
    official.save(create_model("resnet18", (48, 32), 3), tmp_path / "theirs.pth.tar")
    with pytest.raises(ValueError, match=r"theirs.pth.tar is of resnet18, got --arch resnet50"):
        checkpoint.load_model(tmp_path / "theirs.pth.tar", (48, 32), "resnet50")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_package_that_is_absent_is_named_with_its_command(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = network_payload()
    content["settings"]["arch"] = f"{package}/resnet18"
    checkpoint.save(content, tmp_path / "a.pt")
    for module in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        checkpoint.load_model(tmp_path / "a.pt")


def test_a_network_without_a_name_is_kept_as_a_state_dict_only(tmp_path: Path) -> None:
    def small() -> RSNet:
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return convert(nn.Sequential(*layers), (48, 32))

    model = small()
    message = r"made by convert and has no name to be rebuilt by: save its state_dict\(\), or make"
    with pytest.raises(ValueError, match=message):
        checkpoint.model_payload(model)
    with pytest.raises(ValueError, match=message):
        checkpoint.save_weights(model, torch.ones(2), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    other = small()
    other.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


def test_names_that_torch_compile_has_lengthened_are_understood(tmp_path: Path) -> None:
    content = network_payload()
    longer = {f"_orig_mod.{name}": tensor for name, tensor in content["model"].items()}
    checkpoint.save({**content, "model": longer}, tmp_path / "a.pt")
    model, _ = checkpoint.load_model(tmp_path / "a.pt")
    assert torch.equal(model.network.fc.weight, content["model"]["network.fc.weight"])
    official.save(model, tmp_path / "theirs.pt")
    theirs = load_dict(tmp_path / "theirs.pt")
    names = {f"module._orig_mod.{n.removeprefix('module.')}": n for n in theirs["state_dict"]}
    theirs["state_dict"] = {new: theirs["state_dict"][old] for new, old in names.items()}
    torch.save(theirs, tmp_path / "theirs.pt")
    found, _ = checkpoint.load_model(tmp_path / "theirs.pt", (48, 32))
    assert torch.equal(found.network.fc.weight, model.network.fc.weight)
