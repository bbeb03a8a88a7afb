"""Sizes behind convolutions and poolings."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from rsfast.kernels import conv2d_sizes

SIZES = ((9, 9), (8, 7), (7, 10))


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (4, 4), (3, 1)], ids=str)
def test_sizes_are_those_of_pytorch(kernel: tuple[int, int]) -> None:
    weight = torch.zeros(1, 1, *kernel)
    for stride, padding, dilation in itertools.product((1, (2, 3)), (0, (1, 2)), (1, (1, 2))):
        want = tuple(
            tuple(F.conv2d(torch.zeros(1, 1, *size), weight, None, stride, padding, dilation).shape)
            for size in SIZES
        )
        sizes = conv2d_sizes(SIZES, kernel, stride, padding, dilation)
        assert tuple((1, 1, *size) for size in sizes) == want
        assert conv2d_sizes(SIZES, weight.shape, stride, padding, dilation) == sizes


def test_one_number_stands_for_both_axes() -> None:
    assert conv2d_sizes(((9, 8),), 3, stride=2, padding=1) == ((5, 4),)


def test_the_level_that_vanishes_is_named() -> None:
    with pytest.raises(ValueError, match=r"level 1 of 2x9 pixels has none left .* 3x3"):
        conv2d_sizes(((3, 3), (2, 9)), 3)
