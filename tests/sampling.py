"""Samples of large grids of test cases: every pair of values meets in some case.

Most faults need one value or two that meet. The rest of the grid is for the slow tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

__all__ = ["covering_rows", "pairwise"]


def covering_rows(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of indices, one per axis of such sizes, in which every pair of two axes' values occurs.

    Greedy: the row with the most pairs that none before it has; of equals the first.
    """
    axes = list(itertools.combinations(range(len(sizes)), 2))

    def pairs_of(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(a, row[a], b, row[b]) for a, b in axes}

    grid = {row: pairs_of(row) for row in itertools.product(*map(range, sizes))}
    if len(sizes) < 2:
        return list(grid)
    missing = set().union(*grid.values())
    rows = []
    while missing:
        best = max(grid, key=lambda row: len(grid[row] & missing))
        rows.append(best)
        missing -= grid[best]
    return rows


def pairwise(
    axes: Mapping[str, Sequence[Any]], indirect: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Parametrises with the grid of all axes, what is not needed for pairs marked slow.

    Cases for a GPU are all kept: there they are quick.

    Args:
        axes: argument names, as `pytest.mark.parametrize` takes them, and their values.
        indirect: names of fixtures among them.
    """
    values = [[_as_param(v, "," in names) for v in axis] for names, axis in axes.items()]
    on_cpu = [[value for value in axis if not _is_for_gpu(value)] for axis in values]
    sample = {
        tuple(id(axis[index]) for axis, index in zip(on_cpu, row, strict=True))
        for row in covering_rows([len(axis) for axis in on_cpu])
    }
    cases = []
    for case in itertools.product(*values):
        marks = [mark for value in case for mark in value.marks]
        if not any(map(_is_for_gpu, case)) and tuple(map(id, case)) not in sample:
            marks.append(pytest.mark.slow)
        arguments = [argument for value in case for argument in value.values]
        names = [str(value.id) for value in case]
        cases.append(pytest.param(*arguments, marks=marks, id="-".join(names)))
    names = [name.strip() for axis in axes for name in axis.split(",")]
    return pytest.mark.parametrize(names, cases, indirect=list(indirect))


def _as_param(value: Any, several: bool) -> Any:
    if isinstance(value, type(pytest.param())):
        return value
    values = value if isinstance(value, tuple) and several else (value,)
    return pytest.param(*values, id=str(value))


def _is_for_gpu(value: Any) -> bool:
    return any(mark.name == "gpu" for mark in value.marks)
