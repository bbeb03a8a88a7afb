"""Converting networks: what is swapped, what is kept, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rsfast
from rsfast import Pyramid
from rsfast.pyramid import SwitchableBatchNorm2d

RESOLUTIONS = (48, 32, 24)


class Small(nn.Module):
    """What a user writes in twenty lines: strides, a depthwise convolution, a gate, a shortcut."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(inplace=True)
        )
        self.depthwise = nn.Conv2d(16, 16, 5, 1, 2, groups=16)
        self.norm = nn.BatchNorm2d(16, eps=1e-3, momentum=0.01)
        self.squeeze = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())
        self.project = nn.Conv2d(16, 24, 1)
        self.last = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.hardswish(self.norm(self.depthwise(x)))
        n, c, _, _ = y.shape
        gate = self.squeeze(F.adaptive_avg_pool2d(y, 1).view(n, c)).view(n, c, 1, 1)
        x = x + gate * y
        x = F.relu(self.last(self.project(x)))
        return self.head(x.mean(dim=(2, 3)))


def make_images(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, r, r, generator=generator, dtype=dtype) for r in RESOLUTIONS]


@pytest.mark.parametrize("layout", ["packed", "by level"])
def test_a_users_network_trains_as_copies_for_each_resolution_would(layout: str) -> None:
    torch.manual_seed(0)
    plain = Small().double().train()
    copies = [copy.deepcopy(plain) for _ in RESOLUTIONS]
    model = rsfast.convert(plain, RESOLUTIONS)
    images = make_images()
    if layout == "packed":
        logits = model.network(Pyramid.pack(images)).unflatten(0, (3, 4))
    else:
        logits = model(images)
    exact = torch.stack([net(x) for net, x in zip(copies, images, strict=True)])
    torch.testing.assert_close(logits, exact, rtol=1e-10, atol=1e-10)
    dy = torch.sin(torch.arange(exact.numel(), dtype=exact.dtype)).view_as(exact)
    (logits * dy).sum().backward()
    (exact * dy).sum().backward()
    norms = {name for name, m in plain.named_modules() if isinstance(m, SwitchableBatchNorm2d)}
    for name, param in model.network.named_parameters():
        grads = [copied.get_parameter(name).grad for copied in copies]
        wanted = torch.stack(grads) if name.rpartition(".")[0] in norms else sum(grads)
        torch.testing.assert_close(param.grad, wanted, rtol=1e-8, atol=1e-10)
    for name in norms:
        norm = model.network.get_submodule(name)
        for bank, copied in enumerate(copies):
            twin = copied.get_submodule(name)
            torch.testing.assert_close(norm.running_mean[bank], twin.running_mean)
            torch.testing.assert_close(norm.running_var[bank], twin.running_var)


def test_names_weights_and_statistics_are_kept() -> None:
    torch.manual_seed(0)
    plain = Small()
    plain(torch.randn(8, 3, 48, 48))  # moves the statistics
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    model = rsfast.convert(plain, RESOLUTIONS)
    after = model.network.state_dict()
    assert set(after) == set(before)
    for name, value in before.items():
        rows = after[name] if after[name].dim() > value.dim() else after[name][None]
        assert all(torch.equal(row, value) for row in rows), name
    norm = model.network.norm
    assert (norm.eps, norm.momentum, norm.num_banks) == (1e-3, 0.01, 3)
    assert model.num_classes == 5
    assert isinstance(model.network, Small)


def test_a_resolution_goes_back_into_the_users_class() -> None:
    torch.manual_seed(0)
    model = rsfast.convert(Small(), RESOLUTIONS).double()
    model.train()(make_images())
    model.eval()
    single = model.at(32)
    assert type(single) is Small
    assert not any("rsfast" in type(module).__module__ for module in single.modules())
    original = Small().double().eval()
    original.load_state_dict(single.state_dict())
    images = make_images()
    torch.testing.assert_close(original(images[1]), model(images)[1])
    assert type(single.norm) is nn.BatchNorm2d
    assert (single.norm.eps, single.norm.momentum) == (1e-3, 0.01)


def test_one_bank_for_all_is_shared() -> None:
    model = rsfast.convert(Small(), RESOLUTIONS, bn="shared")
    assert {norm.num_banks for norm in model.batch_norms()} == {1}
    model.train()([image.float() for image in make_images()])
    assert model.network.norm.num_batches_tracked.tolist() == [3]


