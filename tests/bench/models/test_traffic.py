"""What batch norm moves, by kinds of layers and by the shapes of all layers."""

from __future__ import annotations

import pytest

from bench import traffic
from bench.shapes import batch_norm_layers


def test_kinds_of_batch_norm_are_all_there_are() -> None:
    layers = batch_norm_layers("resnet50")
    each = {n: sum(n.level_rows(1)) * n.channels * count for n, count in layers.items()}
    sizes = traffic.elements()
    assert sum(sizes.values()) == sum(each.values())
    assert sizes["bn3"] == sum(elements for layer, elements in each.items() if layer.residual)


def test_three_launches_each_way_are_eight_passes_and_two_for_a_residual() -> None:
    sizes = traffic.elements()
    passes = 8 * sum(sizes.values()) + 2 * sizes["bn3"]
    assert traffic.one_pass_mb(1, on_chip=0) == pytest.approx(2e-6 * passes)
    # A chip without end reads x once forward, x and dy once backward.
    passes -= 3 * sum(sizes.values())
    assert traffic.one_pass_mb(256, on_chip=10**12) == pytest.approx(2e-6 * passes)


def test_every_step_of_folding_saves(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = traffic.elements().values()
    totals = [
        sum(size * count for size, count in zip(sizes, passes, strict=True))
        for passes in traffic.PASSES.values()
    ]
    assert totals == sorted(totals, reverse=True)
    assert traffic.main([]) == 0
    assert "| rsfast | 570.7 |" in capsys.readouterr().out
