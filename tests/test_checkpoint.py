"""Checkpoint files: round trip, damage, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rsfast import checkpoint, create_model
from rsfast.losses import MultiResolutionDistillation
from rsfast.unpickle import load_dict


def payload() -> dict[str, Any]:
    torch.manual_seed(0)
    model = create_model("resnet18", (48, 32), 3)
    model.input_mean, model.input_std = (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)
    model.val_crop, model.class_names = "none", ("a", "b", "c")
    loss = MultiResolutionDistillation(2)
    return {**checkpoint.model_payload(model), "loss": loss.state_dict()}


def test_a_network_comes_back_whole(tmp_path: Path) -> None:
    content = payload()
    checkpoint.save(content, tmp_path / "a.pt")
    model, alpha = checkpoint.load_model(tmp_path / "a.pt")
    assert (model.arch, model.resolutions, model.num_classes) == ("resnet18", (48, 32), 3)
    assert (model.input_mean, model.input_std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    assert (model.val_crop, model.class_names) == ("none", ("a", "b", "c"))
    assert torch.equal(alpha, torch.ones(2))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, content["model"][key])


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    content = payload()
    content["ema"] = {key: torch.zeros_like(value) for key, value in content["model"].items()}
    checkpoint.save(content, tmp_path / "a.pt")
    model, _ = checkpoint.load_model(tmp_path / "a.pt")
    assert not model.classifier.weight.any()


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 1}, path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full_disk)
            with pytest.raises(OSError, match="No space left"):
                checkpoint.save({"epoch": 2}, path)
        assert load_dict(path)["epoch"] == 1
        assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    checkpoint.save(payload(), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"checkpoint .*a.pt is damaged"):
        checkpoint.load_model(tmp_path / "a.pt")


class _Payload:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("executed",))


def test_code_in_a_file_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Payload()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"model": _Payload()}, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match="damaged or not a checkpoint"):
            checkpoint.load_model(name)
    assert not Path("executed").exists()


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing.pt does not exist"):
        checkpoint.load_model(tmp_path / "nothing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dict, got list"):
        checkpoint.load_model(tmp_path / "list.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="neither of rsfast nor of the authors' code"):
        checkpoint.load_model(tmp_path / "other.pt")
    content = payload()
    content["settings"]["arch"] = "resnet34"
    checkpoint.save(content, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="does not fit the resnet34 it says it is"):
        checkpoint.load_model(tmp_path / "wrong.pt")