def test_a_layer_that_is_used_twice_stays_one() -> None:
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(norm, nn.ReLU(), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = rsfast.convert(network, RESOLUTIONS)
    assert model.network[0] is model.network[2]
    model.train()([image.float() for image in make_images()])
    assert model.batch_norms()[0].num_batches_tracked.tolist() == [2, 2, 2]
    single = model.at(48)
    assert single[0] is single[2]


def test_sync_batch_norm_becomes_switchable() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(Small())
    model = rsfast.convert(network, RESOLUTIONS)
    assert len(model.batch_norms()) == 3
    assert type(model.at(48).norm) is nn.SyncBatchNorm


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: dropout and activation inside."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def test_a_batch_norm_with_its_activation_inside_comes_along_and_back() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), BatchNormAct2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    plain = copy.deepcopy(network).train()
    model = rsfast.convert(network, RESOLUTIONS).train()
    images = [image.float() for image in make_images()]
    torch.testing.assert_close(model(images)[1], plain(images[1]), rtol=1e-5, atol=1e-6)
    single = model.at(48)
    assert type(single[1]) is BatchNormAct2d
    torch.testing.assert_close(single(images[0]), model.eval()(images)[0])


class Asks(nn.Module):
    def forward(self, x: Any) -> Any:
        return x if x.shape[2] > 30 else x * 2


class Counts(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.flatten(1)


class Other(nn.BatchNorm2d):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + 1


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))


def network(*layers: nn.Module, pool: bool = True) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten()) if pool else ()
    return nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(*layers), *head)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1)), "Sequential has no batch norm"),
        (network(nn.BatchNorm1d(3)), r"1.0 \(BatchNorm1d\) normalises other tensors than images"),
        (network(nn.BatchNorm2d(3, affine=False)), r"1.0 \(BatchNorm2d\) has no weight and bias"),
        (
            network(nn.BatchNorm2d(3, track_running_stats=False)),
            r"1.0 \(BatchNorm2d\) has no weight and bias, or no running statistics",
        ),
        (network(nn.BatchNorm2d(3, momentum=None)), "1.0 .* has momentum None"),
        (network(Other(3)), r"1.0 \(Other\) computes more than batch norm"),
        (
            network(nn.InstanceNorm2d(3, track_running_stats=True)),
            r"1.0 \(InstanceNorm2d\) keeps running statistics",
        ),
        (network(Keeps()), r"1.0 \(Keeps\) keeps batch statistics of another kind"),
        (network(Asks()), r"asks > 30 of its maps' size.* answer differently \(in 1.0 \(Asks\)\)"),
        (network(nn.Conv2d(3, 3, 30)), r"none left .* \(in 1.0 \(Conv2d\)\)"),
        (network(nn.AvgPool2d(32)), r"\(in 1.0 \(AvgPool2d\)\)"),
        (network(nn.Conv2d(4, 3, 1)), r"\(in 1.0 \(Conv2d\)\)"),
        (network(Counts(), pool=False), r"has to pool them first \(in 1.0 \(Counts\)\)"),
        (network(pool=False), r"must return logits \[N, K\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_networks_that_cannot_be_converted_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        rsfast.convert(module, RESOLUTIONS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bn": "none"}, "bn must be one of"),
        ({"backend": "numpy"}, "backend must be one of"),
        ({"resolutions": (24, 48)}, "strictly descending"),
    ],
    ids=["bn", "backend", "resolutions"],
)
def test_bad_arguments_leave_the_network_as_it_was(options: dict[str, Any], message: str) -> None:
    module = Small()
    with pytest.raises(ValueError, match=message):
        rsfast.convert(module, **{"resolutions": RESOLUTIONS, **options})
    assert not any(isinstance(m, SwitchableBatchNorm2d) for m in module.modules())


def test_a_network_that_fails_the_trial_is_as_it_was() -> None:
    module = network(Counts(), pool=False)
    with pytest.raises(ValueError, match="pool them first"):
        rsfast.convert(module, RESOLUTIONS)
    assert not any(isinstance(m, SwitchableBatchNorm2d) for m in module.modules())


def test_a_deep_copy_is_independent() -> None:
    model = rsfast.convert(Small(), RESOLUTIONS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.network.norm.weight.zero_()
    assert twin.network.norm.weight.all()
    assert type(twin.at(48).norm) is nn.BatchNorm2d
