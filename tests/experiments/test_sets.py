"""The sets: which networks they train, and that they are what the paper's tables hold."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from rsfast.config import TrainConfig, parse_args
from rsfast.experiments.measures import MEASURES
from rsfast.experiments.runs import Job
from rsfast.experiments.sets import (
    QUANTISED_SETS,
    SETS,
    ExperimentSet,
    make_set,
    papers_network,
)
from rsfast.models.registry import check_task

PAPERS = (224, 192, 160, 128, 96)
LQ = "resnet18_lq"
# What networks with activations of so many bits refuse: its name, and what all rows have instead.
REFUSED = {32: ("fix_activation_basis", False), 2: ("zero_init_residual", None)}


def settings_of(which: ExperimentSet, training: str) -> dict[str, object]:
    (found,) = (t for t in which.trainings if t.name == training)
    return dict(found.settings)


@pytest.mark.parametrize(
    ("name", "trainings"),
    [
        *(("table2", 7), ("table3", 12), ("table5", 4), ("table6", 12), ("table7", 6)),
        *(("fig4", 3), ("fig5", 15), ("fig9", 15), ("bits", 18)),
    ],
)
def test_a_set_trains_each_network_once(name: str, trainings: int) -> None:
    which = make_set(name, PAPERS, LQ)
    assert len(which.trainings) == trainings
    different = {tuple(sorted(training.settings.items())) for training in which.trainings}
    assert len(different) == trainings


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("resolutions", [PAPERS, (64, 48), (33, 32)], ids=str)
def test_comparisons_are_of_methods_that_share_resolutions(
    name: str, resolutions: tuple[int, ...]
) -> None:
    which = make_set(name, resolutions, LQ)
    cells = {method.name: method.cells for method in which.methods}
    for pair in which.comparisons:
        assert set(cells[pair.ours]) & set(cells[pair.theirs]), pair


@pytest.mark.parametrize("name", SETS)
def test_all_settings_make_a_valid_training(name: str) -> None:
    base = TrainConfig(arch=LQ, weight_bits=2, activation_bits=32, batch_size=8)
    if network := papers_network([name]):
        base = TrainConfig(arch=network)
    which = make_set(name, PAPERS, base.arch)
    assert which.task == base.task
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


@pytest.mark.parametrize("arch", ["resnet18_lq", "resnet50_lq"])
def test_table_3_is_table_2_with_the_bits_of_its_rows(arch: str) -> None:
    which = make_set("table3", PAPERS, arch)
    methods = {method.name: method.cells for method in which.methods}
    assert list(methods) == ["2/32 I-Nets", "2/32 RS-Net", "2/2 I-Nets", "2/2 RS-Net"]
    plain = make_set("table2", PAPERS)
    for bits in (32, 2):
        for name in ("rs_net", "inet_96"):
            found = settings_of(which, f"{name}_w2a{bits}")
            expected = {"arch": arch, "weight_bits": 2, "activation_bits": bits}
            refused, instead = REFUSED[bits]
            assert found.pop(refused, "the base's") == instead
            assert found == {**settings_of(plain, name), **expected}
    pairs = [(pair.ours, pair.theirs) for pair in which.comparisons]
    assert pairs == [("2/32 RS-Net", "2/32 I-Nets"), ("2/2 RS-Net", "2/2 I-Nets")]


def test_the_ladder_of_bits_goes_from_full_precision_down_and_shares_table_3s_trainings() -> None:
    ladder, table = make_set("bits", PAPERS, LQ), make_set("table3", PAPERS, LQ)
    assert {training.name: dict(training.settings) for training in table.trainings}.items() <= {
        training.name: dict(training.settings) for training in ladder.trainings
    }.items()
    full = settings_of(ladder, "rs_net_w32a32")
    assert (full["arch"], full["weight_bits"], full["activation_bits"]) == ("resnet18", None, None)
    pairs = {(pair.ours, pair.theirs) for pair in ladder.comparisons}
    assert pairs >= {("32/32 RS-Net", "2/32 RS-Net"), ("2/32 RS-Net", "2/2 RS-Net")}
    assert pairs >= {("32/32 I-Nets", "2/32 I-Nets"), ("32/32 RS-Net", "32/32 I-Nets")}


def test_each_row_of_bits_takes_of_the_base_s_choices_those_that_its_networks_have() -> None:
    fixed = TrainConfig(arch=LQ, activation_bits=2, fix_activation_basis=True)
    begun = TrainConfig(arch=LQ, zero_init_residual=False)
    which = make_set("bits", (64, 48), LQ)
    output = resources.files("rsfast")
    for training in which.trainings:
        narrow = training.name.endswith("_w2a2")
        cfg = Job.of(fixed, training, 0, {}, output=output).cfg  # type: ignore[arg-type]
        assert cfg.fix_activation_basis == narrow
        cfg = Job.of(begun, training, 0, {}, output=output).cfg  # type: ignore[arg-type]
        assert cfg.zero_init_residual is (None if narrow else False)


@pytest.mark.parametrize("name", ["table2", "table3", "fig5"])
def test_picked_levels_of_all_rows_come_from_the_largest_resolution_of_the_set(
    name: str, tmp_path: Path
) -> None:
    arch = LQ if name == "table3" else "resnet18"
    nearest = TrainConfig(arch=arch, resolutions=(64, 48, 32), levels="nearest")
    for base, expected in (
        (nearest, 64),
        (dataclasses.replace(nearest, picked_from=96), 96),
        (dataclasses.replace(nearest, levels="resize"), None),
    ):
        trainings = make_set(name, base.resolutions, arch).trainings
        assert (32,) in {training.settings["resolutions"] for training in trainings}
        for training in trainings:
            assert Job.of(base, training, 0, {}, output=tmp_path).cfg.picked_from == expected


def test_the_settings_of_all_rows_of_bits_pass_through_a_file(tmp_path: Path) -> None:
    base = parse_args(["--arch", LQ, "--resolutions", "64", "48"])
    for training in make_set("bits", base.resolutions, base.arch).trainings:
        cfg = Job.of(base, training, 0, {}, output=tmp_path).cfg
        file = tmp_path / "settings.toml"
        file.write_text(cfg.to_toml())
        assert parse_args(["--config", str(file)]) == cfg


@pytest.mark.parametrize("name", QUANTISED_SETS)
def test_sets_of_quantised_networks_refuse_others_in_a_sentence(name: str) -> None:
    message = f"{name} is of quantised networks: take --arch resnet18_lq or resnet50_lq, got resnet"
    with pytest.raises(ValueError, match=message):
        make_set(name, PAPERS, "resnet50")


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


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_papers_rows_of_bits_are_those_of_its_tables(arch: str) -> None:
    paper = tomllib.loads((resources.files("rsfast.experiments") / "paper.toml").read_text())
    full = paper["table2"][arch]["top1"]
    expected = {f"32/32 {name}": full[name] for name in ("I-Nets", "RS-Net")}
    theirs = paper["table3"][f"{arch}_lq"]["top1"]
    assert paper["bits"][f"{arch}_lq"]["top1"] == {**expected, **theirs}


def test_the_papers_rows_are_methods_with_a_figure_for_each_resolution() -> None:
    text = (resources.files("rsfast.experiments") / "paper.toml").read_text()
    for name, archs in tomllib.loads(text).items():
        for arch, figures in archs.items():
            measure = MEASURES[check_task(arch)]
            which = make_set(name, measure.papers_resolutions, arch)
            assert which.task == check_task(arch)
            assert set(figures) == set(measure.figures)
            for rows in figures.values():
                assert set(rows) == {method.name for method in which.methods}
                assert all(len(row) == len(measure.papers_resolutions) for row in rows.values())


def test_table_7_is_of_the_network_of_the_paper_and_of_no_other_task() -> None:
    which = make_set("table7", (352, 224, 96))
    assert [training.name for training in which.trainings] == [
        *("inet_352", "inet_224", "inet_96", "rs_net")
    ]
    plain = make_set("table2", (352, 224, 96))
    for name in ("rs_net", "inet_96"):
        assert settings_of(which, name) == settings_of(plain, name)
    assert papers_network(["table7"]) == "refinenet101"
    assert papers_network(["table2"]) is None
    assert papers_network(["table2", "table7"]) is None
