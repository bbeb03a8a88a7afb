"""The Triton kernels of global average pooling, against the float64 reference.

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
from rsfast.kernels import global_avg_pool, global_avg_pool_reference
from sampling import pairwise

FWD = torch.ops.rsfast.global_avg_pool_fwd
BWD = torch.ops.rsfast.global_avg_pool_bwd


def make_rows(
    level_rows: tuple[int, ...],
    channels: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    shift: float = 0.0,
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(level_rows), channels, generator=generator) + shift
    return rows.to(device, dtype)


def run(
    function: Any, x: Tensor, level_rows: tuple[int, ...], num_images: int, **options: Any
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x, level_rows, num_images, **options)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return y.detach(), *torch.autograd.grad(y, x, dy)


@pairwise(
    {
        "level_rows, num_images": [
            ((49, 36, 9), 1),
            ((3 * 144, 3), 3),
            ((2,), 2),
            ((8, 6, 4, 2, 2, 2, 2, 2), 2),
        ],
        "channels": [1, 3, 65, 2047],
        "place": PLACES,
    },
    indirect=["place"],
)
def test_output_and_gradient_match_the_float64_reference(
    level_rows: tuple[int, ...],
    num_images: int,
    channels: int,
    place: tuple[str, torch.dtype],
) -> None:
    x = make_rows(level_rows, channels, *place, shift=100.0)
    exact = run(global_avg_pool_reference, x.double(), level_rows, num_images)
    eager = run(global_avg_pool_reference, x, level_rows, num_images)
    ours = run(global_avg_pool, x, level_rows, num_images, backend="triton")
    for value, eager_value, want in zip(ours, eager, exact, strict=True):
        assert value.dtype == eager_value.dtype
        # One rounding of the result, and one of the float32 sum before it is divided.
        step = torch.finfo(value.dtype).eps + torch.finfo(torch.float32).eps
        bound = 2 * max_error(eager_value, want) + step * want.abs().max().item()
        assert max_error(value, want) <= bound


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_repeated_runs_give_the_same_bits(place: tuple[str, torch.dtype]) -> None:
    x = make_rows((98, 18), 65, *place)
    one, other = (run(global_avg_pool, x, (98, 18), 2, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_operators_pass_opcheck(device: str) -> None:
    x = make_rows((8, 2), 5, device).requires_grad_()
    torch.library.opcheck(FWD.default, (x, (8, 2), 2))
    torch.library.opcheck(BWD.default, (make_rows((4,), 5, device), (8, 2), 2))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_whole_graph_compiles(device: str) -> None:
    x = make_rows((8, 2), 5, device)
    compiled = torch.compile(global_avg_pool, backend="aot_eager", fullgraph=True)
    ours = run(compiled, x, (8, 2), 2, backend="triton")
    eager = run(global_avg_pool, x, (8, 2), 2, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_an_upstream_gradient_without_strides_is_understood(device: str) -> None:
    x = make_rows((8, 2), 5, device).requires_grad_()
    (dx,) = torch.autograd.grad(global_avg_pool(x, (8, 2), 2, backend="triton").sum(), x)
    assert torch.equal(dx[:8], torch.full_like(dx[:8], 0.25))
    assert torch.equal(dx[8:], torch.ones_like(dx[8:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cudnn"}, "backend must be one of"),
        ({"x": torch.zeros(14, 4).double()}, "x must be float16, bfloat16 or float32"),
        ({"x": torch.zeros(4, 14).t()}, "x must be contiguous"),
        ({"level_rows": (14, 0)}, "level_rows must be 1 to 8 counts of at least 1"),
        ({"level_rows": (13, 1)}, "level_rows must be multiples of 2 images"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"x": torch.zeros(18, 4), "level_rows": (2,) * 9}, "level_rows must be 1 to 8 counts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(14, 4), "level_rows": (12, 2), "num_images": 2}
    with pytest.raises(ValueError, match=message):
        global_avg_pool(**{**arguments, "backend": "triton", **change})


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    def run(self, device: str) -> tuple[Tensor, Tensor]:
        level_rows = (64 * 49, 64 * 9)
        x = make_rows(level_rows, 2048, device, torch.bfloat16)
        return run(global_avg_pool, x, level_rows, 64, backend="triton")

    def test_another_stream_gives_the_same_bits(self, device: str) -> None:
        here, there = self.run(device), on_another_stream(lambda: self.run(device))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))

    def test_the_host_never_waits_and_a_graph_captures_it(self, device: str) -> None:
        level_rows = (64 * 49, 64 * 9)
        x = make_rows(level_rows, 2048, device, torch.bfloat16)
        y = global_avg_pool(x, level_rows, 64, backend="triton")
        captured = capture_without_host_sync(
            lambda: global_avg_pool(x, level_rows, 64, backend="triton")
        )
        assert torch.equal(captured, y)
