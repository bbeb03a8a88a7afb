"""Bits that are out of range, and weights of other bits than a network's: one sentence each."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsfast import checkpoint, create_model, load_pretrained
from rsfast.config import TrainConfig, parse_args
from rsfast.models import RSNet, official
from rsfast.models.lq import Bits, LQActivation, LQWeight
from rsfast.models.registry import build
from rsfast.models.weight_names import looks_like
from rsfast.training.checkpoint import model_payload

SIZES = (32, 16)
WRONG = [0, 5, -1, 32.0, 2.0, True, "2"]


@functools.cache  # nothing changes them: what they take is refused
def network(arch: str = "resnet18_lq", **bits: Any) -> RSNet:
    return create_model(arch, SIZES, 3, **bits)


@pytest.mark.parametrize("bits", WRONG, ids=repr)
def test_bits_out_of_range_are_named_everywhere(bits: Any) -> None:
    shown = re.escape(repr(bits))
    made: list[tuple[str, Callable[[], object]]] = [
        ("bits of weights", lambda: LQWeight(4, 3, bits)),
        ("bits of activations", lambda: LQActivation(bits)),
    ]
    for name in ("weight_bits", "activation_bits"):
        made.append((name, lambda n=name: network(**{n: bits})))
        made.append((name, lambda n=name: TrainConfig(arch="resnet18_lq", **{n: bits})))
    for name, make in made:
        with pytest.raises(ValueError, match=rf"{name}.* must be 1 to 4, got {shown}$"):
            make()


def test_only_activations_can_be_in_full_precision() -> None:
    with pytest.raises(ValueError, match="weight_bits must be 1 to 4, got 32"):
        network(weight_bits=32)
    assert network(activation_bits=32).bits == network().bits == (2, 32)


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits"])
def test_bits_are_of_quantised_networks(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is of resnet18_lq and .*, got 2 for resnet18$"):
        network("resnet18", **{name: 2})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch resnet18_lq --weight-bits 5", "weight_bits must be 1 to 4, got 5"),
        ("--arch resnet18_lq --activation-bits 8", "(full precision), must be 1 to 4, got 8"),
        ("--arch resnet18_lq --weight-bits 2.5", "--weight-bits: invalid int value: '2.5'"),
        ("--arch resnet18 --weight-bits 2", "weight_bits is of resnet18_lq and resnet50_lq, got 2"),
    ],
)
def test_flags_out_of_range_are_one_line(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(flags.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("value", ["true", "2.0", '"2"', "7"])
def test_a_config_file_out_of_range_is_one_line(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'arch = "resnet18_lq"\nweight_bits = {value}\n')
    with pytest.raises(SystemExit):
        parse_args(["--config", str(file)])
    error = capsys.readouterr().err
    assert "weight_bits must be" in error
    assert error.count("\n") == 1


def test_a_basis_is_of_one_weight() -> None:
    quantizer = LQWeight(4, 3, bits=2)
    with pytest.raises(ValueError, match=r"basis must be \[2, 5\].* got shape \(2, 4\)"):
        quantizer(torch.zeros(5, 3, 3, 3))
    with pytest.raises(ValueError, match=r"weight must be \[C_out, C_in, k_h, k_w\], got .*\(4, 3"):
        quantizer(torch.zeros(4, 3))
    activation = LQActivation(bits=2)
    activation.basis = torch.ones(3)
    with pytest.raises(ValueError, match=r"basis must be \[2\], one number per bit, got \(3,\)"):
        activation(torch.zeros(1))


BASIS = "network.layer1.0.conv1.quantizer.basis"


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (torch.ones(2, 63), r"basis must be \[2, 64\], got shape \[2, 63\]"),
        (torch.ones(3, 64), "weights of 2 bits cannot take the state of one with 3 bits"),
        (torch.ones(2), r"basis must be \[2, 64\], got shape \[2\]"),
        (torch.tensor(1.0), r"basis must be \[2, 64\], got shape \[\]"),
    ],
    ids=["channels", "bits", "activation's", "number"],
)
def test_a_state_with_another_basis_is_refused(basis: Tensor, message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        model.load_state_dict({**model.state_dict(), BASIS: basis})


PAIRS = [
    ("resnet18", {}, {}, "2 bits cannot take .* in full precision: it has no"),
    ("resnet18_lq", {"weight_bits": 3}, {}, "weights of 2 bits cannot take .* one with 3 bits"),
    (
        "resnet18_lq",
        {"activation_bits": 3},
        {"activation_bits": 2},
        "activations of 2 bits cannot take .* one with 3 bits",
    ),
    (
        "resnet18_lq",
        {"activation_bits": 2},
        {},
        "weights of 2 bits cannot take .* one with other bits, .*--activation-bits",
    ),
]


@pytest.mark.parametrize(("arch", "theirs", "ours", "message"), PAIRS, ids=["32", "w3", "a3", "a2"])
def test_weights_of_other_bits_are_refused(
    arch: str, theirs: dict[str, int], ours: dict[str, int], message: str, tmp_path: Path
) -> None:
    other, model = network(arch, **theirs), network(**ours)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(other.state_dict())
    checkpoint.save_weights(other, torch.ones(2), tmp_path / "a.safetensors")
    torch.save(other.network.state_dict(), tmp_path / "bare.pth")
    for name in ("a.safetensors", "bare.pth"):
        with pytest.raises(ValueError, match=rf"checkpoint .*{name} does not fit: .*{message}"):
            load_pretrained(model, tmp_path / name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_quantised_file_does_not_go_into_a_network_in_full_precision(tmp_path: Path) -> None:
    model, other = network("resnet18"), network()
    with pytest.raises(ValueError, match="cannot take the state of a quantised one"):
        model.load_state_dict(other.state_dict())
    torch.save(other.network.state_dict(), tmp_path / "bare.pth")
    message = "does not fit: .* cannot take the state of a quantised one: .* --arch resnet18_lq$"
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, tmp_path / "bare.pth")


def test_a_quantised_file_is_told_from_the_network_whose_names_it_has() -> None:
    for arch, bits in (
        ("resnet18_lq", Bits(3, 32)),
        ("resnet50_lq", Bits(2, 2)),
        ("resnet50", None),
    ):
        with torch.device("meta"):
            state = build(arch, 5, bits).state_dict()
        assert looks_like(state) == arch


def test_a_quantised_file_goes_into_a_network_of_its_bits(tmp_path: Path) -> None:
    other = create_model("resnet18_lq", SIZES, 7)
    checkpoint.save_weights(other, torch.ones(2), tmp_path / "a.safetensors")
    model = create_model("resnet18_lq", SIZES, 3)
    loaded = load_pretrained(model, tmp_path / "a.safetensors")
    assert "7 classes" in loaded.classifier
    assert torch.equal(model.state_dict()[BASIS], other.state_dict()[BASIS])


def test_the_authors_layout_has_no_quantised_networks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layout has resnet18, .* only, got arch 'resnet18_lq'"):
        official.save(network(), tmp_path / "a.pth.tar")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_whose_settings_were_changed_is_named(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "a.pt"
    for change, message in (
        ({"weight_bits": 3}, "weights of 3 bits cannot take the state of one with 2 bits"),
        ({"activation_bits": 2}, "does not fit the resnet18_lq"),
        ({"weight_bits": 9}, "settings of no network: weight_bits must be 1 to 4, got 9"),
        ({"arch": "resnet18"}, "settings of no network: weight_bits is of resnet18_lq"),
        ({"width": 2}, "settings of no network: .*'width'"),
    ):
        content = {**checkpoint_of(model), "settings": {**model.settings(), **change}}
        checkpoint.save(content, path)
        with pytest.raises(ValueError, match=rf"checkpoint .*a.pt (?s:.*){message}"):
            checkpoint.load_model(path)
    checkpoint.save({**checkpoint_of(model), "settings": [1]}, path)
    with pytest.raises(ValueError, match=r"a.pt has settings without 'arch'"):
        checkpoint.load_model(path)


def test_a_checkpoint_without_bits_is_of_a_network_in_full_precision(tmp_path: Path) -> None:
    model = network("resnet18")
    assert model.settings().keys() == {"arch", "resolutions", "num_classes", "bn"}
    checkpoint.save(checkpoint_of(model), tmp_path / "a.pt")
    found, _ = checkpoint.load_model(tmp_path / "a.pt")
    assert found.bits is None


def checkpoint_of(model: RSNet) -> dict[str, Any]:
    return {**model_payload(model), "loss": {"alpha": torch.ones(2)}}
