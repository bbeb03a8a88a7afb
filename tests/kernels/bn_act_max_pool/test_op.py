"""Batch norm, activation and max pooling in one pass, against float64.

Without a CUDA device the kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.support.inputs import make_bn_inputs
from bn_helpers import STATE
from kernel_helpers import (
    CPU_OR_GPU,
    GPU_ONLY,
    PLACES,
    capture_without_host_sync,
    max_error,
    on_another_stream,
    to_float64,
)
from rsfast.kernels import bn_act_max_pool, bn_act_max_pool_reference, switchable_bn_act
from sampling import pairwise

EPS = 1e-5
NAMES = ("x", "weight", "bias", *STATE)
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
    rows = [num_images * h * w for h, w in sizes]
    options = {"device": device, "dtype": dtype, "shift": 0.5}
    inputs = make_bn_inputs(rows, channels, 3, **options)
    generator = torch.Generator().manual_seed(1)
    inputs["weight"].copy_(torch.randn(3, channels, generator=generator))  # of either sign
    inputs["weight"][:, 1] = 0.0  # a gamma that makes all pixels equal
    return {name: t for name, t in inputs.items() if name not in ("dy", "residual")}


def run(
    function: Any, inputs: dict[str, Tensor], maps: tuple[Any, ...], **options: Any
) -> dict[str, Tensor]:
    """The output, the gradients of x, weight and bias, and the state; `inputs` stay as they are."""
    inputs = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    y = function(*inputs.values(), *maps, eps=EPS, **options)
    # Numbers that every type has, so that all get the same gradient.
    dy = torch.arange(y.numel(), device=y.device).double().sin().view(y.shape).bfloat16()
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    results = {"y": y.detach(), **dict(zip(("dx", "dweight", "dbias"), grads, strict=True))}
    return results | {name: inputs[name] for name in STATE}


@pairwise(
    {
        "maps": MAPS,
        "channels": [3, 65],
        "activation": [None, "relu", "relu6"],
        "training": [pytest.param(True, id="train"), pytest.param(False, id="eval")],
        "place": PLACES,
    },
    indirect=["place"],
)
def test_output_gradients_and_state_match_pytorch(
    maps: tuple[Any, ...],
    channels: int,
    activation: str | None,
    training: bool,
    place: tuple[str, torch.dtype],
) -> None:
    inputs, options = make(maps, channels, *place), {"activation": activation, "training": training}
    exact = run(bn_act_max_pool_reference, to_float64(inputs), maps, **options)
    eager = run(bn_act_max_pool_reference, inputs, maps, **options)
    ours = run(bn_act_max_pool, inputs, maps, **options, backend="triton")
    for name, want in exact.items():
        if name == "num_batches_tracked":
            assert torch.equal(ours[name], want)
            continue
        step = torch.finfo(ours[name].dtype).eps * want.abs().max().clamp_min(1.0).item()
        # PyTorch compares after rounding: equals that it makes misplace whole gradients of x.
        bound = 2 * max_error(eager[name], want) * (name != "dx") + 2 * step
        assert ours[name].dtype == eager[name].dtype
        assert max_error(ours[name], want) <= bound, name


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_programs_with_several_tiles_match_pytorch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = pytest.importorskip("rsfast.kernels.common.tiles", reason="Triton is not installed")
    monkeypatch.setattr(tiles, "MULTIPROCESSORS", 2)
    maps = (((33, 30), (9, 7)), 2, (2, 0))
    inputs, options = make(maps, 3, device, torch.float32), {"training": True}
    exact = run(bn_act_max_pool_reference, to_float64(inputs), maps, **options)
    ours = run(bn_act_max_pool, inputs, maps, **options, backend="triton")
    for name in ("y", "dx", "dweight", "dbias"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_statistics_are_tracked_as_without_the_pooling(device: str) -> None:
    sizes, num_images, banks = MAPS[0]
    inputs = make(MAPS[0], 5, device, torch.float32)
    rows = [num_images * h * w for h, w in sizes]
    ours = run(bn_act_max_pool, inputs, MAPS[0], training=True, backend="triton")
    switchable_bn_act(*inputs.values(), rows, banks, training=True, backend="triton")  # in place
    for name in STATE:
        assert torch.equal(ours[name], inputs[name])


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_backend_cuda_is_that_of_the_triton_kernels(device: str) -> None:
    inputs = make(MAPS[2], 5, device, torch.float32)
    ours, want = (
        run(bn_act_max_pool, inputs, MAPS[2], training=True, backend=backend)
        for backend in ("cuda", "triton")
    )
    assert all(torch.equal(ours[name], want[name]) for name in want)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_synced_statistics_are_those_of_all_ranks(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two ranks with the same rows: every sum doubles, every mean stays.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    inputs = make(MAPS[0], 5, device, torch.float32)
    options = {"training": True, "synced": True}
    want = run(bn_act_max_pool_reference, to_float64(inputs), MAPS[0], **options)
    ours = run(bn_act_max_pool, inputs, MAPS[0], **options, backend="triton")
    for name, tensor in want.items():
        torch.testing.assert_close(ours[name].to(tensor.dtype), tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_the_first_of_equal_pixels_gets_the_gradient(device: str) -> None:
    maps = (((5, 4),), 1, (0,))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 4, (20, 3), generator=generator).float().to(device)
    ones, zeros = torch.ones(1, 3, device=device), torch.zeros(1, 3, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    inputs = dict(zip(NAMES, (x, ones, zeros, zeros, ones - EPS, count), strict=True))
    ours = run(bn_act_max_pool, inputs, maps, backend="triton")["dx"]
    image = x.view(1, 5, 4, 3).permute(0, 3, 1, 2).requires_grad_()
    y = F.max_pool2d(image, 3, 2, 1)
    dy = torch.arange(y.numel(), device=device).double().sin().bfloat16().float()
    (dz,) = torch.autograd.grad(y, image, dy.view(1, 3, 2, 3).permute(0, 3, 1, 2))
    torch.testing.assert_close(ours, dz.permute(0, 2, 3, 1).reshape(20, 3))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_what_is_not_a_number_is_not_lost(device: str) -> None:
    maps = (((4, 4),), 1, (0,))
    inputs = make(maps, 3, device, torch.float32)
    inputs["x"][5, 1] = float("nan")  # row 1, column 1: in all four windows
    y = bn_act_max_pool(*inputs.values(), *maps, eps=EPS, backend="triton")
    assert y[:, 1].isnan().all()
    assert not y[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("batch", [True, False], ids=["train", "eval"])
def test_operators_pass_opcheck(batch: bool, device: str) -> None:
    sizes, num_images, banks = maps = (((3, 2), (1, 1)), 1, (1, 0))
    inputs = make(maps, 5, device, torch.float32)
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    settings = {"heights": heights, "widths": widths, "num_images": num_images, "banks": banks}
    settings |= {"batch_statistics": batch, "eps": EPS}
    forward_settings = {**settings, "activation": "relu"}
    names = ("x", "running_mean", "running_var", "weight", "bias")
    x, *affine = (inputs[name] for name in names)
    ops = torch.ops.rsfast
    y, largest = ops.bn_act_max_pool_fwd(x, *affine, **forward_settings)
    torch.library.opcheck(ops.bn_act_max_pool_bwd.default, (y, largest, x, *affine), settings)
    for name in ("x", "weight", "bias"):
        inputs[name].requires_grad_()
    torch.library.opcheck(ops.bn_act_max_pool_fwd.default, (x, *affine), forward_settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cudnn"}, "backend must be one of"),
        ({"x": torch.zeros(20, 4).double()}, "x must be float16, bfloat16 or float32"),
        ({"sizes": ((4, 4), (2, 1))}, "level_rows must add up to the 20 rows"),
        ({"running_mean": torch.zeros(1, 4)}, r"running_mean must be \[3, 4\]"),
        (
            {"running_var": torch.ones(3, 4).double()},
            "running_var must be contiguous torch.float32",
        ),
        ({"banks": (0, 3)}, "banks must name one of 3 banks"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"activation": "silu"}, r"activation must be one of \[None, 'relu', 'relu6'\]"),
        ({"activation": "hardswish", "backend": "torch"}, "activation must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    inputs = make((((4, 4), (2, 2)), 1, (0, 2)), 4, "cpu", torch.float32)
    maps = {"sizes": ((4, 4), (2, 2)), "num_images": 1, "banks": (0, 2), "backend": "triton"}
    with pytest.raises(ValueError, match=message):
        bn_act_max_pool(**{**inputs, **maps, **change})


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    MAPS = (((112, 112), (48, 48)), 16, (0, 1))

    def run(self, device: str) -> dict[str, Tensor]:
        inputs = make(self.MAPS, 64, device, torch.bfloat16)
        return run(bn_act_max_pool, inputs, self.MAPS, training=True, backend="triton")

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
        inputs = make(self.MAPS, 64, device, torch.bfloat16)
        arguments = *inputs.values(), *self.MAPS
        options = {"training": True, "backend": "triton"}
        y = bn_act_max_pool(*arguments, **options)
        captured = capture_without_host_sync(lambda: bn_act_max_pool(*arguments, **options))
        assert torch.equal(captured, y)
