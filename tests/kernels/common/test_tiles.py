"""How batch norm is shared out between programs."""

from __future__ import annotations

import itertools
import math

import pytest

pytest.importorskip("triton", reason="needs Triton")

from bench.support.shapes import PAPER_RESOLUTIONS, batch_norm_layers
from rsfast.kernels.common import tiles
from rsfast.kernels.common.levels import Levels

WAVE = 3 * tiles.MULTIPROCESSORS


def shares_of(rows: tuple[int, ...], channels: int) -> tiles.Shares:
    return tiles.share_out(Levels(rows, [0] * len(rows)), channels, programs=3)


@pytest.mark.parametrize("channels", [3, 64, 65, 2048])
@pytest.mark.parametrize("rows", [(1,), (10**7, 1), (5000, 1234, 77), (16,) * 8], ids=str)
def test_a_launch_is_one_wave_of_the_smallest_shares(rows: tuple[int, ...], channels: int) -> None:
    shares = shares_of(rows, channels)
    groups, total = shares.grid
    block_m, block_c = shares.tile["BLOCK_M"], shares.tile["BLOCK_C"]
    assert groups == math.ceil(channels / block_c)
    assert total == shares.total == sum(math.ceil(level / shares.rows) for level in rows)
    assert shares.rows % block_m == 0
    assert groups * total <= WAVE
    smaller = shares.rows - block_m
    if smaller:
        assert groups * sum(math.ceil(level / smaller) for level in rows) > WAVE


def test_each_level_has_a_share_where_channels_alone_fill_the_wave() -> None:
    shares = shares_of((70, 30, 1), 128 * WAVE)
    assert shares.grid == (WAVE, 3)


def test_programs_have_equal_work_in_the_layers_of_a_resnet50() -> None:
    batches = (256, 32)
    for layer, batch in itertools.product(
        batch_norm_layers("resnet50", PAPER_RESOLUTIONS), batches
    ):
        rows = layer.level_rows(batch)
        shares = shares_of(rows, layer.channels)
        whole_wave = sum(rows) / (WAVE // shares.grid[0])
        assert shares.rows <= 1.15 * whole_wave + shares.tile["BLOCK_M"], (layer, batch)


def test_launch_options_leave_the_registers_of_a_multiprocessor_to_its_programs() -> None:
    for programs in (2, 3, 4):
        options = tiles.wave_options(programs)
        assert programs * options["maxnreg"] * 32 * options["num_warps"] <= 65536
