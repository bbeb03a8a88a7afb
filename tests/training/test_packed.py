"""Packed files of quantised networks: what they hold, the way back, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

import rsfast
from lq_helpers import convolutions, quantised_network, same_outputs, settled
from rsfast import checkpoint
from rsfast.files.weights import weights_digest
from rsfast.models import RSNet
from rsfast.models.lq import LQConv2d
from rsfast.models.lq_codes import packed_state, unpacked_state

LAYER = "network.layer1.0.conv1"


def packed(model: RSNet, folder: Path) -> Path:
    path = folder / "packed.safetensors"
    checkpoint.save_packed(model, torch.ones(len(model.resolutions)), path)
    return path


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "bn"),
    [
        (2, 32, "private"),
        pytest.param(2, 2, "shared", marks=pytest.mark.slow),
        pytest.param(1, 2, "private", marks=pytest.mark.slow),
        pytest.param(3, 32, "private", marks=pytest.mark.slow),
        pytest.param(4, 1, "private", marks=pytest.mark.slow),
    ],
)
def test_a_packed_network_computes_the_same_bits(
    tmp_path: Path, weight_bits: int, activation_bits: int, bn: str
) -> None:
    model = settled(quantised_network(weight_bits, activation_bits, bn))
    alpha = torch.tensor([0.5, 2.0])
    checkpoint.save_packed(model, alpha, tmp_path / "a.safetensors")
    found, found_alpha = checkpoint.load_model(tmp_path / "a.safetensors")
    assert torch.equal(found_alpha, alpha)
    assert (found.settings(), found.training) == (model.settings(), False)
    assert same_outputs(model, found)
    ours, theirs = model.state_dict(), found.state_dict()
    codes = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, LQConv2d)}
    assert len(codes) == 19
    assert all(torch.equal(theirs[name], ours[name]) for name in ours.keys() - codes)
    once, twice = packed_state(model), packed_state(found)
    assert once.keys() == twice.keys()
    assert all(torch.equal(twice[name], tensor) for name, tensor in once.items())


def quantised_weight(conv: LQConv2d) -> Tensor:
    return conv.as_plain_module().weight.detach()


def come_back(conv: LQConv2d) -> LQConv2d:
    """Through codes, into a convolution of other weights."""
    out, inner, size, _ = conv.weight.shape
    other = LQConv2d(inner, out, size, bits=conv.quantizer.bits)
    network = nn.Sequential(other)
    network.load_state_dict(unpacked_state(network, packed_state(nn.Sequential(conv))))
    return other


BASES: dict[str, Callable[[int, int], Tensor]] = {
    "usual": lambda bits, c: 0.1 * 2.0 ** torch.arange(bits)[:, None] * (1 + torch.rand(bits, c)),
    "unsorted and negative": lambda bits, c: torch.randn(bits, c),
    "levels that coincide": lambda bits, c: torch.full((bits, c), 0.25),
    "zero": lambda bits, c: torch.zeros(bits, c),
    # Middles of neighbouring numbers round to one of them, every other time to the upper one.
    "neighbouring numbers": lambda bits, c: torch.cat(
        [1 + torch.arange(c)[None] * 2.0**-23, torch.full((bits - 1, c), 2.0**-24)]
    ),
    "far apart": lambda bits, c: 10.0 ** (8 * torch.arange(bits)[:, None] - 8) * torch.ones(c),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_basis_comes_back_to_the_same_quantised_weights(bits: int, name: str) -> None:
    torch.manual_seed(bits)
    for inner, size in ((3, 3), (5, 1), (1, 1)):  # rows of 27, 5 and 1 codes
        conv = LQConv2d(inner, 64, size, bits=bits)
        conv.quantizer.basis.copy_(BASES[name](bits, 64))
        spread = conv.quantizer.basis.abs().sum(0)[:, None, None, None]
        weight = spread * torch.randn_like(conv.weight)
        if name == "neighbouring numbers":  # on, and next to, every level
            weight = spread.sign() * (1 + torch.randint(-3, 80, weight.shape) * 2.0**-23)
            weight *= torch.randint(0, 2, weight.shape) * 2 - 1
        conv.weight.data = weight
        other = come_back(conv)
        assert torch.equal(quantised_weight(other), quantised_weight(conv))
        if name != "neighbouring numbers":
            assert torch.equal(other.weight, quantised_weight(conv))


def test_the_layout_is_the_documented_one() -> None:
    """Read by hand: bit j is 1 for +basis[j], the first code in the lowest bits, row by row."""
    generator = torch.Generator().manual_seed(0)
    for bits, width in ((1, 1), (2, 2), (3, 4), (4, 4)):
        conv = LQConv2d(3, 2, 3, bits=bits)
        conv.quantizer.basis.copy_(torch.randn(bits, 2, generator=generator))
        state = packed_state(nn.Sequential(conv))
        codes, per_byte = state["0.codes"].tolist(), 8 // width
        assert state.keys() == {"0.codes", "0.quantizer.basis", "0.quantizer.updates"}
        assert [len(row) for row in codes] == [-(-27 // per_byte)] * 2
        basis = state["0.quantizer.basis"].tolist()
        for channel, weights in enumerate(quantised_weight(conv).flatten(1)):
            for place, weight in enumerate(weights.tolist()):
                field = codes[channel][place // per_byte] >> width * (place % per_byte)
                signs = [1 if field >> j & 1 else -1 for j in range(bits)]
                level = sum(sign * basis[j][channel] for j, sign in enumerate(signs))
                assert level == pytest.approx(weight, rel=1e-6)


def test_strides_of_weights_do_not_matter() -> None:
    conv = LQConv2d(6, 4, 3, bits=2)
    expected = packed_state(nn.Sequential(conv))["0.codes"]
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    assert torch.equal(packed_state(nn.Sequential(conv))["0.codes"], expected)


def test_a_quarter_of_a_byte_holds_a_weight_of_two_bits(tmp_path: Path) -> None:
    model = quantised_network()
    tensors = load_file(packed(model, tmp_path))
    with safe_open(tmp_path / "packed.safetensors", "pt") as file:
        about = json.loads(file.metadata()["rsfast"])
    assert (about["packed"], about["weight_bits"], about["activation_bits"]) == (1, 2, 32)
    for name, module in model.named_modules():
        if isinstance(module, LQConv2d):
            assert 4 * tensors[f"{name}.codes"].numel() == module.weight.numel()
            assert f"{name}.weight" not in tensors
    assert tensors["network.conv1.weight"].dtype == tensors["network.fc.weight"].dtype
    assert tensors["network.conv1.weight"].dtype == torch.float32


def without_names(model: RSNet) -> None:
    model.arch = None


def with_nan(model: RSNet) -> None:
    next(convolutions(model)).weight.data[0, 0, 0, 0] = torch.nan


def with_endless_basis(model: RSNet) -> None:
    next(convolutions(model)).quantizer.basis[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_names, "has no name to be rebuilt by"),
        (with_nan, r"layer1.0.conv1.weight holds values that are not finite"),
        (with_endless_basis, r"layer1.0.conv1.quantizer.basis holds values that are not finite"),
        (RSNet.half, r"must be of float32 to be packed, got .*conv1.weight of torch.float16"),
    ],
    ids=["no-name", "nan", "inf", "half"],
)
def test_what_has_no_codes_is_refused(
    tmp_path: Path, change: Callable[[RSNet], Any], message: str
) -> None:
    model = quantised_network()
    change(model)
    with pytest.raises(ValueError, match=message):
        packed(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_in_full_precision_has_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="full precision has no codes to be packed: model_best.safetensors"
    ):
        packed(rsfast.create_model("resnet18", (32, 16), 3), tmp_path)


def test_a_name_that_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    for write in (checkpoint.save_packed, checkpoint.save_weights):
        with pytest.raises(ValueError, match=r"must end in .safetensors, got .*a.pt"):
            write(quantised_network(), torch.ones(2), tmp_path / "a.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(quantised_network(), tmp_path_factory.mktemp("packed"))


@pytest.mark.parametrize("damage", ["header", "end", "code", "settings"])
def test_a_damaged_file_is_named(whole: Path, tmp_path: Path, damage: str) -> None:
    data = bytearray(whole.read_bytes())
    if damage == "end":
        del data[-10:]
    else:
        place = {"header": 3, "settings": data.index(b"packed") + 1, "code": len(data) // 2}
        data[place[damage]] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="a.safetensors is damaged"):
        checkpoint.load_model(tmp_path / "a.safetensors")


def rewritten(whole: Path, path: Path, change: Callable[[dict[str, Any], Any], Any]) -> Path:
    """With other contents and a right checksum."""
    with safe_open(whole, "pt") as file:
        about = json.loads(file.metadata()["rsfast"])
    tensors = load_file(whole)
    change(tensors, about)
    text = json.dumps(about)
    metadata = {"rsfast": text, "sha256": weights_digest(text, tensors)}
    path.write_bytes(to_safetensors(tensors, metadata))
    return path


def put(name: str, how: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], Any], Any]:
    return lambda tensors, about: tensors.update({name: how(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{LAYER}.codes", lambda t: t[:, :-1]), r"must be uint8 \[64, 144\], of 2 bits of"),
        (put(f"{LAYER}.codes", lambda t: t[:-1]), r"got uint8 \[63, 144\]"),
        (put(f"{LAYER}.codes", lambda t: t.to(torch.int16)), r"got int16 \[64, 144\]"),
        (put(f"{LAYER}.codes", lambda t: t.flatten()), r"got uint8 \[9216\]"),
        (lambda tensors, about: tensors.pop(f"{LAYER}.codes"), r"must have .*conv1.codes"),
        (lambda tensors, about: tensors.pop("network.fc.bias"), "Missing key.* network.fc.bias|fc"),
        (
            lambda tensors, about: tensors.pop(f"{LAYER}.quantizer.basis"),
            "it has no network.layer1.0.conv1.quantizer.basis",
        ),
        (
            put(f"{LAYER}.quantizer.basis", lambda t: t[:1]),
            "weights of 2 bits cannot take the state of one with 1 bits",
        ),
        (
            put(f"{LAYER}.quantizer.basis", lambda t: t[:, :-1]),
            r"basis must be \[2, 64\], got shape \[2, 63\]",
        ),
        (put(f"{LAYER}.quantizer.basis", lambda t: t.sum()), r"basis must be \[2, 64\], got shape"),
        (lambda tensors, about: about.update(packed=7), "packed by layout 1, got 7"),
        (lambda tensors, about: about.update(packed="yes"), "packed by layout 1, got 'yes'"),
        (lambda tensors, about: about.pop("packed"), "does not fit the resnet18_lq"),
        (lambda tensors, about: about.update(weight_bits=3), "weights of 3 bits cannot take"),
        (lambda tensors, about: about.update(weight_bits=5), "no network: weight_bits must be 1"),
        (
            lambda tensors, about: about.update(weight_bits="2"),
            "weight_bits must be 1 to 4, got '2'",
        ),
        (lambda tensors, about: about.update(arch="resnet18"), "weight_bits is of resnet18_lq"),
        (lambda tensors, about: about.update(bats=2), "settings of no network: .*bats"),
        (lambda tensors, about: about.pop("arch"), "has settings without 'arch'"),
        (lambda tensors, about: about.pop("class_names"), "has settings without 'class_names'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_file_that_does_not_fit_itself_is_named(
    whole: Path, tmp_path: Path, change: Callable[[dict[str, Any], Any], Any], message: str
) -> None:
    path = rewritten(whole, tmp_path / "a.safetensors", change)
    with pytest.raises(ValueError, match=rf"checkpoint .*a.safetensors (?s:.*)(?:{message})"):
        checkpoint.load_model(path)


def test_bits_that_no_code_uses_must_be_zero(tmp_path: Path) -> None:
    path = packed(quantised_network(weight_bits=3), tmp_path)
    other = rewritten(path, tmp_path / "a.safetensors", put(f"{LAYER}.codes", lambda t: t | 8))
    with pytest.raises(ValueError, match="must have 0 in the bits that no code uses"):
        checkpoint.load_model(other)


def test_training_does_not_start_from_codes(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(whole, tmp_path / "a.safetensors"))
    model = rsfast.create_model("resnet18_lq", (32, 16), 3)
    with pytest.raises(ValueError, match=r"a.safetensors is packed: .* that it was made of"):
        rsfast.load_pretrained(model, path)
    with pytest.raises(ValueError, match="holds weights only: continue from last.pt"):
        checkpoint.load_state(path)
