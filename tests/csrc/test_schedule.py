"""How csrc/schedule.h shares out slices of channels of levels between blocks."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest

from emulator import emulator_library

# Five levels of a ResNet at batch 256, of a small batch, uneven ones, one.
LEVELS = {
    "56x56-b256": [256 * side**2 for side in (56, 48, 40, 32, 24)],
    "7x7-b256": [256 * side**2 for side in (7, 6, 5, 4, 3)],
    "14x14-b16": [16 * side**2 for side in (14, 12, 10, 8, 6)],
    "uneven": [3, 70000, 1, 1536, 1537, 2, 100, 8],
    "one": [1],
}


class Share(NamedTuple):
    """A block's unit in a wave, and the blocks of that unit."""

    level: int
    slice: int
    first_block: int
    num_blocks: int


class Schedule(NamedTuple):
    num_slices: int
    slice_vectors: int
    waves: list[list[Share]]


def make_schedule(rows: list[int], channels: int, max_blocks: int) -> Schedule:
    """For blocks that hold 1536 rows of a slice and are worth their while for 64."""
    shares = (ctypes.c_int * (4 * 100_000))()
    sizes = (ctypes.c_int * 4)()
    emulator_library().emulate_schedule(
        (ctypes.c_int * len(rows))(*rows), len(rows), channels, max_blocks, 1536, 64, sizes, shares
    )
    num_slices, slice_vectors, num_blocks, num_waves = sizes
    table = [Share(*shares[4 * i : 4 * i + 4]) for i in range(num_waves * num_blocks)]
    waves = [table[i : i + num_blocks] for i in range(0, len(table), num_blocks)]
    return Schedule(num_slices, slice_vectors, waves)


@pytest.mark.parametrize("max_blocks", [1, 7, 108, 132])
@pytest.mark.parametrize("channels", [8, 64, 72, 256, 2048])
@pytest.mark.parametrize("levels", LEVELS)
def test_every_unit_is_done_once_by_blocks_side_by_side(
    levels: str, channels: int, max_blocks: int
) -> None:
    schedule = make_schedule(LEVELS[levels], channels, max_blocks)
    done = []
    for wave in schedule.waves:
        for block, share in enumerate(wave):
            assert share.first_block <= block < share.first_block + share.num_blocks
        units = dict.fromkeys(wave)
        assert sum(share.num_blocks for share in units) == len(wave)
        done += [(share.level, share.slice) for share in units]
    units = range(len(LEVELS[levels])), range(schedule.num_slices)
    assert done == [(level, index) for level in units[0] for index in units[1]]


@pytest.mark.parametrize("max_blocks", [7, 132])
@pytest.mark.parametrize("levels", LEVELS)
def test_units_stay_on_the_chip_if_it_can_hold_them(levels: str, max_blocks: int) -> None:
    for wave in make_schedule(LEVELS[levels], 256, max_blocks).waves:
        for share in wave:
            fits = 1536 * share.num_blocks >= LEVELS[levels][share.level]
            assert fits or share.num_blocks == len(wave)


def test_small_levels_run_side_by_side() -> None:
    assert len(make_schedule(LEVELS["14x14-b16"], 256, 132).waves) == 1


def test_few_rows_take_few_blocks() -> None:
    (wave,) = make_schedule([100], 64, 132).waves
    assert len(wave) == 2


@pytest.mark.parametrize(
    ("channels", "num_slices", "slice_vectors"),
    [(8, 1, 1), (64, 1, 8), (72, 2, 5), (96, 2, 6), (136, 3, 6), (2048, 32, 8)],
)
def test_slices_are_of_equal_width(channels: int, num_slices: int, slice_vectors: int) -> None:
    schedule = make_schedule([1000], channels, 132)
    assert (schedule.num_slices, schedule.slice_vectors) == (num_slices, slice_vectors)
