"""1x1 convolutions whose gradients are added to that of the next reader of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_helpers import max_error
from rsfast import Pyramid, convert, kernels
from rsfast.models.resnet import Bottleneck

SIZES = ((5, 4), (3, 3), (2, 1))
N, C = 2, 8
M = N * sum(h * w for h, w in SIZES)


def make_weight(seed: int, out: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, C, 1, 1, generator=generator, dtype=torch.float64)
    return weight.requires_grad_()


def make_pyramid(backend: str = "triton") -> tuple[Pyramid, Tensor]:
    """A pyramid whose rows autograd has made of a leaf, and the leaf."""
    generator = torch.Generator().manual_seed(9)
    leaf = torch.randn(M, C, generator=generator, dtype=torch.float64).requires_grad_()
    return Pyramid(2 * leaf, SIZES, N, backend=backend), leaf


def on_pytorch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: function(*args, **{**options, "backend": "torch"})


class Adds(TorchDispatchMode):
    """Counts sums of two tensors of a shape, and products and pixels that are added to one."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.sums = self.joined = self.pixels = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and tuple(args[0].shape) == self.shape:
            self.sums += f in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
            self.joined += f is torch.ops.aten.addmm_.default
        self.pixels += f is torch.ops.rsfast.subsample_add.default
        return f(*args, **(kwargs or {}))


def three_products(x: Any, weights: list[Tensor]) -> Tensor:
    outputs = [F.conv2d(x, weight) for weight in weights]
    return sum((i + 1) * y.rows.square().sum() for i, y in enumerate(outputs))


def with_other_readers(x: Any, weights: list[Tensor]) -> Tensor:
    before = x.rows.sin().sum()
    y, z = F.conv2d(x, weights[0]), F.conv2d(x, weights[1])
    padded = F.conv2d(x, weights[2], None, 1, 1)
    return before + (y * z).rows.sum() + padded.rows.square().sum() + (x * x).rows.sum()


def with_an_unused_product(x: Any, weights: list[Tensor]) -> Tensor:
    F.conv2d(x, weights[0])
    return F.conv2d(x, weights[1]).rows.square().sum() + 0 * weights[2].sum() + weights[0].sum()


def with_an_unused_reader(x: Any, weights: list[Tensor]) -> Tensor:
    y = F.conv2d(x, weights[0])
    F.conv2d(x, weights[1])
    return y.rows.square().sum() + weights[1].sum() + weights[2].sum()


def with_strided_ones(x: Any, weights: list[Tensor]) -> Tensor:
    first, y = F.conv2d(x, weights[0], None, 2), F.conv2d(x, weights[1])
    kernel = torch.cat([weights[2], weights[1]], 3)
    wide, last = F.conv2d(x, kernel, None, 1, (0, 1)), F.conv2d(x, weights[2], None, (1, 3))
    return y.rows.square().sum() + sum(v.rows.sum() for v in (first, wide, last))


def with_an_unused_strided_one(x: Any, weights: list[Tensor]) -> Tensor:
    F.conv2d(x, weights[0], None, 2)
    y = F.conv2d(x, weights[1], None, 2)
    F.conv2d(x, weights[2])
    return y.rows.square().sum() + weights[0].sum() + weights[2].sum()


READERS = [three_products, with_other_readers, with_an_unused_product, with_an_unused_reader]
READERS += [with_strided_ones, with_an_unused_strided_one]


