"""Subsampling of packed rows: the Triton kernels and the reference, against slices in float64.

Without a CUDA device the kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_helpers import (
    CPU_OR_GPU,
    GPU_ONLY,
    PLACES,
    capture_without_host_sync,
    on_another_stream,
)
from rsfast.kernels import (
    conv2d_sizes,
    subsample,
    subsample_gradient,
    subsample_reference,
)
from rsfast.kernels.common.levels import images_of_levels

FWD = torch.ops.rsfast.subsample_fwd
BWD = torch.ops.rsfast.subsample_bwd
ADD = torch.ops.rsfast.subsample_add
SIZES = ((7, 5), (4, 4), (3, 1), (1, 2))


def make_rows(
    sizes: tuple[tuple[int, int], ...],
    num_images: int,
    channels: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = num_images * sum(h * w for h, w in sizes)
    return torch.randn(rows, channels, generator=generator).to(device, dtype)


def run(function: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """The rows, and the gradient of `x` for a dy of the same numbers in every dtype."""
    x = x.detach().requires_grad_()
    y = function(x, *args, **options)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


CASES = {
    "odd-sizes": (SIZES, 2, (2, 2), 3),
    "one-level": (((9, 9),), 3, (3, 2), 65),
    "single-pixels": (((1, 1), (1, 1)), 1, (2, 2), 1),
    "a-line-longer-than-a-tile": (((2, 70),), 1, (2, 2), 65),
    "half-of-it-longer-too": (((1, 140),), 1, (1, 2), 64),
    "strides-beyond-the-maps": (((4, 2), (3, 3)), 2, (5, 4), 24),
    "lines-only": (SIZES, 1, (3, 1), 130),
    "columns-only": (SIZES, 1, (1, 3), 5),
    "eight-levels": (((3, 2),) * 8, 1, (2, 2), 3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_rows_and_gradient_are_bit_for_bit_those_of_the_reference(
    place: tuple[str, torch.dtype], case: tuple[Any, ...]
) -> None:
    sizes, num_images, stride, channels = case
    x = make_rows(sizes, num_images, channels, *place)
    exact = run(subsample_reference, x.double(), sizes, num_images, stride)
    ours = run(subsample, x, sizes, num_images, stride, backend="triton")
    for value, want in zip(ours, exact, strict=True):
        assert value.dtype == x.dtype
        assert torch.equal(value, want.to(value.dtype))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_a_gradient_is_added_to_another_one_where_pixels_were_read(
    place: tuple[str, torch.dtype], case: tuple[Any, ...]
) -> None:
    sizes, num_images, stride, channels = case
    other = make_rows(sizes, num_images, channels, *place)
    dy = make_rows(conv2d_sizes(sizes, 1, stride), num_images, channels, *place).flip(0)
    maps = sizes, num_images, stride
    dx = subsample_gradient(dy, *maps, backend="triton")
    added = other.clone()
    assert subsample_gradient(dy, *maps, add_to=added, backend="triton") is added
    assert torch.equal(added, other + dx)
    for add_to, want in ((None, dx), (other.clone(), added)):
        assert torch.equal(subsample_gradient(dy, *maps, add_to=add_to), want)


@pytest.mark.parametrize("stride", [2, (3, 1), [1, 2]], ids=str)
def test_the_reference_takes_what_a_1x1_convolution_of_each_level_reads(stride: Any) -> None:
    x = make_rows(SIZES, 2, 4, dtype=torch.float64)
    one = torch.eye(4, dtype=torch.float64)[:, :, None, None]

    def convolved(x: Tensor) -> Tensor:
        levels = [F.conv2d(v, one, None, stride) for v in images_of_levels(x, SIZES, 2)]
        return torch.cat([v.permute(0, 2, 3, 1).reshape(-1, 4) for v in levels])

    ours, want = run(subsample, x, SIZES, 2, stride), run(convolved, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))
    sizes = conv2d_sizes(SIZES, 1, stride)
    assert len(ours[0]) == 2 * sum(h * w for h, w in sizes)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_operators_pass_opcheck(device: str) -> None:
    heights, widths = zip(*SIZES, strict=True)
    maps = heights, widths, 2, (2, 3)
    x = make_rows(SIZES, 2, 5, device).requires_grad_()
    torch.library.opcheck(FWD.default, (x, *maps))
    dy = FWD(x, *maps).detach()
    torch.library.opcheck(BWD.default, (dy, *maps))
    torch.library.opcheck(ADD.default, (dy, x.detach(), *maps))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_whole_graph_compiles(device: str) -> None:
    x = make_rows(SIZES, 2, 5, device)
    compiled = torch.compile(subsample, backend="aot_eager", fullgraph=True)
    ours = run(compiled, x, SIZES, 2, (2, 2), backend="triton")
    eager = run(subsample, x, SIZES, 2, (2, 2), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_an_upstream_gradient_without_strides_is_understood(device: str) -> None:
    x = make_rows(SIZES, 2, 5, device).requires_grad_()
    (dx,) = torch.autograd.grad(subsample(x, SIZES, 2, 2, backend="triton").sum(), x)
    (want,) = torch.autograd.grad(subsample_reference(x, SIZES, 2, 2).sum(), x)
    assert torch.equal(dx, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cudnn"}, "backend must be one of"),
        ({"x": torch.zeros(14, 4).double()}, "x must be float16, bfloat16 or float32"),
        ({"x": torch.zeros(4, 14).t()}, "x must be contiguous"),
        ({"sizes": ((2, 3),)}, "sizes must add up to the 14 rows of x for 2 images"),
        ({"num_images": 1}, "sizes must add up to the 14 rows of x for 1 images"),
        ({"stride": (2, 0)}, "stride must be an int or two, at least 1"),
        ({"x": torch.zeros(18, 4), "sizes": ((1, 1),) * 9}, "level_rows must be 1 to 8 counts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(14, 4), "sizes": ((2, 3), (1, 1)), "num_images": 2, "stride": 2}
    with pytest.raises(ValueError, match=message):
        subsample(**{**arguments, "backend": "triton", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.zeros(5, 4)}, "sizes must add up to the 5 rows of dy for 2 images"),
        ({"add_to": torch.zeros(13, 4)}, "sizes must add up to the 13 rows of add_to"),
        ({"add_to": torch.zeros(4, 14).t()}, "add_to must be contiguous"),
        ({"add_to": torch.zeros(14, 4).half()}, "add_to must be contiguous torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_gradients_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"dy": torch.zeros(6, 4), "sizes": ((2, 3), (1, 1)), "num_images": 2, "stride": 2}
    with pytest.raises(ValueError, match=message):
        subsample_gradient(**{**arguments, "backend": "triton", **change})


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    SIZES = ((28, 28), (12, 12))

    def run(self, device: str) -> list[Tensor]:
        x = make_rows(self.SIZES, 64, 256, device, torch.bfloat16)
        return run(subsample, x, self.SIZES, 64, 2, backend="triton")

    def test_another_stream_gives_the_same_bits(self, device: str) -> None:
        here, there = self.run(device), on_another_stream(lambda: self.run(device))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))

    def test_the_host_never_waits_and_a_graph_captures_it(self, device: str) -> None:
        x = make_rows(self.SIZES, 64, 256, device, torch.bfloat16)
        y = subsample(x, self.SIZES, 64, 2, backend="triton")
        captured = capture_without_host_sync(
            lambda: subsample(x, self.SIZES, 64, 2, backend="triton")
        )
        assert torch.equal(captured, y)
