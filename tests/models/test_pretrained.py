"""Weights of others put into networks of rsfast."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rsfast
from bench.rivals.authors import AuthorsNet
from rsfast import create_model, load_pretrained
from rsfast.data import NORMALIZATIONS
from rsfast.models import RSNet, official
from rsfast.models.registry import build
from rsfast.training import checkpoint
from weight_helpers import assert_is, lively, plain, written

RESOLUTIONS = (48, 32)


@pytest.mark.parametrize("kind", ["pth", "pt", "safetensors"])
def test_one_batch_norm_becomes_every_bank(tmp_path: Path, kind: str) -> None:
    network = plain("resnet18")
    path = tmp_path / f"a.{kind}"
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    else:
        written(path, network.state_dict())
    model = create_model("resnet18", RESOLUTIONS, 5)
    loaded = load_pretrained(model, path)
    assert_is(model, network)
    assert loaded.banks == "its one batch norm was copied into 2 banks"
    shared = create_model("resnet18", RESOLUTIONS, 5, bn="shared")
    load_pretrained(shared, path)
    assert_is(shared, network)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.model."]
)
@pytest.mark.parametrize("entry", [None, "state_dict", "model", "model_state_dict"])
def test_wrappers_and_prefixes_are_taken_off(
    tmp_path: Path, prefix: str, entry: str | None
) -> None:
    network = plain("tiny:network")
    state = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    content = state if entry is None else {"epoch": 9, entry: state, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "a.pth")
    model = create_model("tiny:network", RESOLUTIONS, 5)
    load_pretrained(model, tmp_path / "a.pth")
    assert_is(model, network)


def test_a_module_that_is_called_as_a_prefix_stays(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain("tiny:network")

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    own, other = lively(Wrapped(), 1), lively(Wrapped(), 2)
    state = {f"module.{name}": tensor for name, tensor in own.state_dict().items()}
    model = rsfast.convert(other, RESOLUTIONS)
    load_pretrained(model, written(tmp_path / "a.pth", state))
    assert_is(model, own)


@pytest.mark.parametrize("entry", ["state_dict_ema", "model_ema"])
def test_averaged_weights_go_first(tmp_path: Path, entry: str) -> None:
    average, last = plain("tiny:network"), lively(plain("tiny:network"), 9)
    averaged = {f"module.{name}": tensor for name, tensor in average.state_dict().items()}
    content = {"state_dict": last.state_dict(), entry: {"n_averaged": torch.tensor(3), **averaged}}
    torch.save(content, tmp_path / "a.pth")
    model = create_model("tiny:network", RESOLUTIONS, 5)
    load_pretrained(model, tmp_path / "a.pth")
    assert_is(model, average)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    state = plain("tiny:network").to(dtype).state_dict()
    model = create_model("tiny:network", RESOLUTIONS, 5)
    load_pretrained(model, written(tmp_path / "a.pth", state))
    found = model.at(32).state_dict()
    assert all(t.dtype in (torch.float32, torch.int64) for t in found.values())
    assert all(torch.equal(found[name], state[name].to(found[name].dtype)) for name in state)


def test_files_without_counters_are_complete(tmp_path: Path) -> None:
    network = plain("tiny:network")
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    model = create_model("tiny:network", RESOLUTIONS, 5)
    load_pretrained(model, written(tmp_path / "a.pth", state))
    assert torch.equal(model.network.bn1.num_batches_tracked, torch.zeros(2, dtype=torch.int64))


def trained(path: Path, resolutions: tuple[int, ...], kind: str) -> RSNet:
    """A network with banks that differ, in a file of rsfast or the authors'."""
    torch.manual_seed(4)
    model = lively(create_model("resnet18", resolutions, 5))
    model.input_mean, model.input_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if kind == "safetensors":
        checkpoint.save_weights(model, torch.ones(len(resolutions)), path)
    elif kind == "authors":
        official.save(model, path)
    else:
        payload = {**checkpoint.model_payload(model), "loss": {}, "epoch": 3}
        checkpoint.save(payload, path)
    return model


