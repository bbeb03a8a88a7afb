"""Verdicts follow from rows: which goals, which resolution is worst, what is met."""

from __future__ import annotations

import math

from bench.deploy.verdicts import Verdict, as_table, judge, names, share_of_rate

_SIZES = (64, 32)


def _row(quantity: str, impl: str, value: float, threads: int = 1, resolution: int = 0) -> dict:
    return {"name": names(quantity, "net", threads, impl, resolution), "value": value}


def _latencies(impl: str, *values: float, threads: int = 1) -> list[dict]:
    return [
        _row("latency", impl, value, threads, resolution)
        for resolution, value in zip(_SIZES, values, strict=True)
    ]


def test_rows_are_named_by_what_they_depend_on() -> None:
    assert names("latency", "net", 2, "impl", 64) == "latency/net/b1/t2/impl/64"
    assert names("switch", "net", 1, "impl", 32) == "switch/net/b1/t1/impl/32"
    assert names("memory", "net", 2, "impl", 64) == "memory/net/t2/impl"
    assert names("load", "net", 1, "impl", 64) == "load/net/t1/impl"
    assert names("disk", "net", 2, "impl", 64) == "disk/net/impl"


def test_one_slow_resolution_misses_the_goal_and_is_named() -> None:
    rows = _latencies("rsfast_ort_fp32_fast", 10.2, 2.1) + _latencies("separate_ort_fp32", 10, 2)
    (verdict,) = judge(rows, "net", _SIZES, (1,))
    assert verdict.worst == 32
    assert math.isclose(verdict.ratios[32], 1.05)
    assert not verdict.met
    assert "1.050 at 32 px | 1.030 | **missed** |" in as_table([verdict], _SIZES)


def test_a_goal_is_met_up_to_its_limit() -> None:
    rows = _latencies("rsfast_ort_int8_small", 12, 2.2) + _latencies("separate_ort_int8", 10, 2)
    (verdict,) = judge(rows, "net", _SIZES, (1,))
    assert verdict.worst == 64
    assert verdict.met
    assert as_table([verdict], _SIZES).endswith("| 1.200 | 1.100 | 1.200 at 64 px | 1.200 | met |")


def test_each_number_of_threads_is_judged_by_itself() -> None:
    rows = []
    for threads, ours in ((1, 10.0), (2, 11.0)):
        rows += _latencies("rsfast_ort_fp32_fast", ours, 1, threads=threads)
        rows += _latencies("separate_ort_fp32", 10, 1, threads=threads)
    assert [(v.threads, v.met) for v in judge(rows, "net", _SIZES, (1, 2))] == [
        (1, True),
        (2, False),
    ]


def test_memory_of_one_session_is_held_against_a_third_of_all_separate_ones() -> None:
    for ours, met in ((33.3, True), (34, False)):
        rows = [
            _row("memory", "rsfast_ort_fp32_small", ours),
            _row("memory", "separate_ort_fp32", 100),
        ]
        (verdict,) = judge(rows, "net", _SIZES, (1,))
        assert verdict.met is met


def test_disk_is_held_against_the_number_of_resolutions_and_counted_once() -> None:
    rows = [_row("disk", "rsfast_ort_fp32_fast", 50.4), _row("disk", "separate_ort_fp32", 100)]
    (verdict,) = judge(rows, "net", _SIZES, (1, 2))
    assert verdict.limit == 1 / 2
    assert verdict.met
    assert not Verdict("disk", "a", "b", 1, {0: 0.506}, 0.5).met


def test_what_did_not_run_is_not_judged() -> None:
    assert judge(_latencies("rsfast_ort_fp32_fast", 1, 1), "net", _SIZES, (1,)) == []
    rows = _latencies("rsfast_ort_fp32_fast", 1, 1) + _latencies("separate_ort_fp32", 1, 1)[:1]
    assert judge(rows, "net", _SIZES, (1,)) == []


def test_a_multiply_add_is_two_operations() -> None:
    assert math.isclose(share_of_rate(50_000_000, 2.0, 100.0), 50.0)
