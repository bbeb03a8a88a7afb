"""Global average pooling of packed rows."""

from __future__ import annotations

import pytest
import torch

from rsfast.kernels import global_avg_pool


def test_matches_adaptive_pooling_of_each_level() -> None:
    torch.manual_seed(0)
    levels = [torch.randn(3, 5, h, w, dtype=torch.float64) for h, w in ((4, 3), (2, 2), (1, 1))]
    rows = [level.permute(0, 2, 3, 1).reshape(-1, 5) for level in levels]
    pooled = global_avg_pool(torch.cat(rows), [len(part) for part in rows], 3)
    exact = torch.cat([torch.nn.functional.adaptive_avg_pool2d(v, 1).flatten(1) for v in levels])
    torch.testing.assert_close(pooled, exact)


def test_gradient_spreads_evenly_over_the_pixels() -> None:
    x = torch.randn(2 * 6 + 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: global_avg_pool(rows, (12, 2), 2), (x,))


@pytest.mark.parametrize("level_rows", [(12, 3), (12, 4), (13, 1)], ids=str)
def test_rows_that_do_not_divide_are_refused(level_rows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="level_rows must be multiples of 2 images"):
        global_avg_pool(torch.zeros(14, 4), level_rows, 2)


def test_wrong_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="x must be contiguous"):
        global_avg_pool(torch.zeros(4, 14).t(), (12, 2), 2)
