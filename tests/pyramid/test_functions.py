"""What torch functions mean for pyramids: the same as for the images of each level alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast import Pyramid
from rsfast.pyramid import function
from rsfast.pyramid.dispatch import _TABLE

SIZES = ((9, 7), (6, 6), (4, 5))
N, C = 3, 8
LAYOUTS = ("packed", "by_level")


def make_levels(channels: int = C, seed: int = 0, sizes: Any = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (N, channels)
    return [
        torch.randn(*shape, *size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in sizes
    ]


def make_pyramid(levels: list[Tensor], layout: str) -> Pyramid:
    packed = Pyramid.pack(levels)
    return packed.by_level() if layout == "by_level" else packed


def parts_of(y: Any, num_levels: int) -> list[Tensor]:
    """The result by level: of a pyramid, or of a tensor [L * N, ...]."""
    return list(y.levels()) if isinstance(y, Pyramid) else list(y.split(len(y) // num_levels))


def check(f: Callable[..., Any], layout: str, *inputs: list[Tensor], tolerance: float = 1e-12):
    """`f` of pyramids against `f` of each level: values, and gradients of all inputs."""
    ours = f(*(make_pyramid(levels, layout) for levels in inputs))
    exact = [f(*level) for level in zip(*inputs, strict=True)]
    for result, wanted in zip(_flat(ours), zip(*map(_flat, exact), strict=True), strict=True):
        parts = parts_of(result, len(inputs[0]))
        for part, alone in zip(parts, wanted, strict=True):
            assert part.shape == alone.shape
            torch.testing.assert_close(part, alone, rtol=tolerance, atol=tolerance)
    flat = [level for levels in inputs for level in levels if level.requires_grad]
    dy = [torch.cos(torch.arange(p.numel(), dtype=p.dtype)).view_as(p) for p in map(_first, exact)]
    grads = [
        torch.autograd.grad(values, flat, dy, allow_unused=True)
        for values in (parts_of(_first(ours), len(inputs[0])), [_first(y) for y in exact])
    ]
    for found, wanted in zip(*grads, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def _flat(y: Any) -> list[Any]:
    return list(y) if isinstance(y, tuple | list) else [y]


def _first(y: Any) -> Any:
    return _flat(y)[0]


WEIGHT = torch.linspace(-1, 1, C * C, dtype=torch.float64).view(C, C, 1, 1)
KERNEL = torch.linspace(-1, 1, C * C * 9, dtype=torch.float64).view(C, C, 3, 3)
BIAS = torch.linspace(0, 1, C, dtype=torch.float64)

ONE: dict[str, Callable[[Any], Any]] = {
    # element by element
    "relu": F.relu,
    "relu method": lambda x: x.relu(),
    "relu6": nn.ReLU6(),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "sigmoid": torch.sigmoid,
    "sigmoid method": lambda x: x.sigmoid(),
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "clamp": lambda x: x.clamp(-1, 1),
    "prelu": lambda x: F.prelu(x, BIAS),
    "exp": torch.exp,
    "square": lambda x: x.square(),
    "negative": lambda x: -x,
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "number": lambda x: 1 - 2 * x / 3 + x**2,
    "reflected": lambda x: 1.0 / (x + 10),
    "add alpha": lambda x: torch.add(x, x, alpha=0.5),
    "scalar tensor": lambda x: x * torch.tensor(0.5, dtype=torch.float64),
    "per channel": lambda x: x * BIAS.view(1, C, 1, 1) + BIAS.view(C, 1, 1),
    "tensor first": lambda x: BIAS.view(1, C, 1, 1) - x,
    "identity": nn.Identity(),
    "dropout in eval": nn.Dropout().eval(),
    "dropout of nothing": nn.Dropout(0.0),
    # convolutions
    "1x1": lambda x: F.conv2d(x, WEIGHT),
    "1x1 with bias": lambda x: F.conv2d(x, WEIGHT, BIAS),
    "1x1 strided": lambda x: F.conv2d(x, WEIGHT, None, 2),
    "1x1 strided unequally": lambda x: F.conv2d(x, WEIGHT, BIAS, (3, 2)),
    "1x1 padded": lambda x: F.conv2d(x, WEIGHT, None, 1, 1),
    "3x3": lambda x: F.conv2d(x, KERNEL, None, 1, 1),
    "3x3 strided, bias": lambda x: F.conv2d(x, KERNEL, BIAS, 2, 1),
    "3x3 without padding": lambda x: F.conv2d(x, KERNEL),
    "3x3 dilated": lambda x: F.conv2d(x, KERNEL, None, 1, 2, 2),
    "grouped": lambda x: F.conv2d(x, KERNEL[:, :2], None, 1, 1, 1, 4),
    "depthwise": lambda x: F.conv2d(x, KERNEL[:, :1], None, 2, 1, 1, C),
    "1x3": lambda x: F.conv2d(x, KERNEL[:, :, :1], None, 1, (0, 1)),
    "even kernel": lambda x: F.conv2d(x, KERNEL[:, :, :2, :2], None, 2),
    "same": lambda x: F.conv2d(x, KERNEL, None, 1, "same"),
    "same, even kernel": lambda x: F.conv2d(x, KERNEL[:, :, :2, :2], None, 1, "same"),
    "valid": lambda x: F.conv2d(x, KERNEL, None, 1, "valid"),
    "transposed": lambda x: F.conv_transpose2d(x, KERNEL, None, 2, 1),
    # maps
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool, default stride": lambda x: F.max_pool2d(x, 2),
    "max pool, ceil": lambda x: F.max_pool2d(x, 3, 2, 0, 1, True),
    "avg pool": lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False),
    "adaptive avg pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive avg pool 2": lambda x: F.adaptive_avg_pool2d(x, (2, 2)),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "interpolate to a size": lambda x: F.interpolate(
        x, size=(x.shape[2] * 2, x.size(3) + 1), mode="bilinear"
    ),
    "group norm": lambda x: F.group_norm(x, 2, BIAS, BIAS),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "slices of maps": lambda x: x[:, :, ::2, 1:],
    # reductions
    "mean": lambda x: x.mean((2, 3)),
    "mean keepdim": lambda x: x.mean([-2, -1], keepdim=True),
    "sum over maps": lambda x: x.sum((2, 3)),
    "amax over maps": lambda x: x.amax((2, 3), keepdim=True),
    "std over maps": lambda x: x.std((2, 3)),
    "mean over channels": lambda x: x.mean(1, keepdim=True),
    "mean over channels in a list": lambda x: torch.mean(x, [1], True),
    "max over channels": lambda x: torch.max(x, 1, keepdim=True)[0],
    "max without the dimension": lambda x: torch.max(x, 1)[0].unsqueeze(1),
    # channels and shapes
    "cat": lambda x: torch.cat([x, 2 * x], 1),
    "cat, negative dim": lambda x: torch.cat((x, x), dim=-3),
    "chunk": lambda x: x.chunk(2, dim=1),
    "split": lambda x: torch.split(x, [3, 5], dim=1),
    "split size": lambda x: x.split(4, 1),
    "some channels": lambda x: x[:, 2:6],
    "ellipsis": lambda x: x[:, 1:, ...],
    "softmax": lambda x: x.softmax(dim=1),
    "log softmax": lambda x: F.log_softmax(x, dim=1),
    "shuffle": lambda x: (
        x.view(x.shape[0], 2, C // 2, *x.shape[2:]).transpose(1, 2).contiguous().view(x.size())
    ),
    "shuffle, -1": lambda x: (
        x.reshape(x.size(0), 4, -1, x.size(2), x.size(3)).transpose(2, 1).flatten(1, 2)
    ),
    "split attention": lambda x: (
        torch.stack([x, 2 * x], dim=1) * torch.softmax(x.mean((2, 3), keepdim=True), 1)[:, None]
    ).sum(dim=1),
    "flatten pooled": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "view pooled": lambda x: (lambda p: p.view(p.size(0), -1))(F.adaptive_avg_pool2d(x, (1, 1))),
    "squeeze pooled": lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
    "reshape pooled": lambda x: F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], C),
    "flatten equal maps": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 2), 1),
    # a value per image
    "squeeze and excitation": lambda x: x * torch.sigmoid(F.conv2d(x.mean((2, 3), True), WEIGHT)),
    "excitation first": lambda x: F.hardsigmoid(F.adaptive_avg_pool2d(x, 1)) * x,
    "by hand": lambda x: (
        x * F.linear(x.mean((2, 3)).view(x.shape[0], C), WEIGHT[:, :, 0, 0]).view(-1, C, 1, 1)
    ),
    "expand as": lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x),
    "spatial gate": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "context added": lambda x: x + x.amax((2, 3), keepdim=True),
    "difference to the mean": lambda x: x - x.mean((2, 3), keepdim=True),
}
IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "relu_": lambda x: torch.relu_(x.clone()),
    "module": lambda x: nn.ReLU(inplace=True)(x.clone()),
    "hardswish": lambda x: F.hardswish(x.clone(), inplace=True),
    "method": lambda x: x.clone().mul_(2).add_(x),
    "operator": lambda x: _add_to(x.clone(), x),
}


def _add_to(x: Any, other: Any) -> Any:
    x += other
    x *= 2
    x -= 1
    return x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ONE)
def test_one_pyramid(name: str, layout: str) -> None:
    check(ONE[name], layout, make_levels())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_strided_1x1_convolution_of_images_has_a_backward(layout: str) -> None:
    weight = torch.ones(16, 3, 1, 1, requires_grad=True)
    images = [torch.ones(32, 3, r, r) for r in (64, 48)]
    for _ in range(5):  # PyTorch 2.13's own writes where it must not, and not always with a fault
        F.conv2d(make_pyramid(images, layout), weight, None, 2).rows.sum().backward()
    assert (weight.grad == 5 * 32 * (32 * 32 + 24 * 24)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str, layout: str) -> None:
    check(IN_PLACE[name], layout, make_levels())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "f",
    [torch.add, torch.mul, lambda x, y: x - y, torch.maximum, lambda x, y: torch.cat([x, y], 1)],
    ids=["add", "mul", "sub", "maximum", "cat"],
)
def test_two_pyramids(f: Callable[..., Any], layout: str) -> None:
    check(f, layout, make_levels(), make_levels(seed=1))


def test_layouts_meet() -> None:
    levels, others = make_levels(), make_levels(seed=1)
    mixed = make_pyramid(levels, "packed") + make_pyramid(others, "by_level")
    for found, a, b in zip(mixed.levels(), levels, others, strict=True):
        assert torch.equal(found, a + b)


def test_in_place_functions_reach_every_name_of_a_pyramid() -> None:
    x = Pyramid.pack(make_levels())
    other = x
    F.relu(x, inplace=True)
    assert other is x
    assert (other.rows >= 0).all()
    kept = x.rows
    x += 1
    assert torch.equal(other.rows, kept + 1)


def test_gradients_of_a_value_per_image_are_right() -> None:
    x = torch.randn(N * 10, 4, dtype=torch.float64, requires_grad=True)
    s = torch.randn(2 * N, 4, dtype=torch.float64, requires_grad=True)

    def scaled(x: Tensor, s: Tensor) -> Tensor:
        return (Pyramid(x, ((3, 3), (1, 1)), N) * s[:, :, None, None]).rows

    assert torch.autograd.gradcheck(scaled, (x, s))


def test_shapes_are_those_of_a_batch_of_all_images() -> None:
    x = Pyramid.pack(make_levels())
    assert x.shape[:2] == (len(SIZES) * N, C)
    assert x.size(2).values == (9, 6, 4)
    assert x.shape[-1].values == (7, 6, 5)
    assert x.dim() == x.ndim == 4
    assert x.numel() == N * C * (63 + 36 + 20)
    pooled = F.adaptive_avg_pool2d(x, 1)
    assert pooled.shape == (len(SIZES) * N, C, 1, 1)
    assert x.new_empty(2, 3).shape == (2, 3)
    assert (x.dtype, x.device.type, x.is_cuda) == (torch.float64, "cpu", False)


def test_dropout_and_stochastic_depth_draw_for_each_image_of_each_level() -> None:
    torch.manual_seed(0)
    ones = Pyramid.pack([torch.ones(50, 2, s, s) for s in (4, 3, 2)])
    dropped = F.dropout(ones, 0.5, training=True)
    assert set(dropped.rows.unique().tolist()) == {0.0, 2.0}
    # As torchvision and timm write it.
    mask = ones.new_empty((ones.shape[0],) + (1,) * (ones.ndim - 1)).bernoulli_(0.5)
    kept = (ones * mask).levels()
    for level in kept:
        assert ((level == 0).flatten(1).all(1) | (level == 1).flatten(1).all(1)).all()
    assert not torch.equal(kept[0][:, 0, 0, 0], kept[1][:, 0, 0, 0])


def test_an_unknown_function_is_named_with_its_module_and_can_be_taught() -> None:
    class Odd(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.special.entr(x)

    x = Pyramid.pack(make_levels())
    network = nn.Sequential(nn.ReLU(), nn.Sequential(Odd()))
    message = (
        r"do not know torch.special.entr, which 1.0 \(Odd\) calls; "
        r"@rsfast.pyramid.function\(torch.special.entr\)"
    )
    with pytest.raises(TypeError, match=message):
        network(x)
    try:

        @function(torch.special.entr)
        def entr(x: Pyramid) -> Pyramid:
            return x.map_rows(torch.special.entr)

        assert torch.equal(network(x).rows, torch.special.entr(x.rows.relu()))
    finally:
        del _TABLE[torch.special.entr]


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda x: x.permute(0, 2, 3, 1), TypeError, "do not know torch.Tensor.permute"),
        (lambda x: x.no_such_method(), AttributeError, "no attribute 'no_such_method'"),
        (lambda x: x.flatten(2), ValueError, "are no tensor"),
        (lambda x: x.view(x.size(0), -1), ValueError, "are no tensor"),
        (lambda x: x.view(-1, x.shape[2]), ValueError, "in its channels only"),
        (lambda x: torch.cat([x, x], 2), ValueError, "dim must be one of channels"),
        (lambda x: torch.cat([x, F.avg_pool2d(x, 2)], 1), ValueError, "of the same sizes"),
        (lambda x: x + F.avg_pool2d(x, 2), ValueError, "do not go together"),
        (lambda x: x * torch.ones(1, C, 9, 7), ValueError, "must broadcast over height and width"),
        (lambda x: x.sum(), ValueError, "would mix its images"),
        (lambda x: x[0], ValueError, "can be indexed by channels"),
        (lambda x: x.softmax(dim=2), ValueError, "dim must be one of channels"),
        (lambda x: F.conv2d(x, KERNEL, None, 1, 0, 3), ValueError, "none left"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_meaning_is_refused(f: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        f(Pyramid.pack(make_levels()))
