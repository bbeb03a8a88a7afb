"""The quantised ResNets: sizes, where their quantisers sit, and that levels are networks apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rsfast import RSNet, create_model
from rsfast.config import parse_args
from rsfast.losses import MultiResolutionDistillation
from rsfast.models.lq import LQActivation, LQConv2d
from rsfast.models.registry import build
from rsfast.models.resnet import DEPTHS, BasicBlock, Bottleneck
from rsfast.models.resnet_lq import Bits, PreActBlock
from rsfast.pyramid.batchnorm import SwitchableBatchNorm2d

PAPERS = (224, 192, 160, 128, 96)
WIDTHS = [("resnet18_lq", 32), ("resnet18_lq", 2), ("resnet50_lq", 32), ("resnet50_lq", 2)]


@pytest.mark.parametrize(
    ("arch", "activation_bits", "one", "five"),
    [
        ("resnet18_lq", 32, 11_689_512, 11_727_912),
        ("resnet18_lq", 2, 11_693_352, 11_747_112),
        ("resnet50_lq", 32, 25_557_032, 25_769_512),
        ("resnet50_lq", 2, 25_587_240, 25_920_552),
    ],
)
def test_parameter_counts_are_those_of_full_precision_and_of_more_batch_norms(
    arch: str, activation_bits: int, one: int, five: int
) -> None:
    """Quantised weights alone change nothing. Pre-activation has more batch norms.

    It has one in front of each block but the first of a stage, and one at the end of each stage; of
    ResNet-18 those are (64 + 128 + 256 + 512) + (64 + 128 + 256 + 512) = 1,920 channels with gamma
    and beta, 3,840 parameters. Of ResNet-50 they are (2 x 256 + 3 x 512 + 5 x 1024 + 2 x 2048) +
    (256 + 512 + 1024 + 2048) = 15,104 channels, 30,208 parameters. All batch norms of ResNet-18
    are 9,600 + 3,840 then, and each further resolution adds as many: 4 x 13,440 = 53,760.
    """

    def count(resolutions: tuple[int, ...]) -> int:
        with torch.device("meta"):
            model = create_model(arch, resolutions, activation_bits=activation_bits)
        return sum(param.numel() for param in model.parameters())

    assert count((224,)) == one
    assert count(PAPERS) == five
    assert sum(p.numel() for p in MultiResolutionDistillation(len(PAPERS)).parameters()) == 5
    block, depths, *_ = DEPTHS[arch.removesuffix("_lq")]
    channels = [64 * 2**stage * block.expansion for stage in range(4)]
    extra = sum(depth * width for depth, width in zip(depths, channels, strict=True))
    plain = {"resnet18_lq": 11_689_512, "resnet50_lq": 25_557_032}[arch]
    assert one == plain + (2 * extra if activation_bits == 2 else 0)


@pytest.mark.parametrize(("arch", "activation_bits"), WIDTHS)
def test_all_convolutions_but_the_first_are_quantised_and_the_classifier_is_not(
    arch: str, activation_bits: int
) -> None:
    network = build(arch, 3, Bits(2, activation_bits))
    plain = [m for m in build(arch.removesuffix("_lq"), 3).modules() if isinstance(m, nn.Conv2d)]
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [type(conv) for conv in convs] == [nn.Conv2d] + [LQConv2d] * (len(convs) - 1)
    assert type(network.fc) is nn.Linear
    shapes = [sorted((tuple(c.weight.shape), c.stride) for c in part) for part in (convs, plain)]
    assert shapes[0] == shapes[1]


def four_levels(x: Tensor) -> bool:
    return len(x.unique()) <= 4


@pytest.mark.parametrize("arch", ["resnet18_lq", "resnet50_lq"])
def test_with_quantised_activations_convolutions_read_them_but_for_the_first_shortcut(
    arch: str,
) -> None:
    torch.manual_seed(0)
    network = build(arch, 3, Bits(2, 2)).eval()
    wide: list[str] = []  # convolutions that read more than four values
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def note(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                if not four_levels(inputs[0]):
                    wide.append(name)

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        network(torch.randn(2, 3, 64, 64))
    first_shortcut = ["layer1.0.downsample.0"] if arch == "resnet50_lq" else []
    assert wide == ["conv1", *first_shortcut, "fc"]


def test_shortcuts_begin_in_front_of_the_quantiser_in_the_first_block_only() -> None:
    """With branches that add nothing, a block is its shortcut."""
    torch.manual_seed(0)
    network = build("resnet18_lq", 3, Bits(2, 2)).eval()
    blocks = {n: m for n, m in network.named_modules() if isinstance(m, PreActBlock)}
    inputs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, block in blocks.items():
        nn.init.zeros_(block.body[-1].weight)  # type: ignore[arg-type]
        block.register_forward_hook(
            lambda _, x, y, name=name: inputs.__setitem__(name, (x[0].clone(), y))
        )
    with torch.no_grad():
        network(torch.rand(2, 3, 64, 64))
    for name, (x, y) in inputs.items():
        block = blocks[name]
        with torch.no_grad():
            shortcut = block.downsample(x) if block.downsample is not None else x
        assert torch.equal(y, shortcut), name
        # The inputs of stages after the first are quantised by the stage before them.
        assert four_levels(x) == (name in ("layer2.0", "layer3.0", "layer4.0")), name
        assert (block.downsample is None) == (not four_levels(x)), name


@pytest.mark.parametrize("arch", ["resnet18_lq", "resnet50_lq"])
def test_activations_are_quantised_once_for_each_branch_convolution_but_at_the_end(
    arch: str,
) -> None:
    assert not [m for m in build(arch, 3, Bits(2, 32)).modules() if isinstance(m, LQActivation)]
    network = build(arch, 3, Bits(2, 2))
    found = [name for name, m in network.named_modules() if isinstance(m, LQActivation)]
    # Each convolution of a branch reads one of its own; shortcuts share those of their branch.
    branches = [
        name
        for name, m in network.named_modules()
        if isinstance(m, LQConv2d) and "downsample" not in name
    ]
    assert len(found) == len(branches)
    assert [name for name in found if name.count(".") == 1] == [
        f"layer{n}.{len(getattr(network, f'layer{n}')) - 1}" for n in (1, 2, 3)
    ]


@pytest.mark.parametrize(("arch", "activation_bits"), WIDTHS)
def test_branches_begin_at_nothing_in_post_activation_only(arch: str, activation_bits: int) -> None:
    network = build(arch, 3, Bits(2, activation_bits))
    zero = {
        name
        for name, m in network.named_modules()
        if isinstance(m, nn.BatchNorm2d) and not m.weight.any()
    }
    if activation_bits == 2:
        assert not zero
        return
    block, depths, *_ = DEPTHS[arch.removesuffix("_lq")]
    last = "bn3" if block is Bottleneck else "bn2"
    assert zero == {
        f"layer{n + 1}.{k}.{last}" for n, depth in enumerate(depths) for k in range(depth)
    }


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50_lq", "refinenet18"])
def test_the_start_of_residual_blocks_may_be_chosen(arch: str, zero: bool) -> None:
    model = create_model(arch, (64, 32), 3, zero_init_residual=zero)
    for name, module in model.named_modules():
        if isinstance(module, SwitchableBatchNorm2d):
            block = model.get_submodule(name.rpartition(".")[0])
            last = {BasicBlock: "bn2", Bottleneck: "bn3"}.get(type(block))  # type: ignore[call-overload]
            expected = 0 if zero and name.endswith(f".{last}") else 1
            assert torch.equal(module.weight, torch.full_like(module.weight, expected)), name


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ("--arch resnet18_lq --activation-bits 2", "resnet18_lq with activations of 2 bits"),
        ("--arch mobilenetv2", "mobilenetv2"),
        ("--arch torchvision/resnet18", "torchvision/resnet18"),
    ],
)
def test_the_start_of_other_blocks_cannot_be_chosen(
    flags: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args([*flags.split(), "--no-zero-init-residual"])
    assert f"activations in full precision, got False for {shown} (" in capsys.readouterr().err


def randomised(arch: str, activation_bits: int, resolutions: tuple[int, ...]) -> RSNet:
    torch.manual_seed(0)
    model = create_model(arch, resolutions, 5, activation_bits=activation_bits).double()
    for norm in model.batch_norms():
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("activation_bits", [32, 2])
def test_levels_are_the_networks_of_one_resolution(
    activation_bits: int,
) -> None:
    resolutions = (48, 40, 32)
    model = randomised("resnet18_lq", activation_bits, resolutions)
    images = [torch.randn(2, 3, r, r, dtype=torch.float64) for r in resolutions]
    model.train()(images)  # so that no basis is as it was at first
    logits = model.eval()(images)
    for level, resolution in enumerate(resolutions):
        single = model.at(resolution)
        torch.testing.assert_close(single(images[level]), logits[level], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation_bits", [32, 2])
def test_between_resolutions_batch_norm_is_interpolated_and_codes_are_the_same(
    activation_bits: int,
) -> None:
    model = randomised("resnet18_lq", activation_bits, (48, 32)).eval()
    nets = {r: model.at(r) for r in (48, 40, 32)}
    convs = {
        r: {n: m.weight for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
        for r, net in nets.items()
    }
    for r in (48, 32):
        for name, weight in convs[40].items():
            assert torch.equal(weight, convs[r][name]), name
    norms = [[m for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in nets.values()]
    for large, between, small in zip(*norms, strict=True):
        mean = (large.running_mean + small.running_mean) / 2
        torch.testing.assert_close(between.running_mean, mean)
    assert nets[40](torch.randn(2, 3, 40, 40, dtype=torch.float64)).isfinite().all()


def test_fixing_the_bases_of_activations_reaches_all_of_them() -> None:
    model = create_model("resnet18_lq", (48, 32), 3, activation_bits=2).fix_activation_basis()
    quantizers = [m for m in model.modules() if isinstance(m, LQActivation)]
    assert all(quantizer.largest_only for quantizer in quantizers)
    model.train()([torch.randn(2, 3, r, r) for r in (48, 32)])
    assert {int(quantizer.updates) for quantizer in quantizers} == {1}
    convs = [m for m in model.modules() if isinstance(m, LQConv2d)]
    assert {int(conv.quantizer.updates) for conv in convs} == {2}