@pytest.mark.parametrize("kind", ["safetensors", "pt", "authors"])
def test_banks_go_by_resolution(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    source = trained(path, (64, 48, 32), kind)
    model = create_model("resnet18", (80, 56, 48, 24), 5)
    resolutions = (64, 48, 32) if kind == "authors" else None
    loaded = load_pretrained(model, path, resolutions)
    for bank, resolution in enumerate(model.resolutions):
        expected = source.at(resolution).state_dict()
        for name, tensor in model.at(resolution).state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        assert (
            torch.equal(model.network.bn1.running_mean[bank], expected["bn1.running_mean"])
            or resolution == 56
        )
    assert loaded.banks == (
        "its batch-norm banks were taken by resolution: 80 from 64, 56 from 64 and 48, 48 from 48, "
        "24 from 32"
    )
    assert loaded.source == ("the authors' code" if kind == "authors" else "rsfast")


def test_banks_of_unknown_sizes_are_those_of_the_network_if_as_many(tmp_path: Path) -> None:
    source = lively(create_model("tiny:network", (64, 32), 5))
    path = written(tmp_path / "a.pth", source.state_dict())
    model = create_model("tiny:network", RESOLUTIONS, 5)
    load_pretrained(model, path)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    three = create_model("tiny:network", (64, 48, 32), 5)
    with pytest.raises(ValueError, match="has 2 batch-norm banks and does not say of which sizes"):
        load_pretrained(three, path)
    load_pretrained(three, path, (64, 32))
    middle = three.network.bn1.running_mean
    torch.testing.assert_close(middle[1], (middle[0] + middle[2]) / 2)


def test_an_authors_file_as_they_write_it_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = lively(AuthorsNet("resnet18", 2, num_classes=5))
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    path = written(tmp_path / "checkpoint.pth.tar", state, lambda s: {"state_dict": s, "epoch": 1})
    model = create_model("resnet18", RESOLUTIONS, 5)
    load_pretrained(model, path)
    images = [torch.rand(2, 3, r, r) for r in RESOLUTIONS]
    with torch.no_grad():
        ours, theirs = model.eval()(images), torch.stack(net(images))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["tiny:network", "resnet18"])
