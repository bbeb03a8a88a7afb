"""Switchable batch norm: what is launched, when, and what comes out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast import Pyramid, create_model, kernels
from rsfast.pyramid import SwitchableBatchNorm2d, moved_by_forward

SIZES = ((8, 6), (5, 5), (4, 3))
N, C = 3, 8
BACKENDS = ("torch", "triton", "by_level")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, str | None]]:
    """(kernel, whether there is a residual, activation) of every batch norm that is computed."""
    seen: list[tuple[str, bool, str | None]] = []
    for name in ("switchable_bn_act", "switchable_bn_act_levels", "bn_act_max_pool"):
        monkeypatch.setattr(kernels, name, _noted(name, getattr(kernels, name), seen))
    return seen


def _noted(name: str, f: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def noted(*args: Any, **options: Any) -> Any:
        seen.append((name, options.get("residual") is not None, options["activation"]))
        return f(*args, **options)

    return noted


def make_norm(dtype: torch.dtype = torch.float64) -> SwitchableBatchNorm2d:
    generator = torch.Generator().manual_seed(0)
    norm = SwitchableBatchNorm2d(C, len(SIZES)).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
    return norm


def make_levels(seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (N, C)
    return [torch.randn(*shape, *s, generator=generator, dtype=dtype) for s in SIZES]


def make_pyramid(levels: list[Tensor], backend: str) -> Pyramid:
    packed = Pyramid.pack(levels)
    return packed.by_level() if backend == "by_level" else packed.on_backend(backend)


def plain(norm: SwitchableBatchNorm2d) -> list[nn.BatchNorm2d]:
    return [norm.single(((bank, 1.0),)).train() for bank in range(len(SIZES))]


CHAINS: dict[str, tuple[Callable[[Any, Any, Any], Any], tuple[bool, str | None]]] = {
    "alone": (lambda bn, x, y: bn(x), (False, None)),
    "relu": (lambda bn, x, y: F.relu(bn(x)), (False, "relu")),
    "relu6": (lambda bn, x, y: nn.ReLU6(inplace=True)(bn(x)), (False, "relu6")),
    "hardtanh": (lambda bn, x, y: F.hardtanh(bn(x), 0.0, 6.0), (False, "relu6")),
    "silu": (lambda bn, x, y: nn.SiLU(inplace=True)(bn(x)), (False, "silu")),
    "hardswish": (lambda bn, x, y: F.hardswish(bn(x)), (False, "hardswish")),
    "identity": (lambda bn, x, y: nn.Identity()(bn(x)), (False, None)),
    "add": (lambda bn, x, y: bn(x) + y, (True, None)),
    "add, relu": (lambda bn, x, y: F.relu(y + bn(x)), (True, "relu")),
    "add in place, relu": (lambda bn, x, y: F.relu_(_added(bn(x), y)), (True, "relu")),
    "add, silu": (lambda bn, x, y: F.silu(torch.add(bn(x), y)), (True, "silu")),
    "relu, then add": (lambda bn, x, y: F.relu(bn(x)) + y, (False, "relu")),
    "relu twice": (lambda bn, x, y: F.silu(F.relu(bn(x))), (False, "relu")),
    "two added": (lambda bn, x, y: bn(x) + y + y, (True, None)),
}
# What comes second finds no place in the kernel and reads what it computes.
READ_AT_ONCE = ("relu, then add", "relu twice", "two added")


def _added(x: Any, y: Any) -> Any:
    x += y
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_one_launch_and_equals_plain_layers(
    name: str, backend: str, launches: list[Any]
) -> None:
    chain, expected = CHAINS[name]
    dtype = torch.float32 if backend == "triton" else torch.float64
    norm, levels, others = make_norm(dtype).train(), make_levels(1, dtype), make_levels(2, dtype)
    twins = plain(norm)
    inputs = [level.requires_grad_() for level in (*levels, *others)]
    y = chain(norm, make_pyramid(levels, backend), make_pyramid(others, backend))
    assert bool(launches) == (name in READ_AT_ONCE)
    found = y.levels()
    kernel = "switchable_bn_act_levels" if backend == "by_level" else "switchable_bn_act"
    assert launches == [(kernel, *expected)]
    exact = [chain(twin, x, r) for twin, x, r in zip(twins, levels, others, strict=True)]
    tolerance = 1e-4 if backend == "triton" else 1e-10
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    # Weights that differ: batch norm has no gradient for a sum.
    dy = [torch.sin(torch.arange(p.numel(), dtype=dtype)).view_as(p) for p in exact]
    grads = [torch.autograd.grad(ys, inputs, dy, allow_unused=True) for ys in (found, exact)]
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)
    for bank, twin in enumerate(twins):
        for buffer in ("running_mean", "running_var"):
            moved = getattr(norm, buffer)[bank]
            torch.testing.assert_close(moved, getattr(twin, buffer), rtol=1e-5, atol=1e-5)
        assert norm.num_batches_tracked[bank] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pyramid_that_is_still_held_is_computed_once_and_continued(
    backend: str, launches: list[Any]
) -> None:
    dtype = torch.float32
    norm, levels = make_norm(dtype).train(), make_levels(1, dtype)
    twins = plain(norm)
    normed = norm(make_pyramid(levels, backend))
    activated = F.relu(normed)
    total = activated + 2 * normed  # reads both, the later one first
    assert total.num_channels == C
    assert len(launches) == 1
    assert launches[0][2] is None
    exact = [F.relu(twin(x)) + 2 * twin.eval()(x) for twin, x in zip(twins, levels, strict=True)]
    del exact
    for level, x, bank in zip(total.levels(), levels, range(len(SIZES)), strict=True):
        z = F.batch_norm(x, None, None, norm.weight[bank], norm.bias[bank], True)
        torch.testing.assert_close(level, z.relu() + 2 * z, rtol=1e-4, atol=1e-4)
    assert norm.num_batches_tracked.tolist() == [1] * len(SIZES)


def test_rows_that_are_read_twice_are_computed_once(launches: list[Any]) -> None:
    y = F.relu(make_norm().train()(Pyramid.pack(make_levels())))
    assert y.rows is y.rows
    F.conv2d(y, torch.ones(2, C, 3, 3, dtype=torch.float64))
    y.mean((2, 3))
    assert len(launches) == 1


def test_what_follows_in_place_does_not_reach_what_was_joined() -> None:
    norm, levels = make_norm().train(), make_levels()
    shortcut = Pyramid.pack(make_levels(2))
    before = shortcut.rows
    joined = norm(Pyramid.pack(levels)) + shortcut
    shortcut.mul_(0)
    alone = make_norm().train()(Pyramid.pack(levels))
    torch.testing.assert_close(joined.rows, alone.rows + before)


def test_a_reader_without_gradients_does_not_take_those_of_others() -> None:
    y = make_norm().train()(Pyramid.pack(make_levels()))
    with torch.no_grad():
        assert y.rows.requires_grad
    with torch.no_grad():
        z = make_norm().train()(Pyramid.pack(make_levels()))
    assert not z.rows.requires_grad


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "activation", [F.relu, F.relu6, None, F.silu], ids=["relu", "relu6", "none", "silu"]
)
def test_pooling_takes_the_norm_along(activation: Any, training: bool, launches: list[Any]) -> None:
    norm, levels = make_norm(torch.float32).train(training), make_levels(1, torch.float32)
    twins = [twin.train(training) for twin in plain(norm)]

    def run(bn: Any, x: Any) -> Any:
        y = bn(x) if activation is None else activation(bn(x))
        return F.max_pool2d(y, 3, 2, 1)

    y = run(norm, make_pyramid(levels, "triton"))
    assert y.sizes == tuple((-(-h // 2), -(-w // 2)) for h, w in SIZES)
    for ours, twin, x in zip(y.levels(), twins, levels, strict=True):
        torch.testing.assert_close(ours, run(twin, x), rtol=1e-4, atol=1e-4)
    fused = activation is not F.silu
    assert [name for name, *_ in launches] == ["bn_act_max_pool" if fused else "switchable_bn_act"]


def test_pooling_leaves_a_map_that_is_still_held_alone(launches: list[Any]) -> None:
    x = make_pyramid(make_levels(1, torch.float32), "triton")
    kept = F.relu(make_norm(torch.float32).train()(x))
    pooled = F.max_pool2d(kept, 3, 2, 1)
    for small, large in zip(pooled.levels(), kept.levels(), strict=True):
        assert torch.equal(small, F.max_pool2d(large, 3, 2, 1))
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("resnet50", {("relu", False): 32, ("relu", True): 16, (None, False): 4, "pooled": 1}),
        ("resnet18", {("relu", False): 8, ("relu", True): 8, (None, False): 3, "pooled": 1}),
        (
            "resnext50_32x4d",
            {("relu", False): 32, ("relu", True): 16, (None, False): 4, "pooled": 1},
        ),
        ("mobilenetv2", {("relu6", False): 35, (None, True): 10, (None, False): 7}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_networks_fuse_as_hand_written_ones(
    arch: str, expected: dict[Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[Any] = Counter()

    def noted(x: Tensor, *args: Any, **options: Any) -> Tensor:
        seen[options["activation"], options["residual"] is not None] += 1
        return torch.empty_like(x)

    def pooled(x: Tensor, *args: Any, **options: Any) -> Tensor:
        seen["pooled"] += 1
        sizes, num_images = args[5], args[6]
        rows = sum(num_images * -(-h // 2) * -(-w // 2) for h, w in sizes)
        return x.new_empty(rows, x.shape[1])

    monkeypatch.setattr(kernels, "switchable_bn_act", noted)
    monkeypatch.setattr(kernels, "bn_act_max_pool", pooled)
    monkeypatch.setattr(kernels, "global_avg_pool", lambda x, rows, n, **_: x[: len(rows) * n])
    with torch.device("meta"):
        model = create_model(arch, (64, 32), 7)
        seen.clear()
        model.use_backend("triton")([torch.empty(2, 3, r, r) for r in (64, 32)])
    assert seen == expected


def test_what_a_forward_moves_is_listed() -> None:
    network = nn.Sequential(make_norm(), nn.ReLU(), make_norm())
    first, _, second = network
    assert [id(t) for t in moved_by_forward(network)] == [
        id(t)
        for norm in (first, second)
        for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    ]


def test_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a pyramid"):
        make_norm()(torch.zeros(2, C, 3, 3))


def test_one_value_per_channel_is_refused_in_training_as_by_pytorch() -> None:
    norm = SwitchableBatchNorm2d(4, 2)
    images = Pyramid.pack([torch.randn(1, 4, 2, 2), torch.randn(1, 4, 1, 1)])
    with pytest.raises(ValueError, match=r"more than one value per channel, got a batch of 1"):
        norm(images)
    assert norm.eval()(images).sizes == ((2, 2), (1, 1))
    pair = Pyramid.pack([torch.randn(2, 4, 2, 2), torch.randn(2, 4, 1, 1)])
    assert norm.train()(pair).rows.isfinite().all()
