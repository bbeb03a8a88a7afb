"""Batch norm, activation and max pooling in one pass, against float64.

Without a CUDA device the kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

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
    max_error,
    on_another_stream,
    to_float64,
)
from rsfast.kernels import bn_act_max_pool, bn_act_max_pool_reference

EPS = 1e-5
# Even and odd maps, thinner than a window, one pixel; levels that share a set.
MAPS = [
    (((8, 6), (5, 7), (3, 1)), 2, (1, 0, 1)),
    (((1, 1),), 1, (0,)),
    (((2, 2), (9, 4)), 3, (0, 2)),
]


def make(
    maps: tuple[Any, ...], channels: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    sizes, num_images, _ = maps
    generator = torch.Generator().manual_seed(0)
    rows = num_images * sum(h * w for h, w in sizes)
    x = (torch.randn(rows, channels, generator=generator) + 0.5).to(device, dtype)
    sets = torch.randn(2, 3, channels, generator=generator).to(device)
    sets[0, :, 1] = 0.0  # a gamma that makes all pixels equal
    counts = [num_images * h * w for h, w in sizes]
    moments = [torch.var_mean(v.float(), 0, correction=0) for v in x.split(counts)]
    var, mean = (torch.stack(part) for part in zip(*moments, strict=True))
    return {"x": x, "weight": sets[0], "bias": sets[1], "mean": mean, "var": var}


def run(
    function: Any, tensors: dict[str, Tensor], maps: tuple[Any, ...], **options: Any
) -> dict[str, Tensor]:
    """The output, and the gradients of x, weight and bias."""
    leaves = {n: tensors[n].detach().requires_grad_() for n in ("x", "weight", "bias")}
    y = function(*leaves.values(), tensors["mean"], tensors["var"], *maps, eps=EPS, **options)
    steps = torch.arange(y.numel(), device=y.device).double().sin().view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), steps)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("channels", [3, 65])
@pytest.mark.parametrize("maps", MAPS, ids=str)
def test_output_and_gradients_match_pytorch(
    maps: tuple[Any, ...], channels: int, activation: str | None, place: tuple[str, torch.dtype]
) -> None:
    tensors, options = make(maps, channels, *place), {"activation": activation}
    exact = run(bn_act_max_pool_reference, to_float64(tensors), maps, **options)
    eager = run(bn_act_max_pool_reference, tensors, maps, **options)
    ours = run(bn_act_max_pool, tensors, maps, **options, backend="triton")
    for name, want in exact.items():
        step = torch.finfo(ours[name].dtype).eps * want.abs().max().clamp_min(1.0).item()
        # PyTorch compares after rounding: equals that it makes misplace whole gradients of x.
        bound = 2 * max_error(eager[name], exact[name]) * (name != "x") + 2 * step
        assert ours[name].dtype == eager[name].dtype
        assert max_error(ours[name], want) <= bound, name


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_the_first_of_equal_pixels_gets_the_gradient(device: str) -> None:
    maps = (((5, 4),), 1, (0,))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 4, (20, 3), generator=generator).float().to(device)
    ones, zeros = torch.ones(1, 3, device=device), torch.zeros(1, 3, device=device)
    tensors = {"x": x, "weight": ones, "bias": zeros, "mean": zeros, "var": ones - EPS}
    ours = run(bn_act_max_pool, tensors, maps, backend="triton")["x"]
    image = x.view(1, 5, 4, 3).permute(0, 3, 1, 2).requires_grad_()
    y = F.max_pool2d(image, 3, 2, 1)
    steps = torch.arange(y.numel(), device=device).double().sin().float()
    (dz,) = torch.autograd.grad(y, image, steps.view(1, 3, 2, 3).permute(0, 3, 1, 2))
    dz = dz.permute(0, 2, 3, 1).reshape(20, 3)
    torch.testing.assert_close(ours, dz - dz.mean(0) - x * (dz * x).mean(0))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_what_is_not_a_number_is_not_lost(device: str) -> None:
    maps = (((4, 4),), 1, (0,))
    tensors = make(maps, 3, device, torch.float32)
    tensors["x"][5, 1] = float("nan")  # row 1, column 1: in all four windows
    y = bn_act_max_pool(*tensors.values(), *maps, eps=EPS, backend="triton")
    assert y[:, 1].isnan().all()
    assert not y[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_operators_pass_opcheck(device: str) -> None:
    sizes, num_images, banks = MAPS[0]
    tensors = make(MAPS[0], 5, device, torch.float32)
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    settings = heights, widths, num_images, banks, "relu", EPS
    leaves = [tensors[n].requires_grad_() for n in ("x", "weight", "bias")]
    moments = tensors["mean"], tensors["var"]
    ops = torch.ops.rsfast
    torch.library.opcheck(ops.bn_act_max_pool_fwd.default, (*leaves, *moments, *settings))
    with torch.no_grad():
        y, largest = ops.bn_act_max_pool_fwd(*leaves, *moments, *settings)
        leaves = [leaf.detach() for leaf in leaves]
        arguments = y, largest, *leaves, *moments, *settings
        torch.library.opcheck(ops.bn_act_max_pool_bwd.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of"),
        ({"x": torch.zeros(20, 4).double()}, "x must be float16, bfloat16 or float32"),
        ({"sizes": ((4, 4), (2, 1))}, "level_rows must add up to the 20 rows"),
        ({"mean": torch.zeros(1, 4)}, r"mean must be \[2, 4\], a row per level"),
        ({"var": torch.zeros(2, 4).double()}, "var must be contiguous torch.float32"),
        ({"banks": (0, 3)}, "banks must name one of 3 sets"),
        ({"activation": "gelu"}, "activation must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(20, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3, 4)}
    arguments |= {"mean": torch.zeros(2, 4), "var": torch.ones(2, 4)}
    arguments |= {"sizes": ((4, 4), (2, 2)), "num_images": 1, "banks": (0, 2)}
    with pytest.raises(ValueError, match=message):
        bn_act_max_pool(**{**arguments, "backend": "triton", **change})


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    MAPS = (((112, 112), (48, 48)), 16, (0, 1))

    def run(self, device: str) -> dict[str, Tensor]:
        tensors = make(self.MAPS, 64, device, torch.bfloat16)
        return run(bn_act_max_pool, tensors, self.MAPS, backend="triton")

    def test_another_stream_and_another_run_give_the_same_bits(self, device: str) -> None:
        here, again, there = (
            self.run(device),
            self.run(device),
            on_another_stream(lambda: self.run(device)),
        )
        for name, want in here.items():
            assert torch.equal(again[name], want)
            assert torch.equal(there[name], want)

    def test_the_host_never_waits_and_a_graph_captures_it(self, device: str) -> None:
        tensors = make(self.MAPS, 64, device, torch.bfloat16)
        arguments = *tensors.values(), *self.MAPS
        y = bn_act_max_pool(*arguments, backend="triton")
        captured = capture_without_host_sync(lambda: bn_act_max_pool(*arguments, backend="triton"))
        assert torch.equal(captured, y)
