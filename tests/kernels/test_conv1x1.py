"""1x1 convolutions with pending batch norm and statistics, against float64.

Without a CUDA device the kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_helpers import (
    CPU_OR_GPU,
    GPU_ONLY,
    PLACES,
    capture_without_host_sync,
    max_error,
    on_another_stream,
)
from rsfast.kernels import conv1x1, conv1x1_reference, switchable_bn_act_reference

LEVELS = [(130, 65, 3), (1,), (9, 7, 5, 4, 3, 2, 2, 1)]
# (C_in, C_out): less than a tile, more than one of each, none a multiple of anything.
CHANNELS = [(3, 5), (65, 24), (24, 131)]


def make(
    level_rows: tuple[int, ...],
    channels: tuple[int, int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    pending: bool = True,
    mean: float = 0.0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_in, num_out = channels
    shape = len(level_rows), num_in
    x = torch.randn(sum(level_rows), num_in, generator=generator) + mean
    inputs = {"x": x, "weight": torch.randn(num_out, num_in, generator=generator) / num_in**0.5}
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    if pending:
        inputs["center"] = torch.randn(shape, generator=generator) / 3 + mean
        inputs["scale"] = torch.rand(shape, generator=generator) + 0.5
        inputs["shift"] = torch.randn(shape, generator=generator) / 3
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def run(
    function: Any, inputs: dict[str, Tensor], level_rows: tuple[int, ...], **options: Any
) -> dict[str, Tensor]:
    """All outputs and gradients, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    found = function(leaves["x"], leaves["weight"], level_rows, **_rest(leaves), **options)
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


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in inputs.items()}