def test_a_classifier_of_other_classes_stays_fresh(
    tmp_path: Path, arch: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = plain(arch, classes=7)
    path = written(tmp_path / "a.pth", network.state_dict())
    model = create_model(arch, RESOLUTIONS, 5)
    before = model.network.fc.weight.detach().clone()
    with caplog.at_level(logging.INFO, "rsfast"):
        loaded = load_pretrained(model, path)
    assert torch.equal(model.network.fc.weight, before)
    assert torch.equal(model.network.conv1.weight, network.conv1.weight)
    assert "its classifier is for 7 classes, a fresh one for 5 takes its place" in caplog.text
    assert loaded.sha256 in caplog.text


def test_a_file_that_ends_in_front_of_the_classifier_is_taken(tmp_path: Path) -> None:
    network = plain("tiny:network")
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    model = create_model("tiny:network", RESOLUTIONS, 5)
    loaded = load_pretrained(model, written(tmp_path / "a.pth", state))
    assert (
        loaded.classifier == "its classifier is not in the file, a fresh one for 5 takes its place"
    )


def renamed_classifier(state: dict[str, Tensor]) -> None:
    state["head.weight"], state["head.bias"] = state.pop("fc.weight"), state.pop("fc.bias")


def lost(state: dict[str, Tensor]) -> None:
    del state["conv2.weight"], state["bn3.running_var"]


def added(state: dict[str, Tensor]) -> None:
    state.update({f"conv{n}.weight": torch.zeros(1) for n in range(4, 9)})


def widened(state: dict[str, Tensor]) -> None:
    state["conv2.weight"] = torch.zeros(8, 8, 5, 5)


def half_a_norm(state: dict[str, Tensor]) -> None:
    state["bn2.weight"] = torch.zeros(4)


def overflown(state: dict[str, Tensor]) -> None:
    state["bn2.running_var"][3] = math.inf


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (renamed_classifier, r"2 tensors are missing in it \(fc.bias, fc.weight\); 2 .*head.bias"),
        (lost, r"2 tensors are missing in it \(bn3.running_var, conv2.weight\)$"),
        (added, r"5 tensors are unknown here \(conv4.weight, conv5.weight, conv6.weight, ...\)$"),
        (widened, r"1 tensor is of another shape \(conv2.weight \[8, 8, 5, 5\] for \[8, 8, 3, 3\]"),
        (half_a_norm, r"of another shape \(bn2.weight \[4\] for \[2, 8\]\)"),
        (overflown, r"bn2.running_var holds values that are not finite"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    state = plain("tiny:network").state_dict()
    damage(state)
    model = create_model("tiny:network", RESOLUTIONS, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, written(tmp_path / "a.pth", state))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("of", "into"),
    [
        ("resnet34", "resnet18"),
        ("resnet18", "resnet34"),
        ("resnet50", "mobilenetv2"),
        ("mobilenetv2", "resnet18"),
        ("resnext50_32x4d", "resnet50"),
    ],
)
def test_a_file_of_another_network_is_refused_with_its_name(
    tmp_path: Path, of: str, into: str
) -> None:
    state = {f"module.{name}": tensor for name, tensor in build(of, 3).state_dict().items()}
    path = written(tmp_path / "a.pth", state)
    with pytest.raises(ValueError, match=rf"{into}.*; its keys look like --arch {of}$"):
        load_pretrained(create_model(into, RESOLUTIONS, 3), path)


def test_a_file_that_matches_nothing_says_what_it_holds(tmp_path: Path) -> None:
    model = create_model("tiny:network", RESOLUTIONS, 5)
    path = written(tmp_path / "a.pth", {"encoder.w": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"no tensor of it .* its first is 'encoder.w'"):
        load_pretrained(model, path)
    path = written(tmp_path / "b.pth", {"epoch": 3, "lr": 0.1})
    with pytest.raises(ValueError, match="must hold a state dict, .* got entries epoch, lr"):
        load_pretrained(model, path)
    with pytest.raises(ValueError, match="c.pth does not exist"):
        load_pretrained(model, tmp_path / "c.pth")


def test_a_file_of_rsfast_that_has_changed_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    trained(path, RESOLUTIONS, "pt")
    data = bytearray(path.read_bytes())
    at = data.index(b"resnet18")
    data[at : at + 8] = b"resnet19"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.pt is damaged: its checksum does not match"):
        load_pretrained(create_model("resnet18", RESOLUTIONS, 5), path)


@pytest.mark.parametrize(
    ("kind", "mean", "warned"),
    [
        ("pt", 0.485, None),
        ("pt", 0.0, "expects images with mean"),
        ("authors", 0.485, "expects images with mean"),
        ("authors", 0.0, None),
        ("plain", 0.485, None),
        ("plain", 0.0, "does not say how its images were normalised"),
        ("timm", 0.485, "expects images with mean"),
    ],
)
def test_another_normalisation_is_warned_of_where_it_is_known(
    tmp_path: Path, kind: str, mean: float, warned: str | None
) -> None:
    path = tmp_path / "pytorch_model.bin"
    trained(path, (64, 48, 32), "authors" if kind == "authors" else "pt")
    if kind in ("plain", "timm"):
        written(path, plain("resnet18").state_dict())
    if kind == "timm":
        about = {
            "architecture": "resnet18",
            "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
        }
        (tmp_path / "config.json").write_text(json.dumps(about))
    model = create_model("resnet18", (64, 48, 32), 5)
    fed = NORMALIZATIONS["imagenet" if mean else "none"]
    warnings = load_pretrained(model, path, normalization=fed).warnings
    assert len(warnings) == (warned is not None)
    assert warned is None or warned in warnings[0]
    assert (model.input_mean, model.input_std) == ((0.0,) * 3, (1.0,) * 3), "its owner's"


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_network_that_nobody_feeds_yet_is_told_what_its_weights_expect(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    trained(path, (64, 48, 32), kind)
    model = create_model("resnet18", (64, 48, 32), 5)
    assert not load_pretrained(model, path).warnings
    assert (model.input_mean, model.input_std) == NORMALIZATIONS["imagenet"]
