"""Convolutions with pending batch norm and statistics, against float64.

Without a CUDA device the kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_helpers import (
    CPU_OR_GPU,
    GPU_ONLY,
    PLACES,
    assert_close,
    capture_without_host_sync,
    max_error,
    on_another_stream,
    to_float64,
)
from rsfast.kernels import (
    conv2d_reference,
    folded_conv2d,
    folded_conv2d_reference,
    switchable_bn_act_reference,
)

Maps = tuple[tuple[tuple[int, int], ...], int]
# Sizes and number of images: several tiles of rows, one pixel, the most levels there can be.
MAPS: list[Maps] = [
    (((13, 5), (11, 3), (1, 2)), 2),
    (((1, 1),), 1),
    (((3, 3), (7, 1), (5, 1), (2, 2), (3, 1), (1, 2), (2, 1), (1, 1)), 1),
]
# (C_in, C_out): less than a tile, more than one of each, none a multiple of anything.
CHANNELS = [(3, 5), (65, 24), (24, 131)]
# With k, stride and activation.
CASES = [
    *itertools.product(MAPS, CHANNELS, [1], [1], [None, "relu", "relu6"]),
    (MAPS[0], (72, 136), 1, 1, "relu"),  # in 16 bits, the tiles of most layers
    (MAPS[0], (24, 131), 1, 2, "relu"),
    (MAPS[2], (65, 24), 3, 1, None),
    (MAPS[0], (65, 24), 3, 1, "relu"),
    (MAPS[0], (24, 40), 3, 2, "relu"),
    (MAPS[2], (24, 40), 3, 2, "relu6"),
    (MAPS[0], (12, 20), 5, 1, "relu"),
]


def make(
    maps: Maps,
    channels: tuple[int, int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    kernel: int = 1,
    pending: bool = True,
    mean: float = 0.0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes, num_images = maps
    num_in, num_out = channels
    shape = len(sizes), num_in
    num_rows = num_images * sum(height * width for height, width in sizes)
    x = torch.randn(num_rows, num_in, generator=generator) + mean
    weight = torch.randn(num_out, num_in, kernel, kernel, generator=generator)
    weight = weight.contiguous(memory_format=torch.channels_last) / weight[0].numel() ** 0.5
    inputs = {name: t.to(device, dtype) for name, t in (("x", x), ("weight", weight))}
    if pending:
        inputs["center"] = torch.randn(shape, generator=generator) / 3 + mean
        inputs["scale"] = torch.rand(shape, generator=generator) + 0.5
        inputs["shift"] = torch.randn(shape, generator=generator) / 3
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def run(function: Any, inputs: dict[str, Tensor], maps: Maps, **options: Any) -> dict[str, Tensor]:
    """All outputs and gradients, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    found = function(leaves["x"], leaves["weight"], *maps, **_rest(leaves), **options)
    outputs = {name: tensor for name, tensor in found._asdict().items() if tensor.numel()}
    upstream = [_upstream(tensor) for tensor in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in outputs.items()} | named


def _rest(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name not in ("x", "weight")}


def _upstream(tensor: Tensor) -> Tensor:
    steps = torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64, device=tensor.device)
    return steps.cos().view(tensor.shape).to(tensor.dtype)


def skip_without_rival(place: tuple[str, torch.dtype], kernel: int) -> None:
    if place == ("cpu", torch.float16) and kernel > 1:
        # NaN now and then, seen with PyTorch 2.13.
        pytest.skip("PyTorch's float16 convolutions on a CPU read memory that nobody has written")


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize(("maps", "channels", "kernel", "stride", "activation"), CASES, ids=str)
def test_outputs_and_gradients_match_the_float64_reference(
    maps: Maps,
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    activation: str | None,
    place: tuple[str, torch.dtype],
) -> None:
    skip_without_rival(place, kernel)
    inputs = make(maps, channels, *place, kernel=kernel)
    options = {"activation": activation, "stride": stride}
    exact = run(folded_conv2d_reference, to_float64(inputs), maps, **options)
    eager = run(folded_conv2d_reference, inputs, maps, **options)
    assert_close(run(folded_conv2d, inputs, maps, **options, backend="triton"), eager, exact)


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("statistics", [True, False])
def test_with_nothing_pending_it_is_a_convolution(
    place: tuple[str, torch.dtype], statistics: bool, kernel: int
) -> None:
    skip_without_rival(place, kernel)
    maps = ((10, 7), (3, 3)), 1
    inputs = make(maps, (65, 24), *place, kernel=kernel, pending=False)
    options = {"statistics": statistics}
    exact = run(folded_conv2d_reference, to_float64(inputs), maps, **options)
    eager = run(folded_conv2d_reference, inputs, maps, **options)
    ours = run(folded_conv2d, inputs, maps, **options, backend="triton")
    assert_close(ours, eager, exact)
    assert ("mean" in ours) is statistics


