"""Convolution from packed rows into packed rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernel_helpers import CPU_OR_GPU, GPU_ONLY, PLACES, host_must_not_wait, max_error
from rsfast.kernels import conv2d, conv2d_reference
from rsfast.kernels.common.windows import geometry_of

FWD = torch.ops.rsfast.conv2d_fwd


class Case(NamedTuple):
    sizes: tuple[tuple[int, int], ...]
    num_images: int
    c_in: int
    c_out: int
    kernel: tuple[int, int]
    options: dict[str, Any]


CASES = {
    "stem-7x7-stride2": Case(
        ((9, 8), (6, 6), (5, 3)), 2, 4, 8, (7, 7), {"stride": 2, "padding": 3}
    ),
    "3x3": Case(((8, 8), (6, 6), (3, 3)), 3, 16, 24, (3, 3), {"padding": 1}),
    "3x3-odd-channels-stride2": Case(
        ((7, 7), (4, 5)), 2, 5, 3, (3, 3), {"stride": 2, "padding": 1}
    ),
    "depthwise": Case(((8, 8), (5, 5)), 2, 16, 16, (3, 3), {"padding": 1, "groups": 16}),
    "depthwise-stride2": Case(
        ((7, 7), (4, 4)), 2, 8, 8, (3, 3), {"stride": 2, "padding": 1, "groups": 8}
    ),
    "two-groups-one-level": Case(((4, 4),), 2, 8, 4, (5, 5), {"padding": 2, "groups": 2}),
    "one-pixel-one-image": Case(((1, 1), (1, 1)), 1, 8, 8, (3, 3), {"padding": 1}),
    "even-4x4-stride4": Case(((8, 8), (6, 5)), 2, 3, 8, (4, 4), {"stride": 4}),
    "oblong-1x7": Case(((7, 8), (3, 7)), 2, 8, 8, (1, 7), {"padding": (0, 3)}),
    "oblong-strides": Case(
        ((9, 7), (5, 6)), 2, 4, 6, (2, 3), {"stride": (1, 2), "padding": [1, 0]}
    ),
    "dilated": Case(((9, 9), (6, 7)), 2, 4, 6, (3, 3), {"padding": 2, "dilation": 2}),
    "dilated-unequally": Case(((9, 9), (6, 7)), 1, 4, 4, (3, 3), {"dilation": (2, 1)}),
    "1x1-stride2": Case(((5, 4), (2, 1)), 2, 8, 4, (1, 1), {"stride": 2}),
    "padding-beyond-the-kernel": Case(((3, 3),), 2, 4, 4, (1, 1), {"padding": 1}),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def make_inputs(
    case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = case.num_images * sum(h * w for h, w in case.sizes)
    x = torch.randn(rows, case.c_in, generator=generator)
    c_in = case.c_in // case.options.get("groups", 1)
    weight = torch.randn(case.c_out, c_in, *case.kernel, generator=generator) / case.kernel[1]
    weight = weight.contiguous(memory_format=torch.channels_last)
    return x.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_()


def run(
    function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor], case: Case
) -> tuple[Tensor, ...]:
    """y, dx and dweight, for a dy of the same numbers in every dtype."""
    y = function(*inputs, case.sizes, case.num_images, **case.options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


@cases
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_matches_float64_reference(place: tuple[str, torch.dtype], case: Case) -> None:
    device, dtype = place
    inputs = x, weight = make_inputs(case, dtype, device)
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = run(conv2d_reference, wide, case)
    eager = run(conv2d_reference, inputs, case)
    for ours, theirs, want in zip(run(conv2d, inputs, case), eager, exact, strict=True):
        assert ours.shape == want.shape
        bound = 2 * max_error(theirs, want) + torch.finfo(dtype).eps * want.abs().max().item()
        assert max_error(ours, want) <= bound


@pytest.mark.parametrize("name", CASES)
def test_input_gradients_of_stride_1_are_convolutions_written_in_place(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    op = importlib.import_module("rsfast.kernels.conv2d.op")
    written: list[int] = []

    def as_cudnn(x: Tensor, weight: Tensor, geometry: Any, groups: int, out: Tensor) -> None:
        assert weight.is_contiguous(memory_format=torch.channels_last)
        written.append(out.data_ptr())
        op._and_copy(x, weight, geometry, groups, out)

    monkeypatch.setattr(op, "_has_out", lambda x: True)
    monkeypatch.setattr(op, "_into_place", as_cudnn)
    inputs = make_inputs(case)
    exact = run(conv2d_reference, inputs, case)
    for ours, want in zip(run(conv2d, inputs, case), exact, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)
    in_place = "stride" not in case.options and name != "padding-beyond-the-kernel"
    assert len(written) == len(case.sizes) * (2 if in_place else 1)
    assert len(set(written)) == len(written)


@cases
@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_passes_opcheck(device: str, case: Case) -> None:
    heights, widths = zip(*case.sizes, strict=True)
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **case.options}
    groups = options.pop("groups")
    maps = {"heights": heights, "widths": widths, "num_images": case.num_images}
    geometry = geometry_of(**options)._asdict()
    inputs = make_inputs(case, device=device)
    torch.library.opcheck(FWD.default, inputs, {**maps, **geometry, "groups": groups})


@pytest.mark.parametrize("wanted", [0, 1], ids=["dx", "dweight"])
def test_only_what_is_wanted_gets_a_gradient(wanted: int) -> None:
    case = CASES["3x3"]
    exact = run(conv2d_reference, make_inputs(case), case)[1 + wanted]
    inputs = make_inputs(case)
    inputs[1 - wanted].requires_grad_(False)
    y = conv2d(*inputs, case.sizes, case.num_images, **case.options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    torch.testing.assert_close(inputs[wanted].grad, exact)
    assert inputs[1 - wanted].grad is None


def test_gradient_of_a_sum_needs_no_strides() -> None:
    case = CASES["3x3"]
    x, weight = make_inputs(case)
    conv2d(x, weight, case.sizes, case.num_images).sum().backward()
    ours, x.grad = x.grad, None
    conv2d_reference(x, weight, case.sizes, case.num_images).sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_gradient_of_the_weight_lies_in_memory_like_the_weight() -> None:
    inputs = make_inputs(CASES["3x3"])
    _, _, dweight = run(conv2d, inputs, CASES["3x3"])
    assert inputs[1].stride() == dweight.stride()
    assert dweight.is_contiguous(memory_format=torch.channels_last)


def test_levels_in_sixteen_bits_are_added_up_in_float32() -> None:
    # 1 from the first level and 2^-9 from each of the next four: bfloat16 has 8 bits, and adding
    # the small ones one at a time would lose them all.
    x = torch.tensor([1.0] + 4 * [2.0**-9], dtype=torch.bfloat16).view(5, 1)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).requires_grad_()
    conv2d(x, weight, ((1, 1),) * 5, 1).sum().backward()
    assert weight.grad is not None
    assert float(weight.grad) == 1.0 + 2.0**-7


def test_profilers_enter_a_range_around_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    @contextmanager
    def note(name: str) -> Iterator[None]:
        names.append(name)
        yield

    op = importlib.import_module("rsfast.kernels.conv2d.op")
    monkeypatch.setattr(op, "level_range", note)
    run(conv2d, make_inputs(CASES["even-4x4-stride4"]), CASES["even-4x4-stride4"])
    assert names == ["level 8x8", "level 6x5"] * 2


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
    arguments = x, weight, case.sizes, case.num_images
    conv2d(*arguments, **case.options)  # picks algorithms
    with host_must_not_wait(), torch.profiler.profile() as profile:
        conv2d(*arguments, **case.options)
    names = {event.name for event in profile.events()}
    assert "aten::cudnn_convolution" in names
    assert not {"aten::copy_", "aten::cat", "aten::contiguous", "aten::clone"} & names


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
def test_backward_of_stride_1_copies_no_map_on_a_gpu(device: str) -> None:
    case = CASES["3x3"]
    run(conv2d, make_inputs(case, torch.float16, device), case)  # picks algorithms
    with torch.profiler.profile(record_shapes=True) as profile:
        run(conv2d, make_inputs(case, torch.float16, device), case)
    maps = [[case.num_images, case.c_in, *size] for size in case.sizes]
    copies = [event for event in profile.events() if event.name == "aten::copy_"]
    assert not [event for event in copies if event.input_shapes[0] in maps]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 16).t()}, "x must be contiguous"),
        ({"weight": torch.zeros(4, 8, 3, 3, dtype=torch.float64)}, "weight must be torch.float32"),
        ({"weight": torch.zeros(4, 8, 3)}, "C_out, C_in / groups, k_h, k_w"),
        ({"weight": torch.zeros(4, 3, 3, 3)}, "weight must fit 8 channels in 1 groups"),
        ({"groups": 3}, "weight must fit 8 channels in 3 groups"),
        ({"groups": 0}, "weight must fit 8 channels in 0 groups"),
        ({"sizes": ((2, 3),)}, "sizes must add up to the 16 rows"),
        ({"stride": 0}, "stride must be an int or two, at least 1, got 0"),
        ({"padding": "same"}, "padding must be an int or two, at least 0, got 'same'"),
        ({"dilation": (1, 2, 3)}, "dilation must be an int or two, at least 1"),
        ({"padding": 0}, "level 0 of 4x2 pixels has none left behind a kernel of 3x3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(16, 8), "weight": torch.zeros(4, 8, 3, 3), "sizes": ((4, 2),)}
    with pytest.raises(ValueError, match=message):
        conv2d(**{**arguments, "padding": 1, **change}, num_images=2)
