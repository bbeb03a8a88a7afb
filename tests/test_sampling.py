"""Pairs of values, and how few cases they take."""

from __future__ import annotations

import itertools

import pytest

from sampling import covering_rows, pairwise


@pytest.mark.parametrize(
    "sizes", [(2,), (3, 1), (2, 2, 2), (5, 10, 2, 2), (3, 2, 3, 2, 2)], ids=str
)
def test_every_pair_of_values_meets(sizes: tuple[int, ...]) -> None:
    rows = covering_rows(sizes)
    for (a, of_a), (b, of_b) in itertools.combinations(enumerate(sizes), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(range(of_a), range(of_b)))


def test_pairs_take_few_cases() -> None:
    assert len(covering_rows((5, 10, 2, 2))) <= 54  # of 200
    assert len(covering_rows((3, 2, 3, 2, 2))) <= 11  # of 72
    assert covering_rows((4, 3, 3)) == covering_rows((4, 3, 3))


def test_the_rest_of_the_grid_is_slow_and_gpu_cases_are_not() -> None:
    places = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
    mark = pairwise(
        {"a": (1, 2, 3), "b, c": [(1, 2), (3, 4), (5, 6)], "place": places, "d": (0, 1)}
    )
    names, cases = mark.args
    assert names == ["a", "b", "c", "place", "d"]
    assert len(cases) == 36
    marks = [{mark.name for mark in case.marks} for case in cases]
    assert marks.count({"gpu"}) == 18
    quick = [case.values for case, of in zip(cases, marks, strict=True) if not of]
    assert 9 <= len(quick) <= 10
    assert {(case[0], case[1]) for case in quick} == set(itertools.product((1, 2, 3), (1, 3, 5)))