def test_gradients_of_the_weight_lie_in_memory_as_the_weight_does() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    maps = ((4, 4),), 1
    inputs = make(maps, (6, 5), kernel=3)
    assert run(folded_conv2d, inputs, maps)["dweight"].stride() == inputs["weight"].stride()


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("which", ["mean", "var"])
def test_moments_may_have_gradients_by_themselves(
    which: str, place: tuple[str, torch.dtype]
) -> None:
    maps = ((10, 7), (3, 3)), 1
    inputs = make(maps, (24, 40), *place, pending=False)

    def gradients(function: Any, tensors: dict[str, Tensor], **backend: str) -> dict[str, Tensor]:
        leaves = {f"d{name}": t.detach().requires_grad_() for name, t in tensors.items()}
        moment = getattr(function(*leaves.values(), *maps, **backend), which)
        grads = torch.autograd.grad(moment, list(leaves.values()), _upstream(moment))
        return dict(zip(leaves, grads, strict=True))

    exact = gradients(folded_conv2d_reference, to_float64(inputs))
    eager = gradients(folded_conv2d_reference, inputs)
    assert_close(gradients(folded_conv2d, inputs, backend="triton"), eager, exact)


@pytest.fixture(params=["one launch", "two launches"])
def merging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many launches merge partial results: two where a level has more tiles than one takes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from rsfast.kernels import _folded_conv2d_tiles as tiles

    if request.param == "two launches":
        monkeypatch.setitem(tiles.MERGE_OPTIONS, "BLOCK_K", 2)


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_partial_results_are_merged_in_one_launch_or_two(place: tuple[str, torch.dtype]) -> None:
    maps = ((31, 21), (17, 9), (1, 1)), 1  # 11, 3 and 1 tiles in 16 bits and odd channels
    inputs = make(maps, (9, 5), *place)
    options = {"activation": "relu"}
    exact = run(folded_conv2d_reference, to_float64(inputs), maps, **options)
    eager = run(folded_conv2d_reference, inputs, maps, **options)
    assert_close(run(folded_conv2d, inputs, maps, **options, backend="triton"), eager, exact)


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_statistics_survive_a_mean_of_many_deviations(device: str) -> None:
    maps = ((20, 15), (8, 5)), 1
    inputs = make(maps, (8, 8), device, pending=False)
    inputs["x"][:, 0] = 1.0
    inputs["weight"][:, 0] = 1e4  # a constant on top of deviations of about 1
    y, mean, var = folded_conv2d(*inputs.values(), *maps, backend="triton")
    for level, rows in enumerate(y.split([300, 40])):  # of what is stored, not of its rounding
        exact = torch.var_mean(rows.double(), dim=0, correction=0)
        eager = torch.var_mean(rows, dim=0, correction=0)
        for ours, same, want in zip((var[level], mean[level]), eager, exact, strict=True):
            step = torch.finfo(torch.float32).eps * want.abs().max().item()
            assert max_error(ours, want) <= 2 * max_error(same, want) + step


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_two_of_them_hold_a_whole_training_batch_norm(device: str, activation: str | None) -> None:
    maps, level_rows, banks, eps = (((9, 5), (11, 3), (4, 2)), 2), (90, 66, 16), (1, 0, 1), 1e-5
    first = make(maps, (12, 20), device, kernel=3, pending=False)
    second = make(maps, (20, 9), device, kernel=3, pending=False)["weight"]
    generator = torch.Generator().manual_seed(1)
    gamma = (torch.rand(2, 20, generator=generator) + 0.5).to(device)
    beta = torch.randn(2, 20, generator=generator).to(device)

    def deferred(x: Tensor, w1: Tensor, w2: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y, mean, var = folded_conv2d(x, w1, *maps, backend="triton")
        scale = gamma[list(banks)] * (var + eps).rsqrt()
        pending = {"center": mean, "scale": scale, "shift": beta[list(banks)].contiguous()}
        options = {"activation": activation, "statistics": False, "backend": "triton"}
        return folded_conv2d(y, w2, *maps, **pending, **options).y

    def by_the_book(x: Tensor, w1: Tensor, w2: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        running = torch.zeros_like(gamma), torch.ones_like(gamma)
        count = torch.zeros(2, dtype=torch.int64, device=device)
        z = switchable_bn_act_reference(
            conv2d_reference(x, w1, *maps),
            gamma,
            beta,
            *running,
            count,
            level_rows,
            banks,
            activation=activation,
            training=True,
            eps=eps,
        )
        return conv2d_reference(z, w2, *maps)

    def outputs(function: Any, *tensors: Tensor) -> dict[str, Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y = function(*leaves)
        grads = torch.autograd.grad(y, leaves, _upstream(y))
        return dict(zip(("y", "dx", "dw1", "dw2", "dgamma", "dbeta"), (y, *grads), strict=True))

    tensors = first["x"], first["weight"], second, gamma, beta
    exact = outputs(by_the_book, *(tensor.double() for tensor in tensors))
    eager = outputs(by_the_book, *tensors)
    assert_close(outputs(deferred, *tensors), eager, exact)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_operators_pass_opcheck(device: str) -> None:
    maps = [4, 3], [2, 1], 1, 2  # heights, widths, images, stride
    inputs = make((((4, 2), (3, 1)), 1), (5, 6), device, kernel=3)
    x, weight, *pending = (tensor.requires_grad_() for tensor in inputs.values())
    fwd = torch.ops.rsfast.folded_conv2d_fwd.default
    torch.library.opcheck(fwd, (x, weight, *pending, *maps, "relu", True))
    torch.library.opcheck(fwd, (x, weight, None, None, None, *maps, None, False))
    with torch.no_grad():
        y, mean, _ = fwd(x, weight, *pending, *maps, "relu", True)
        grads = torch.ones_like(y), torch.ones_like(mean), None
        x, weight, *pending = (tensor.detach() for tensor in (x, weight, *pending))
        arguments = x, weight, y, mean, *pending, *maps, "relu"
        bwd = torch.ops.rsfast.folded_conv2d_bwd.default
        torch.library.opcheck(bwd, (*grads, *arguments))
        # With nothing pending: strided, and one product of matrices.
        torch.library.opcheck(bwd, (*grads, x, weight, y, mean, None, None, None, *maps, None))
        point, maps = weight[:, :, :1, :1].contiguous(), [*maps[:3], 1]
        y, mean, _ = fwd(x, point, None, None, None, *maps, None, True)
        grads = torch.ones_like(y), None, torch.ones_like(mean)
        torch.library.opcheck(bwd, (*grads, x, point, y, mean, None, None, None, *maps, None))


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_repeated_runs_give_the_same_bits(place: tuple[str, torch.dtype]) -> None:
    maps = ((10, 9), (8, 5)), 1
    inputs = make(maps, (24, 40), *place, kernel=3)
    options = {"activation": "relu", "backend": "triton"}
    one, other = (run(folded_conv2d, inputs, maps, **options) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of"),
        ({"x": torch.zeros(14, 4).double()}, "x must be float16, bfloat16 or float32"),
        ({"x": torch.zeros(4, 14).t()}, "x must be contiguous"),
        ({"weight": torch.zeros(3, 5, 1, 1)}, r"weight must be \[C_out, 4, k, k\]"),
        ({"weight": torch.zeros(3, 4, 2, 2)}, "k odd, got shape"),
        ({"weight": torch.zeros(3, 4)}, r"weight must be \[C_out, 4, k, k\]"),
        ({"weight": torch.zeros(3, 4, 3, 3)}, "weight must be contiguous"),  # not channels-last
        ({"sizes": ((7, 2), (0, 1))}, "level_rows must be 1 to 8 counts of at least 1"),
        ({"sizes": ((13, 1),)}, "sizes must add up to the 14 rows of x for 1 images"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"scale": None}, "scale must come with center, scale and shift, got None"),
        ({"shift": torch.zeros(1, 4)}, r"shift must be \[2, 4\]"),
        ({"center": torch.zeros(2, 4).double()}, "center must be contiguous torch.float32"),
        ({"activation": "gelu"}, "activation must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    pending = {name: torch.ones(2, 4) for name in ("center", "scale", "shift")}
    arguments = {"x": torch.zeros(14, 4), "weight": torch.zeros(3, 4, 1, 1)}
    arguments |= {"sizes": ((4, 3), (2, 1)), "num_images": 1}
    with pytest.raises(ValueError, match=message):
        folded_conv2d(**{**arguments, **pending, "backend": "triton", **change})


def test_an_activation_of_nothing_is_refused() -> None:
    x, weight = torch.zeros(4, 4), torch.zeros(3, 4, 1, 1)
    with pytest.raises(ValueError, match="activation must be None where nothing is pending"):
        folded_conv2d(x, weight, ((2, 2),), 1, activation="relu")


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    MAPS = ((7, 7), (3, 3)), 64

    def run(self, device: str, kernel: int) -> dict[str, Tensor]:
        inputs = make(self.MAPS, (256, 512), device, torch.bfloat16, kernel=kernel)
        return run(folded_conv2d, inputs, self.MAPS, activation="relu", backend="triton")

    def test_another_stream_gives_the_same_bits(self, device: str, kernel: int) -> None:
        here, there = self.run(device, kernel), on_another_stream(lambda: self.run(device, kernel))
        assert all(torch.equal(here[name], there[name]) for name in here)

    def test_the_host_never_waits_and_a_graph_captures_it(self, device: str, kernel: int) -> None:
        inputs = make(self.MAPS, (256, 512), device, torch.bfloat16, kernel=kernel)
        x, weight, rest = inputs["x"], inputs["weight"], _rest(inputs)
        options = {**rest, "activation": "relu", "backend": "triton"}
        want = folded_conv2d(x, weight, *self.MAPS, **options)
        captured = capture_without_host_sync(
            lambda: folded_conv2d(x, weight, *self.MAPS, **options)
        )
        for ours, other in zip(captured, want, strict=True):
            assert torch.equal(ours, other)
