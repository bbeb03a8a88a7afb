"""What a method takes to be as good as the first one."""

from __future__ import annotations

from rsfast.experiments.costs import Cost, costs_of


def rows_of(
    method: str, training: str, resolution: int, values: list[float], seconds: float, seed: int = 0
) -> list[dict[str, str]]:
    return [
        {
            "method": method,
            "training": training,
            "resolution": str(resolution),
            "seed": str(seed),
            "epoch": str(epoch),
            "train_s": str(seconds * epoch),
            "top1": str(value),
        }
        for epoch, value in enumerate(values, start=1)
    ]


SINGLE = [
    *rows_of("I-Nets", "inet_64", 64, [10.0, 30.0, 60.0, 60.0, 60.0], 2.0),
    *rows_of("I-Nets", "inet_32", 32, [10.0, 10.0, 40.0, 40.0, 40.0], 1.0),
]


def both(values: list[float], seconds: float, seed: int = 0) -> list[dict[str, str]]:
    return [
        row
        for resolution in (64, 32)
        for row in rows_of("RS-Net", "rs_net", resolution, values, seconds, seed)
    ]


def test_seconds_are_those_of_all_networks_and_each_network_counts_once() -> None:
    rows = [*SINGLE, *both([20.0, 60.0, 70.0, 70.0, 70.0], 4.0)]
    # Three epochs running: the I-Nets end at 50, the RS-Net is at 20, 40, 50.
    assert costs_of(rows, "top1") == [
        Cost("I-Nets", 50.0, 5, 15.0),
        Cost("RS-Net", 70.0, 3, 12.0),
    ]


def test_seeds_are_averaged() -> None:
    second = [row | {"seed": "1"} for row in SINGLE]
    rows = [*SINGLE, *second, *both([40.0] * 5, 4.0), *both([60.0] * 5, 2.0, seed=1)]
    assert costs_of(rows, "top1")[1] == Cost("RS-Net", 50.0, 1, 3.0)


def test_a_figure_that_is_not_reached_is_none() -> None:
    assert costs_of([*SINGLE, *both([49.0] * 5, 4.0)], "top1")[1] == Cost(
        "RS-Net", 49.0, None, None
    )


def test_a_jump_of_one_epoch_is_not_enough() -> None:
    cost = costs_of([*SINGLE, *both([0.0, 90.0, 0.0, 50.0, 50.0], 4.0)], "top1")[1]
    assert cost.epochs is None


def test_methods_at_other_resolutions_are_left_out() -> None:
    rows = [*SINGLE, *rows_of("I-64", "inet_64", 64, [90.0] * 5, 2.0)]
    assert [cost.method for cost in costs_of(rows, "top1")] == ["I-Nets"]
