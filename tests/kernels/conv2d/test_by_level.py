"""Convolution of levels in tensors of their own, on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_helpers import max_error
from rsfast.kernels import conv2d_levels


class Case(NamedTuple):
    sizes: tuple[tuple[int, int], ...]
    num_images: int
    c_in: int
    c_out: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


CASES = {
    "all-products": Case(((2, 2), (1, 1)), 4, 16, 24, (3, 3), padding=(1, 1)),
    "all-the-librarys": Case(((9, 9), (8, 7)), 4, 8, 4, (3, 3), padding=(1, 1)),
    "some-products": Case(((9, 9), (5, 6), (4, 3), (1, 2)), 2, 8, 8, (3, 3), padding=(1, 1)),
    "only-the-gradient-a-product": Case(((7, 7),), 2, 8, 16, (3, 3), padding=(1, 1)),
    "too-many-images": Case(((1, 1),), 300, 4, 4, (1, 1)),
    "stem-7x7-stride2": Case(((9, 8), (5, 3)), 2, 3, 8, (7, 7), stride=(2, 2), padding=(3, 3)),
    "odd-channels-stride2": Case(((7, 7), (4, 5)), 2, 5, 3, (3, 3), stride=(2, 2), padding=(1, 1)),
    "1x1": Case(((4, 3), (2, 2)), 2, 8, 24, (1, 1)),
    "1x1-one-level": Case(((2, 2),), 2, 8, 24, (1, 1)),
    "oblong": Case(((7, 8), (3, 7)), 2, 8, 8, (1, 7), padding=(0, 3)),
    "oblong-strides": Case(((9, 7), (5, 6)), 2, 4, 6, (2, 3), stride=(1, 2), padding=(1, 0)),
    "dilated-unequally": Case(((9, 9), (6, 7)), 1, 4, 4, (3, 3), dilation=(2, 1)),
    "padding-beyond-the-kernel": Case(((3, 3),), 2, 4, 4, (1, 1), padding=(1, 1)),
    "one-pixel-one-image": Case(((1, 1), (1, 1)), 1, 8, 8, (3, 3), padding=(1, 1)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Weight, bias and the images of each level."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.c_out, case.c_in, *case.kernel, generator=generator)
    bias = torch.randn(case.c_out, generator=generator)
    shapes = [(case.num_images, case.c_in, *size) for size in case.sizes]
    levels = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in (weight, bias, *levels)]


def ours(case: Case, weight: Tensor, bias: Tensor, *levels: Tensor) -> list[Tensor]:
    return conv2d_levels(levels, weight, bias, **case.geometry)


def library(case: Case, weight: Tensor, bias: Tensor, *levels: Tensor) -> list[Tensor]:
    return [F.conv2d(x, weight, bias, **case.geometry) for x in levels]


def results(y: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """y, and gradients of all inputs for a dy of the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    dy = [torch.randn(part.shape, generator=generator).to(part) for part in y]
    return [*(part.detach() for part in y), *torch.autograd.grad(y, inputs, dy)]


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matches_the_library_in_float64(dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = results(library(case, *wide), wide)
    theirs = results(library(case, *inputs), inputs)
    for our, their, want in zip(results(ours(case, *inputs), inputs), theirs, exact, strict=True):
        assert our.shape == want.shape
        assert our.dtype == dtype
        eps = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
        bound = 2 * max_error(their, want) + eps * want.abs().max().item()
        assert max_error(our, want) <= bound


@cases
def test_can_be_differentiated_twice(case: Case) -> None:
    if case.num_images * sum(h * w for h, w in case.sizes) > 200:
        case = case._replace(num_images=1, sizes=case.sizes[-1:])
    inputs = make_inputs(case)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: tuple(ours(case, *tensors)), tuple(inputs), fast_mode=True
    )


def operations(case: Case) -> tuple[set[str], set[str]]:
    """PyTorch's operations in the forward and in the backward."""
    inputs = make_inputs(case, torch.float32)
    with torch.profiler.profile() as forward:
        y = ours(case, *inputs)
    with torch.profiler.profile() as backward:
        torch.autograd.grad(y, inputs, [torch.ones_like(part) for part in y])
    return {e.name for e in forward.events()}, {e.name for e in backward.events()}


def test_small_maps_are_matrix_products_and_large_ones_the_librarys() -> None:
    convolution, gradient = "aten::convolution", "aten::convolution_backward"
    forward, backward = operations(CASES["all-products"])
    assert not {convolution, gradient} & (forward | backward)
    forward, backward = operations(CASES["all-the-librarys"])
    assert convolution in forward
    assert gradient in backward
    assert "aten::mm" not in forward | backward
    _, backward = operations(CASES["too-many-images"])
    assert gradient in backward
    forward, backward = operations(CASES["only-the-gradient-a-product"])
    assert convolution in forward
    assert "aten::mm" in backward


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["weight", "bias", "image"])
@pytest.mark.parametrize("name", ["all-products", "all-the-librarys"])
def test_only_what_is_wanted_gets_a_gradient(name: str, wanted: int) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    exact = torch.autograd.grad(
        torch.cat([y.flatten() for y in library(case, *inputs)]).sum(), inputs
    )
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index == wanted)
    torch.cat([y.flatten() for y in ours(case, *inputs)]).sum().backward()
    for index, (tensor, want) in enumerate(zip(inputs, exact, strict=True)):
        if index == wanted:
            torch.testing.assert_close(tensor.grad, want)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("height", [1, 40], ids=["products", "with-one-of-the-librarys"])
def test_levels_in_sixteen_bits_are_added_up_in_float32(height: int) -> None:
    # 1 from the first level and 2^-9 from each of the next four: bfloat16 has 8 bits, and adding
    # the small ones one at a time would lose them all.
    first = torch.zeros(1, 1, height, 1)
    first[0, 0, 0] = 1.0
    levels = [x.bfloat16() for x in (first, *(torch.full((1, 1, 1, 1), 2.0**-9),) * 4)]
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).requires_grad_()
    torch.cat([y.flatten() for y in conv2d_levels(levels, weight)]).sum().backward()
    assert weight.grad is not None
    assert float(weight.grad) == 1.0 + 2.0**-7


def test_a_level_that_would_vanish_is_refused() -> None:
    weight = torch.ones(1, 1, 3, 3)
    with pytest.raises(ValueError, match="level 1 of 2x2 pixels has none left"):
        conv2d_levels([torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)], weight)
