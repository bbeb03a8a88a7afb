"""The pieces of deferred batch norm, against float64.

Without a CUDA device the kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bn_helpers import float32_operands
from kernel_helpers import (
    CPU_OR_GPU,
    GPU_ONLY,
    PLACES,
    assert_close,
    capture_without_host_sync,
    to_float64,
)
from rsfast.kernels import apply_bn_act, batch_moments, bn_affine, with_moments_gradient
from rsfast.kernels import switchable_bn_act_reference as reference

LEVELS, BANKS = (130, 65, 1, 3), (2, 0, 2, 1)  # two levels share a set, and one has none
NUM_BANKS, CHANNELS, EPS = 4, 65, 1e-5
NAMES = ("x", "residual", "weight", "bias")


def make(device: str, dtype: torch.dtype, mean: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, sum(LEVELS), CHANNELS, generator=generator)
    sets = torch.randn(2, NUM_BANKS, CHANNELS, generator=generator)
    tensors = {"x": rows[0] + mean, "residual": rows[1]}
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    return tensors | {"weight": sets[0].to(device), "bias": sets[1].to(device)}


def running(like: Tensor) -> dict[str, Tensor]:
    return {
        "running_mean": torch.zeros_like(like),
        "running_var": torch.ones_like(like),
        "num_batches_tracked": torch.zeros(len(like), dtype=torch.int64, device=like.device),
    }


def whole(tensors: dict[str, Tensor], state: dict[str, Tensor], **options: Any) -> Tensor:
    """Batch norm in one piece, by the book."""
    x, residual, weight, bias = (tensors[name] for name in NAMES)
    return reference(
        x,
        weight,
        bias,
        *state.values(),
        LEVELS,
        BANKS,
        residual=residual,
        training=True,
        eps=EPS,
        **options,
    )


def gradients(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and what `function` gives to each tensor."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = function(leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream(y))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def upstream(y: Tensor) -> Tensor:
    """A gradient of y."""
    steps = torch.linspace(-3, 3, y.numel(), dtype=torch.float64, device=y.device)
    return steps.sin().view(y.shape).to(y.dtype)


def sizes(tensors: dict[str, Tensor]) -> dict[str, float]:
    """What gradients are sums of; see float32_operands."""
    inputs = {**tensors, **running(tensors["weight"]), "dy": upstream(tensors["x"])}
    options = {"level_rows": LEVELS, "banks": BANKS, "training": True}
    return {name.removeprefix("d"): n for name, n in float32_operands(inputs, options).items()}


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("known", [False, True])
def test_statistics_move_as_those_of_a_whole_batch_norm(
    place: tuple[str, torch.dtype], known: bool
) -> None:
    tensors = make(*place)
    exact, eager, ours = (running(tensors["weight"]) for _ in range(3))
    exact = to_float64(exact)
    for factor in (1.0, 0.5):  # two steps
        scaled = tensors | {"x": tensors["x"] * factor}
        whole(to_float64(scaled), exact)
        whole(scaled, eager)
        moments = [torch.var_mean(v.float(), 0, correction=0) for v in scaled["x"].split(LEVELS)]
        var, mean = (torch.stack(part) for part in zip(*moments, strict=True))
        given = {"known": (mean, var) if known else None, "backend": "triton"}
        found = batch_moments(scaled["x"], *ours.values(), LEVELS, BANKS, **given)
        torch.testing.assert_close(found, (mean, var))
    assert torch.equal(ours["num_batches_tracked"], exact["num_batches_tracked"])
    counted = {"num_batches_tracked"}
    parts = ({k: v for k, v in s.items() if k not in counted} for s in (ours, eager, exact))
    assert_close(*parts)


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_known_moments_have_the_gradients_of_a_whole_batch_norm(
    place: tuple[str, torch.dtype], activation: str | None, residual: bool
) -> None:
    tensors = make(*place, mean=3.0)
    if not residual:
        del tensors["residual"]

    def by_the_book(leaves: dict[str, Tensor]) -> Tensor:
        leaves = {"residual": None, **leaves}
        return whole(leaves, running(leaves["weight"].detach()), activation=activation)

    def in_pieces(leaves: dict[str, Tensor]) -> Tensor:
        x, weight, bias = leaves["x"], leaves["weight"], leaves["bias"]
        options = {"backend": "triton"}
        moments = batch_moments(x, *running(weight.detach()).values(), LEVELS, BANKS, **options)
        options |= {"residual": leaves.get("residual"), "activation": activation, "eps": EPS}
        return apply_bn_act(x, weight, bias, *moments, LEVELS, BANKS, **options)

    exact, eager = gradients(by_the_book, to_float64(tensors)), gradients(by_the_book, tensors)
    assert_close(gradients(in_pieces, tensors), eager, exact, sizes(tensors))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_scale_shift_and_moments_pass_on_the_gradients_of_a_whole_batch_norm(
    place: tuple[str, torch.dtype], backend: str
) -> None:
    tensors = make(*place)
    del tensors["residual"]

    def by_the_book(leaves: dict[str, Tensor]) -> Tensor:
        return whole({"residual": None, **leaves}, running(leaves["weight"].detach()))

    def in_pieces(leaves: dict[str, Tensor]) -> Tensor:
        x, weight, bias = leaves["x"], leaves["weight"], leaves["bias"]
        options = {"backend": backend}
        moments = batch_moments(x, *running(weight.detach()).values(), LEVELS, BANKS, **options)
        x, mean, var = with_moments_gradient(x, *moments, LEVELS, **options)
        scale, shift = bn_affine(var, weight, bias, BANKS, eps=EPS, **options)
        parts = zip(x.to(mean.dtype).split(LEVELS), mean, scale, shift, strict=True)
        return torch.cat([(rows - m) * s + b for rows, m, s, b in parts]).to(x.dtype)

    exact, eager = gradients(by_the_book, to_float64(tensors)), gradients(by_the_book, tensors)
    ours = gradients(in_pieces, tensors)
    # What comes through the moments is added to scale * dy, which is rounded before; |dy| <= 1.
    var = torch.stack([v.double().var(0, correction=0) for v in tensors["x"].split(LEVELS)])
    scale = tensors["weight"].double()[list(BANKS)] * (var + EPS).rsqrt()
    found, at_best, want = (named.pop("x").double() for named in (ours, eager, exact))
    # PyTorch's CPU kernels add up in float64 and round once.
    bounds = (torch.finfo(place[1]).eps + 4 * torch.finfo(torch.float32).eps) * scale.abs()
    for level in zip(*(t.split(LEVELS) for t in (found, at_best, want)), bounds, strict=True):
        level_found, level_at_best, level_want, bound = level
        allowed = 2 * (level_at_best - level_want).abs().amax(0) + bound
        assert ((level_found - level_want).abs() <= allowed).all()
    assert_close(ours, eager, exact, sizes(tensors))


def test_pieces_of_plain_pytorch_are_exact() -> None:
    tensors = to_float64(make("cpu", torch.float32))

    def by_the_book(leaves: dict[str, Tensor]) -> Tensor:
        return whole(leaves, running(leaves["weight"].detach()), activation="relu")

    def in_pieces(leaves: dict[str, Tensor]) -> Tensor:
        x, residual, weight, bias = (leaves[name] for name in NAMES)
        moments = batch_moments(x, *running(weight.detach()).values(), LEVELS, BANKS)
        options = {"residual": residual, "activation": "relu", "eps": EPS}
        return apply_bn_act(x, weight, bias, *moments, LEVELS, BANKS, **options)

    exact, ours = gradients(by_the_book, tensors), gradients(in_pieces, tensors)
    for name, want in exact.items():
        torch.testing.assert_close(ours[name], want)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_operators_pass_opcheck(device: str) -> None:
    tensors = make(device, torch.float32)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    mean, var = torch.zeros(4, CHANNELS, device=device), torch.ones(4, CHANNELS, device=device)
    ops = torch.ops.rsfast
    arguments = mean, var, *running(weight).values(), LEVELS, BANKS, 0.1
    torch.library.opcheck(ops.move_running_statistics.default, arguments)
    torch.library.opcheck(ops.moments_bwd.default, (x, x, mean, mean, var, LEVELS))
    torch.library.opcheck(ops.bn_affine_bwd.default, (mean, var, var, weight, BANKS, EPS))
    leaves = (tensor.requires_grad_() for tensor in (var, weight, bias))
    torch.library.opcheck(ops.bn_affine_fwd.default, (*leaves, BANKS, EPS))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_input_is_named(backend: str) -> None:
    tensors = make("cpu", torch.float32)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    state, short = tuple(running(weight).values()), torch.zeros(3, CHANNELS)
    fitting = torch.zeros(4, CHANNELS)
    options = {"backend": backend}
    with pytest.raises(ValueError, match=r"mean must be \[4, 65\], a row per level"):
        batch_moments(x, *state, LEVELS, BANKS, known=(short, fitting), **options)
    with pytest.raises(ValueError, match="level_rows must add up to the 199 rows"):
        batch_moments(x, *state, (1, 2, 3, 4), BANKS, **options)
    with pytest.raises(ValueError, match=r"running_var must be \[4, 65\]: B sets as in running_m"):
        batch_moments(x, state[0], short, state[2], LEVELS, BANKS, **options)
    with pytest.raises(ValueError, match="banks must name some of 4 sets"):
        bn_affine(fitting, weight, bias, (0, 1, 2, 4), **options)
    with pytest.raises(ValueError, match=r"var must be \[4, 65\], a row per level"):
        bn_affine(short, weight, bias, BANKS, **options)
    with pytest.raises(ValueError, match=r"bias must be \[4, 65\] like weight"):
        bn_affine(fitting, weight, short, BANKS, **options)
    with pytest.raises(ValueError, match=r"var must be \[4, 65\]"):
        with_moments_gradient(x, fitting, short, LEVELS, **options)
    with pytest.raises(ValueError, match="level_rows must add up to the 199 rows"):
        with_moments_gradient(x, fitting, fitting, (1, 2, 3, 4), **options)
    with pytest.raises(ValueError, match="x must be contiguous"):
        with_moments_gradient(x.t().contiguous().t(), fitting, fitting, LEVELS, **options)
    moments = fitting, fitting
    with pytest.raises(ValueError, match="activation must be one of"):
        apply_bn_act(x, weight, bias, *moments, LEVELS, BANKS, activation="gelu", **options)


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
def test_the_host_never_waits_and_a_graph_captures_it(device: str) -> None:
    tensors = make(device, torch.bfloat16)
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    state, options = running(weight), {"backend": "triton"}

    def run() -> tuple[Tensor, ...]:
        moments = batch_moments(x, *state.values(), LEVELS, BANKS, **options)
        affine = bn_affine(moments[1], weight, bias, BANKS, **options)
        return *affine, apply_bn_act(x, weight, bias, *moments, LEVELS, BANKS, **options)

    with torch.no_grad():
        want = run()
        captured = capture_without_host_sync(run)
    for ours, other in zip(captured, want, strict=True):
        assert torch.equal(ours, other)
