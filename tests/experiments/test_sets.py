"""The sets: which networks they train, and that they are what the paper's tables hold."""

from __future__ import annotations

import tomllib
from importlib import resources

import pytest

from rsfast.config import TrainConfig
from rsfast.experiments.runs import Job
from rsfast.experiments.sets import SETS, ExperimentSet, make_set

PAPERS = (224, 192, 160, 128, 96)


def settings_of(which: ExperimentSet, training: str) -> dict[str, object]:
    (found,) = (t for t in which.trainings if t.name == training)
    return dict(found.settings)


@pytest.mark.parametrize(
    ("name", "trainings"),
    [("table2", 7), ("table5", 4), ("table6", 12), ("fig4", 3), ("fig5", 15), ("fig9", 15)],
)
def test_a_set_trains_each_network_once(name: str, trainings: int) -> None:
    which = make_set(name, PAPERS)
    assert len(which.trainings) == trainings
    different = {tuple(sorted(training.settings.items())) for training in which.trainings}
    assert len(different) == trainings


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("resolutions", [PAPERS, (64, 48), (33, 32)], ids=str)
def test_comparisons_are_of_methods_that_share_resolutions(
    name: str, resolutions: tuple[int, ...]
) -> None:
    which = make_set(name, resolutions)
    cells = {method.name: method.cells for method in which.methods}
    for pair in which.comparisons:
        assert set(cells[pair.ours]) & set(cells[pair.theirs]), pair


@pytest.mark.parametrize("name", SETS)
def test_all_settings_make_a_valid_training(name: str) -> None:
    base = TrainConfig(arch="resnet18", batch_size=8)
    which = make_set(name, PAPERS)
    for training in which.trainings:
        Job.of(base, training, 0, {}, output=resources.files("rsfast"))  # type: ignore[arg-type]


def test_table_2_is_one_network_for_each_resolution_and_one_for_all() -> None:
    which = make_set("table2", PAPERS)
    methods = {method.name: method.cells for method in which.methods}
    assert list(methods) == ["I-Nets", "I-224", "parallel", "RS-Net"]
    assert [cell.training.name for cell in methods["I-Nets"].values()] == [
        f"inet_{r}" for r in PAPERS
    ]
    assert {cell.training.name for cell in methods["I-224"].values()} == {"inet_224"}
    assert settings_of(which, "inet_96")["resolutions"] == (96,)
    rs_net, parallel = settings_of(which, "rs_net"), settings_of(which, "parallel")
    assert rs_net == {**parallel, "distill": "full"}
    assert parallel["distill"] == "none"


def test_a_single_resolution_in_many_crops_has_as_many_levels_and_one_set() -> None:
    copies = settings_of(make_set("table6", PAPERS), "copies_128")
    assert copies["copies"] == 5
    assert copies["resolutions"] == (128,)
    assert copies["bn"] == "shared"
    assert copies["crop"] == "multi"


def test_unseen_resolutions_lie_halfway_and_are_tested_in_both_ways() -> None:
    which = make_set("fig4", PAPERS)
    (rs_net,) = (t for t in which.trainings if t.name == "rs_net")
    halfway = [208, 176, 144, 112]
    assert which.tested(rs_net) == {"interpolate": [*PAPERS, *halfway], "nearest": halfway}


def test_figure_9_differs_from_figure_5_in_the_area_of_the_crops() -> None:
    five, nine = make_set("fig5", PAPERS), make_set("fig9", PAPERS)
    for training in five.trainings:
        other = settings_of(nine, f"{training.name}_area30")
        assert other == {**training.settings, "crop_area": (0.3, 1.0)}


def test_one_resolution_is_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match=r"at least two to compare, got \(96,\)"):
        make_set("table2", (96,))


def test_the_papers_rows_are_methods_with_five_figures() -> None:
    text = (resources.files("rsfast.experiments") / "paper.toml").read_text()
    for name, archs in tomllib.loads(text).items():
        methods = {method.name for method in make_set(name, PAPERS).methods}
        for rows in archs.values():
            assert set(rows) == methods
            assert all(len(row) == 5 for row in rows.values())
