"""Settings of some trainings of a set."""

from __future__ import annotations

import pytest

from rsfast.config import TrainConfig
from rsfast.experiments.overrides import (
    Override,
    check_patterns,
    parse_overrides,
    with_overrides,
)
from rsfast.experiments.sets import make_set

BASE = TrainConfig(lr=0.02)
TABLE2 = make_set("table2", (64, 32), "resnet18")


def settings_of(*overrides: Override) -> dict[str, dict[str, object]]:
    changed = with_overrides(TABLE2, overrides, BASE)
    return {training.name: dict(training.settings) for training in changed.trainings}


def test_matching_trainings_have_the_setting_and_others_that_of_all() -> None:
    found = settings_of(Override("inet_*", {"lr": 0.05}))
    rates = {name: settings["lr"] for name, settings in found.items()}
    assert rates == {"inet_64": 0.05, "inet_32": 0.05, "parallel": 0.02, "rs_net": 0.02}
    assert found["rs_net"]["distill"] == "full"


def test_the_last_one_that_matches_counts() -> None:
    found = settings_of(Override("*", {"lr": 0.05}), Override("inet_32", {"lr": 0.1}))
    assert {name: settings["lr"] for name, settings in found.items()} == {
        "inet_64": 0.05,
        "inet_32": 0.1,
        "parallel": 0.05,
        "rs_net": 0.05,
    }


def test_nothing_is_said_without_any() -> None:
    assert settings_of() == {training.name: training.settings for training in TABLE2.trainings}


def test_values_are_read_as_toml() -> None:
    given = [["inet_*", "lr=0.05", "crop-area=[0.25, 1]"], ["rs_net", "schedule=cosine"]]
    assert parse_overrides(given, {}) == [
        Override("inet_*", {"lr": 0.05, "crop_area": [0.25, 1]}),
        Override("rs_net", {"schedule": "cosine"}),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["inet_*"], "must be followed by SETTING=VALUE"),
        (["inet_*", "lr"], "must give SETTING=VALUE, got 'lr'"),
        (["inet_*", "rate=0.1"], "must give SETTING=VALUE, got 'rate=0.1'"),
        (["inet_*", "seed=3"], "seed cannot be given: of another row"),
    ],
)
def test_what_cannot_be_read_is_named(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_overrides([given], {"seed": "of another row"})


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    names = [training.name for training in TABLE2.trainings]
    check_patterns([Override("rs_*", {"lr": 0.1})], names)
    with pytest.raises(ValueError, match=r"of inet_64, .*, got 'rsnet'"):
        check_patterns([Override("rsnet", {"lr": 0.1})], names)
