"""What batch norm moves, by kinds of layers and by the shapes of all layers."""

from __future__ import annotations

import functools

import pytest

from bench.models import traffic
from bench.support.shapes import batch_norm_layers


def test_kinds_of_batch_norm_are_all_there_are() -> None:
    layers = batch_norm_layers("resnet50")
    each = {n: sum(n.level_rows(1)) * n.channels * count for n, count in layers.items()}
    sizes = traffic.by_kind(traffic.elements)
    assert sum(sizes.values()) == sum(each.values())
    assert sizes["bn3"] == sum(elements for layer, elements in each.items() if layer.residual)
    assert sizes["stem"] == sum(elements for layer, elements in each.items() if layer.pooled)
    bare = [elements for layer, elements in each.items() if layer.activation is None]
    assert sizes["shortcut"] == sum(bare)


def test_three_launches_each_way_are_eight_passes_and_two_for_a_residual() -> None:
    sizes = traffic.by_kind(traffic.elements)
    behind = sum(sizes.values()) - sizes["stem"]
    # Of the stem: statistics, the map and a quarter of it with an index; the map twice, the
    # quarter's gradient and index twice, and the map's gradient.
    stem = (2 + 0.375 + 2 * (1 + 0.375) + 1) * sizes["stem"]
    passes = 8 * behind + 2 * sizes["bn3"] + stem
    assert sum(traffic.by_kind(traffic.rsfast).values()) == pytest.approx(passes)
    never = functools.partial(traffic.one_launch, batch=1, on_chip=0)
    assert traffic.by_kind(never) == pytest.approx(traffic.by_kind(traffic.rsfast))
    # A chip without end reads x once forward, x and dy once backward.
    endless = functools.partial(traffic.one_launch, batch=256, on_chip=10**12)
    passes -= 3 * behind
    assert sum(traffic.by_kind(endless).values()) == pytest.approx(passes)


def test_a_cache_without_end_saves_every_second_read() -> None:
    sizes = traffic.by_kind(traffic.elements)
    endless = traffic.by_kind(functools.partial(traffic.cached, batch=256, l2=1e18))
    passes = traffic.by_kind(traffic.rsfast)
    for kind in ("bn1", "bn2", "bn3", "shortcut"):
        assert endless[kind] == pytest.approx(passes[kind] - 3 * sizes[kind])
    assert endless["stem"] == pytest.approx(passes["stem"] - 2.375 * sizes["stem"])
    never = functools.partial(traffic.cached, batch=256, l2=0)
    assert traffic.by_kind(never) == pytest.approx(passes)


def test_a_cache_holds_what_two_tensors_used_last() -> None:
    layer = next(n for n in batch_norm_layers("resnet50") if not n.pooled and not n.residual)
    moved = 2 * traffic.rsfast(layer)
    # x and y forward; x, dy and dx backward, of which two are read again.
    saved = 6e5 / 2 + 2 * 6e5 / 3
    assert 2 * traffic.cached(layer, batch=1, l2=6e5) == pytest.approx(moved - saved)


def test_a_residual_without_an_activation_has_the_gradient_of_its_sum() -> None:
    (layer,) = (n for n in batch_norm_layers("resnet50") if n.residual and n.sizes[0] == (7, 7))
    assert traffic.passes(layer) == (4, 6)
    assert traffic.passes(layer._replace(activation=None)) == (4, 5)


def test_every_step_saves(capsys: pytest.CaptureFixture[str]) -> None:
    ways = [traffic.pooling_apart, traffic.rsfast]
    ways += [functools.partial(traffic.one_launch, batch=batch) for batch in (256, 64, 32)]
    totals = [sum(traffic.by_kind(way).values()) for way in ways]
    assert totals == sorted(totals, reverse=True)
    assert traffic.main([]) == 0
    printed = capsys.readouterr().out
    assert "| pooling apart | 570.7 |" in printed
    assert "| rsfast | 542.5 |" in printed
