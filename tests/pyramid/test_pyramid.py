"""Pyramid: views, packing and its rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rsfast import Pyramid
from rsfast.pyramid import check_resolutions


def make_levels(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 4), (3, 3), (1, 1))
    return [torch.randn(2, 3, h, w, generator=generator).to(dtype) for h, w in sizes]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_levels_come_back_as_packed(memory_format: torch.memory_format) -> None:
    levels = [level.contiguous(memory_format=memory_format) for level in make_levels()]
    packed = Pyramid.pack(levels)
    assert packed.rows.shape == (2 * (20 + 9 + 1), 3)
    assert packed.sizes == ((5, 4), (3, 3), (1, 1))
    for index, level in enumerate(levels):
        assert torch.equal(packed.level(index), level)
        assert torch.equal(packed.levels()[index], level)
    assert torch.equal(packed.level(-1), levels[-1])


def test_a_level_is_a_channels_last_view() -> None:
    packed = Pyramid.pack(make_levels())
    for index in range(packed.num_levels):
        level = packed.level(index)
        assert level.is_contiguous(memory_format=torch.channels_last)
        assert level.untyped_storage().data_ptr() == packed.rows.untyped_storage().data_ptr()
    packed.level(1).zero_()
    assert not packed.rows[40:58].any()
    assert packed.rows[:40].any()


def test_one_channels_last_level_is_packed_without_a_copy() -> None:
    image = make_levels()[0].contiguous(memory_format=torch.channels_last)
    assert Pyramid.pack([image]).rows.data_ptr() == image.data_ptr()


def test_gradients_pass_through_packing_and_views() -> None:
    levels = [level.double().requires_grad_() for level in make_levels()]
    weights = [torch.randn_like(level) for level in levels]
    views = Pyramid.pack(levels).levels()
    sum((w * v).sum() for w, v in zip(weights, views, strict=True)).backward()
    for level, weight in zip(levels, weights, strict=True):
        torch.testing.assert_close(level.grad, weight)


def test_other_rows_banks_and_dtypes_keep_the_levels() -> None:
    packed = Pyramid.pack(make_levels(), banks=(2, 1, 0))
    wide = packed.with_rows(torch.zeros(60, 7))
    assert (wide.num_channels, wide.sizes, wide.banks) == (7, packed.sizes, (2, 1, 0))
    assert packed.with_banks([0, 0, 0]).banks == (0, 0, 0)
    assert packed.to(torch.float64).rows.dtype == torch.float64


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "levels must hold at least one tensor"),
        ([torch.zeros(3, 4, 4)], r"levels\[0\] must be \[N, C, H, W\]"),
        ([torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 2, 2)], r"levels\[1\] must have the \[N, C\]"),
        ([torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 2, 2)], r"levels\[1\] must have the \[N, C\]"),
        ([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2).half()], r"levels\[1\] must be"),
    ],
    ids=["empty", "three axes", "other N", "other C", "other dtype"],
)
def test_levels_that_do_not_fit_are_named(levels: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid.pack(levels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 3, 1), ((2, 2),), 1), r"rows must be \[M, C\]"),
        ((torch.zeros(5, 3), ((2, 2),), 1), "rows must have 4 rows"),
        ((torch.zeros(0, 3), (), 1), "sizes must name at least one level"),
        (
            (torch.zeros(4, 3), ((2, 2),), 1, (0, 1)),
            "banks must name one batch-norm bank per level",
        ),
    ],
    ids=["three axes", "row count", "no level", "banks"],
)
def test_rows_that_do_not_fit_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid(*arguments)


@pytest.mark.parametrize("resolutions", [(), (96, 128), (128, 128), (64, 0)], ids=str)
def test_resolutions_must_descend(resolutions: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="strictly descending"):
        check_resolutions(resolutions)