@pytest.mark.parametrize("objective", READERS)
def test_gradients_are_those_of_plain_readers(
    objective: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("subsample", "subsample_gradient"):  # in float64, of which Triton's know nothing
        monkeypatch.setattr(kernels, name, on_pytorch(getattr(kernels, name)))
    results = []
    for backend in ("torch", "triton"):
        x, leaf = make_pyramid(backend)
        weights = [make_weight(seed) for seed in range(3)]
        total = objective(x, weights)
        again = torch.autograd.grad(total, [leaf, *weights], retain_graph=True)
        results.append([total.detach(), *again, *torch.autograd.grad(total, [leaf, *weights])])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_product_adds_to_the_gradient_of_the_next_one_in_place() -> None:
    x, leaf = make_pyramid()
    total = three_products(x, [make_weight(seed) for seed in range(3)])
    with Adds((M, C)) as counted:
        torch.autograd.grad(total, leaf)
    assert (counted.sums, counted.joined) == (0, 2)


def test_frozen_weights_get_no_gradient_and_keep_no_rows() -> None:
    x, leaf = make_pyramid()
    frozen, other = make_weight(0).requires_grad_(False), make_weight(1)
    y = F.conv2d(x, frozen)
    assert y.rows.grad_fn.saved_tensors[0] is None
    total = y.rows.sum() + F.conv2d(x, other).rows.sum()
    dleaf, dother = torch.autograd.grad(total, [leaf, other])
    exact = 2 * (frozen + other).detach().sum(0).flatten().expand(M, C)
    torch.testing.assert_close(dleaf, exact)
    torch.testing.assert_close(dother[:, :, 0, 0], x.rows.detach().sum(0).expand(C, C))


@pytest.mark.parametrize("why", ["no gradients", "a leaf", "torch", "autocast of float32", "bias"])
def test_nothing_is_handed_on_where_it_would_not_join(why: str) -> None:
    x, leaf = make_pyramid("torch" if why == "torch" else "triton")
    if why == "a leaf":
        x = Pyramid(leaf, SIZES, N, backend="triton")
    if why == "autocast of float32":
        x = x.with_rows(x.rows.float())
    bias = torch.zeros(C, dtype=torch.float64) if why == "bias" else None
    weight = make_weight(0).to(x.dtype)
    casts = torch.autocast("cpu", torch.bfloat16, enabled=why.startswith("autocast"))
    with casts, torch.set_grad_enabled(why != "no gradients"):
        y = F.conv2d(x, weight, bias)
    assert x.content.handed_on is None
    assert y.dtype == (torch.bfloat16 if why.startswith("autocast") else torch.float64)


def test_autocast_multiplies_rows_of_its_own_type() -> None:
    x, leaf = make_pyramid()
    x, weight = x.with_rows(x.rows.bfloat16()), make_weight(0).detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = F.conv2d(x, weight)
    assert y.dtype == torch.bfloat16
    assert x.content.handed_on is not None
    dweight = torch.autograd.grad(y.rows.sum(), [weight, leaf])[0]
    assert dweight.dtype == torch.float32


def make_block(stride: int, channels: int) -> nn.Module:
    torch.manual_seed(0)
    block = Bottleneck(channels, 8, stride, 1, 64)
    network = nn.Sequential(nn.Conv2d(3, channels, 1, bias=False), nn.BatchNorm2d(channels))
    network.append(nn.ReLU()).append(block).append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    return convert(network, (8, 6))


def gradients_of_block(
    stride: int, channels: int, backend: str, dtype: torch.dtype
) -> tuple[Sequence[Tensor], Adds]:
    model = make_block(stride, channels).to(dtype).use_backend(backend).train()
    images = [torch.randn(2, 3, r, r, generator=torch.Generator().manual_seed(r)) for r in (8, 6)]
    loss = model(Pyramid.pack([image.to(dtype) for image in images])).square().sum()
    with Adds((2 * (64 + 36), channels)) as counted:
        return torch.autograd.grad(loss, list(model.parameters())), counted


@pytest.mark.parametrize(
    ("stride", "channels"), [(1, 32), (1, 16), (2, 16)], ids=["identity", "product", "strided"]
)
def test_gradients_at_the_input_of_a_block_meet_in_the_product(stride: int, channels: int) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    exact, _ = gradients_of_block(stride, channels, "torch", torch.float64)
    eager, _ = gradients_of_block(stride, channels, "torch", torch.float32)
    ours, counted = gradients_of_block(stride, channels, "triton", torch.float32)
    # The strided shortcut comes first in a block, so its pixels are added to the product.
    assert (counted.sums, counted.joined) == (0, 0 if stride == 2 else 1)
    assert counted.pixels == (stride == 2)
    for own, theirs, want in zip(ours, eager, exact, strict=True):
        step = torch.finfo(torch.float32).eps * want.abs().max().item()
        assert max_error(own, want) <= 2 * max_error(theirs, want) + 4 * step


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
def test_a_residual_behind_an_activation_has_a_gradient_of_its_own(activation: str) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    x, residual = (torch.randn(12, 4, requires_grad=True) for _ in range(2))
    state = [torch.ones(1, 4), torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 4)]
    y = kernels.switchable_bn_act(
        x,
        *state,
        torch.zeros(1, dtype=torch.int64),
        (12,),
        (0,),
        residual=residual,
        activation=activation,
        training=True,
        backend="triton",
    )
    dy = torch.randn(12, 4)
    dx, dresidual = torch.autograd.grad(y, [x, residual], dy)
    assert dresidual.data_ptr() not in (dy.data_ptr(), dx.data_ptr())


def test_the_gradient_of_a_sum_that_others_hold_is_never_written_over() -> None:
    """Without an activation it is that of the output itself."""
    pytest.importorskip("triton", reason="needs Triton")
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.norm = nn.Conv2d(3, 8, 1), conv, norm

        def forward(self, x: Any) -> Any:
            x = self.first(x)
            y = self.norm(self.conv(x)) + x
            return (y + 0).flatten(1) if y.is_pooled else F.adaptive_avg_pool2d(y, 1).flatten(1)

    model = convert(Linear(), (4, 3)).use_backend("triton").train()
    kept: list[tuple[Tensor, Tensor]] = []
    handler = kernels.switchable_bn_act

    def hooked(*args: Any, **options: Any) -> Tensor:
        y = handler(*args, **options)
        y.register_hook(lambda dy: kept.append((dy, dy.clone())))
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "switchable_bn_act", hooked)
        logits = model([torch.randn(2, 3, r, r) for r in (4, 3)])
    logits.square().sum().backward()
    assert kept
    assert all(torch.equal(dy, before) for dy, before in kept)