def assert_close(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]):
    """Each at most twice as far off as PyTorch in the same type, plus one rounding."""
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        assert ours[name].dtype == eager[name].dtype, name
        step = torch.finfo(ours[name].dtype).eps * want.abs().max().item()
        bound = 2 * max_error(eager[name], want) + step
        assert max_error(ours[name], want) <= bound, name


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("level_rows", LEVELS, ids=str)
def test_outputs_and_gradients_match_the_float64_reference(
    level_rows: tuple[int, ...],
    channels: tuple[int, int],
    activation: str | None,
    place: tuple[str, torch.dtype],
) -> None:
    inputs = make(level_rows, channels, *place)
    options = {"activation": activation}
    exact = run(conv1x1_reference, in_float64(inputs), level_rows, **options)
    eager = run(conv1x1_reference, inputs, level_rows, **options)
    assert_close(run(conv1x1, inputs, level_rows, **options, backend="triton"), eager, exact)


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("statistics", [True, False])
def test_with_nothing_pending_it_is_a_matrix_product(
    place: tuple[str, torch.dtype], statistics: bool
) -> None:
    level_rows = (70, 9)
    inputs = make(level_rows, (65, 24), *place, pending=False)
    options = {"statistics": statistics}
    exact = run(conv1x1_reference, in_float64(inputs), level_rows, **options)
    eager = run(conv1x1_reference, inputs, level_rows, **options)
    ours = run(conv1x1, inputs, level_rows, **options, backend="triton")
    assert_close(ours, eager, exact)
    assert ("mean" in ours) is statistics


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_statistics_survive_a_mean_of_many_deviations(device: str) -> None:
    level_rows = (300, 40)
    inputs = make(level_rows, (8, 8), device, pending=False)
    inputs["x"][:, 0] = 1.0
    inputs["weight"][:, 0] = 1e4  # a constant on top of deviations of about 1
    y, mean, var = conv1x1(**inputs, level_rows=level_rows, backend="triton")
    for level, rows in enumerate(y.split(level_rows)):  # of what is stored, not of its rounding
        exact = torch.var_mean(rows.double(), dim=0, correction=0)
        eager = torch.var_mean(rows, dim=0, correction=0)
        for ours, same, want in zip((var[level], mean[level]), eager, exact, strict=True):
            step = torch.finfo(torch.float32).eps * want.abs().max().item()
            assert max_error(ours, want) <= 2 * max_error(same, want) + step


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_two_of_them_hold_a_whole_training_batch_norm(device: str, activation: str | None) -> None:
    level_rows, banks, eps = (90, 33, 8), (1, 0, 1), 1e-5
    first = make(level_rows, (12, 20), device, pending=False)
    second = make(level_rows, (20, 9), device, pending=False)["weight"]
    generator = torch.Generator().manual_seed(1)
    gamma = (torch.rand(2, 20, generator=generator) + 0.5).to(device)
    beta = torch.randn(2, 20, generator=generator).to(device)

    def deferred(x: Tensor, w1: Tensor, w2: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y, mean, var = conv1x1(x, w1, level_rows, backend="triton")
        scale = gamma[list(banks)] * (var + eps).rsqrt()
        pending = {"center": mean, "scale": scale, "shift": beta[list(banks)].contiguous()}
        options = {"activation": activation, "statistics": False, "backend": "triton"}
        return conv1x1(y, w2, level_rows, **pending, **options).y

    def by_the_book(x: Tensor, w1: Tensor, w2: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        running = torch.zeros_like(gamma), torch.ones_like(gamma)
        count = torch.zeros(2, dtype=torch.int64, device=device)
        z = switchable_bn_act_reference(
            x @ w1.t(),
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
        return z @ w2.t()

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
    level_rows = (8, 3)
    inputs = make(level_rows, (5, 6), device)
    x, weight, *pending = (tensor.requires_grad_() for tensor in inputs.values())
    fwd = torch.ops.rsfast.conv1x1_fwd.default
    torch.library.opcheck(fwd, (x, weight, *pending, level_rows, "relu", True))
    torch.library.opcheck(fwd, (x, weight, None, None, None, level_rows, None, False))
    with torch.no_grad():
        y, mean, _ = fwd(x, weight, *pending, level_rows, "relu", True)
        grads = torch.ones_like(y), torch.ones_like(mean), None
        x, weight, *pending = (tensor.detach() for tensor in (x, weight, *pending))
        arguments = x, weight, y, mean, *pending, level_rows, "relu"
        torch.library.opcheck(torch.ops.rsfast.conv1x1_bwd.default, (*grads, *arguments))


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_repeated_runs_give_the_same_bits(place: tuple[str, torch.dtype]) -> None:
    level_rows = (90, 40)
    inputs = make(level_rows, (24, 40), *place)
    one, other = (
        run(conv1x1, inputs, level_rows, activation="relu", backend="triton") for _ in range(2)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of"),
        ({"x": torch.zeros(14, 4).double()}, "x must be float16, bfloat16 or float32"),
        ({"x": torch.zeros(4, 14).t()}, "x must be contiguous"),
        ({"weight": torch.zeros(3, 5)}, r"weight must be \[C_out, 4\]"),
        ({"weight": torch.zeros(4, 3).t()}, "weight must be contiguous"),
        ({"level_rows": (14, 0)}, "level_rows must be 1 to 8 counts of at least 1"),
        ({"level_rows": (13,)}, "level_rows must add up to the 14 rows"),
        ({"scale": None}, "scale must come with center, scale and shift, got None"),
        ({"shift": torch.zeros(1, 4)}, r"shift must be \[2, 4\]"),
        ({"center": torch.zeros(2, 4).double()}, "center must be contiguous torch.float32"),
        ({"activation": "gelu"}, "activation must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    pending = {name: torch.ones(2, 4) for name in ("center", "scale", "shift")}
    arguments = {"x": torch.zeros(14, 4), "weight": torch.zeros(3, 4), "level_rows": (12, 2)}
    with pytest.raises(ValueError, match=message):
        conv1x1(**{**arguments, **pending, "backend": "triton", **change})


def test_an_activation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="activation must be None where nothing is pending"):
        conv1x1(torch.zeros(4, 4), torch.zeros(3, 4), (4,), activation="relu")


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    LEVEL_ROWS = (64 * 49, 64 * 9)

    def run(self, device: str) -> dict[str, Tensor]:
        inputs = make(self.LEVEL_ROWS, (256, 512), device, torch.bfloat16)
        return run(conv1x1, inputs, self.LEVEL_ROWS, activation="relu", backend="triton")

    def test_another_stream_gives_the_same_bits(self, device: str) -> None:
        here, there = self.run(device), on_another_stream(lambda: self.run(device))
        assert all(torch.equal(here[name], there[name]) for name in here)

    def test_the_host_never_waits_and_a_graph_captures_it(self, device: str) -> None:
        inputs = make(self.LEVEL_ROWS, (256, 512), device, torch.bfloat16)
        x, weight, rest = inputs["x"], inputs["weight"], _rest(inputs)
        options = {**rest, "activation": "relu", "backend": "triton"}
        y, mean, var = conv1x1(x, weight, self.LEVEL_ROWS, **options)
        captured = capture_without_host_sync(lambda: conv1x1(x, weight, self.LEVEL_ROWS, **options))
        for ours, want in zip(captured, (y, mean, var), strict=True):
            assert torch.equal(ours, want)
