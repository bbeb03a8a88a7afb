"""Convolution from packed rows into packed rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_helpers import CPU_OR_GPU, GPU_ONLY, PLACES, host_must_not_wait, max_error
from rsfast.kernels import conv2d, conv2d_reference
from rsfast.kernels.conv2d import _fwd

# name: (sizes, images, channels in and out, kernel, stride, groups)
CASES = {
    "stem-7x7-stride2": (((9, 8), (6, 6), (5, 3)), 2, 4, 8, 7, 2, 1),
    "3x3": (((8, 8), (6, 6), (3, 3)), 3, 16, 24, 3, 1, 1),
    "3x3-odd-channels-stride2": (((7, 7), (4, 5)), 2, 5, 3, 3, 2, 1),
    "depthwise": (((8, 8), (5, 5)), 2, 16, 16, 3, 1, 16),
    "depthwise-stride2": (((7, 7), (4, 4)), 2, 8, 8, 3, 2, 8),
    "two-groups-one-level": (((4, 4),), 2, 8, 4, 5, 1, 2),
    "one-pixel-one-image": (((1, 1), (1, 1)), 1, 8, 8, 3, 1, 1),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def make_inputs(
    case: tuple, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    sizes, num_images, c_in, c_out, k, _, groups = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_images * sum(h * w for h, w in sizes), c_in, generator=generator)
    weight = torch.randn(c_out, c_in // groups, k, k, generator=generator) / k
    weight = weight.contiguous(memory_format=torch.channels_last)
    return x.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_()


def run(function, x: Tensor, weight: Tensor, case: tuple) -> tuple[Tensor, ...]:
    """y, dx and dweight, for a dy of the same numbers in every dtype."""
    sizes, num_images, *_, stride, groups = case
    y = function(x, weight, sizes, num_images, stride, groups)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@cases
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_matches_float64_reference(place: tuple[str, torch.dtype], case: tuple) -> None:
    device, dtype = place
    inputs = make_inputs(case, dtype, device)
    exact = run(conv2d_reference, *(t.detach().double().requires_grad_() for t in inputs), case)
    eager = run(conv2d_reference, *inputs, case)
    for ours, theirs, want in zip(run(conv2d, *inputs, case), eager, exact, strict=True):
        bound = 2 * max_error(theirs, want) + torch.finfo(dtype).eps * want.abs().max()
        assert max_error(ours, want) <= bound


@cases
@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_passes_opcheck(device: str, case: tuple) -> None:
    sizes, num_images, *_, stride, groups = case
    heights, widths = zip(*sizes, strict=True)
    x, weight = make_inputs(case, device=device)
    torch.library.opcheck(_fwd, (x, weight, heights, widths, num_images, stride, groups))


@pytest.mark.parametrize("wanted", [0, 1], ids=["dx", "dweight"])
def test_only_what_is_wanted_gets_a_gradient(wanted: int) -> None:
    case = CASES["3x3"]
    exact = run(conv2d_reference, *make_inputs(case), case)[1 + wanted]
    inputs = make_inputs(case)
    inputs[1 - wanted].requires_grad_(False)
    y = conv2d(*inputs, case[0], case[1])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    torch.testing.assert_close(inputs[wanted].grad, exact)
    assert inputs[1 - wanted].grad is None


def test_gradient_of_a_sum_needs_no_strides() -> None:
    case = CASES["3x3"]
    x, weight = make_inputs(case)
    conv2d(x, weight, case[0], case[1]).sum().backward()
    ours, x.grad = x.grad, None
    conv2d_reference(x, weight, case[0], case[1]).sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_gradient_of_the_weight_lies_in_memory_like_the_weight() -> None:
    x, weight = make_inputs(CASES["3x3"])
    _, _, dweight = run(conv2d, x, weight, CASES["3x3"])
    assert weight.stride() == dweight.stride()
    assert dweight.is_contiguous(memory_format=torch.channels_last)


def test_levels_in_sixteen_bits_are_added_up_in_float32() -> None:
    # 1 from the first level and 2^-9 from each of the next four: bfloat16 has 8 bits, and adding
    # the small ones one at a time would lose them all.
    x = torch.tensor([1.0] + 4 * [2.0**-9], dtype=torch.bfloat16).view(5, 1)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).requires_grad_()
    conv2d(x, weight, ((1, 1),) * 5, 1).sum().backward()
    assert weight.grad is not None
    assert float(weight.grad) == 1.0 + 2.0**-7


def test_cudnn_takes_its_arguments_in_the_order_they_are_given() -> None:
    names = [a.name for a in torch.ops.aten.cudnn_convolution.out._schema.arguments]
    assert names == [
        *("self", "weight", "padding", "stride", "dilation", "groups"),
        *("benchmark", "deterministic", "allow_tf32", "out"),
    ]


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
def test_forward_copies_nothing_on_a_gpu(device: str) -> None:
    case = CASES["3x3"]
    x, weight = make_inputs(case, torch.float16, device)
    conv2d(x, weight, case[0], case[1])  # picks algorithms
    with host_must_not_wait(), torch.profiler.profile() as profile:
        conv2d(x, weight, case[0], case[1])
    names = {event.name for event in profile.events()}
    assert "aten::cudnn_convolution" in names
    assert not {"aten::copy_", "aten::cat", "aten::contiguous", "aten::clone"} & names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 16).t()}, "x must be contiguous"),
        ({"weight": torch.zeros(4, 8, 3, 3, dtype=torch.float64)}, "weight must be torch.float32"),
        ({"weight": torch.zeros(4, 8, 3, 1)}, "k, k. with k odd"),
        ({"weight": torch.zeros(4, 8, 2, 2)}, "k, k. with k odd"),
        ({"weight": torch.zeros(4, 3, 3, 3)}, "weight must fit 8 channels in 1 groups"),
        ({"sizes": ((2, 3),)}, "sizes must add up to the 16 rows"),
    ],
    ids=["layout", "dtype", "oblong", "even", "channels", "sizes"],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(16, 8), "weight": torch.zeros(4, 8, 3, 3), "sizes": ((4, 2),)}
    with pytest.raises(ValueError, match=message):
        conv2d(**(arguments | change), num_images=2)
