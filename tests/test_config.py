"""Recipes, config files and the command line."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
from pathlib import Path

import pytest

from rsfast.config import (
    TrainConfig,
    as_flag,
    parse_args,
    read_config,
    recipe_names,
    rules_of,
)
from rsfast.models import ARCHITECTURES
from rsfast.models.refinenet import REFINENETS
from rsfast.models.registry import NETWORKS, QUANTISED
from rsfast.training.resume import changed_setting, fixed_settings
from rsfast.training.run import Run


def test_every_architecture_has_the_recipe_of_the_paper() -> None:
    quantised = [f"{arch.removesuffix('_lq')}_w2a{bits}" for arch in QUANTISED for bits in (32, 2)]
    others = [
        "builtin",
        "builtin_segmentation",
        "refinenet101",
        "resnet50_finetune",
        "resnet18_w2a2_authors",
    ]
    assert set(recipe_names()) == {*NETWORKS, *quantised, *others}
    for arch in (*NETWORKS, *QUANTISED):
        cfg = parse_args(["--arch", arch, "--data", "imagenet"])
        mobile = arch == "mobilenetv2"
        assert cfg.arch == arch
        assert cfg.resolutions == (224, 192, 160, 128, 96)
        assert (cfg.epochs, cfg.lr) == ((150, 0.05) if mobile else (120, 0.1))
        assert cfg.weight_decay == (4e-5 if mobile else 1e-4)
        assert (cfg.batch_size, cfg.momentum, cfg.nesterov) == (256, 0.9, False)
        assert (cfg.decay, cfg.distill, cfg.crop, cfg.flip) == ("all", "full", "single", "shared")
        off = (cfg.warmup_epochs, cfg.label_smoothing, cfg.ema_decay)
        assert off == (0.0, 0.0, 0.0)
        assert (cfg.schedule, cfg.fix_activation_basis) == ("cosine", False)
        expected = (2, 32) if arch in QUANTISED else (None, None)
        assert (cfg.weight_bits, cfg.activation_bits) == expected


def test_every_network_of_segmentation_has_one_recipe_and_its_own_built_in_set() -> None:
    for arch in REFINENETS:
        cfg = parse_args(["--arch", arch, "--data", "nyud"])
        assert (cfg.arch, cfg.task) == (arch, "segmentation")
        assert (cfg.resolutions, cfg.scale) == ((352, 224, 96), (0.5, 2.0))
        assert (cfg.schedule, cfg.decoder_lr, cfg.ignore_label) == ("poly", 10.0, 255)
    alone = parse_args(["--arch", "refinenet18"])
    assert alone.resolutions[0] <= 96
    assert alone.crop_area == TrainConfig().crop_area, "of the other built-in set"
    own = parse_args(["--arch", "mine:network", "--task", "segmentation"])
    assert own.resolutions == alone.resolutions


def test_a_run_of_before_there_were_tasks_was_of_classification(tmp_path: Path) -> None:
    cfg = TrainConfig(arch="resnet18")
    before = dataclasses.asdict(cfg)
    del before["task"], before["scale"], before["ignore_label"], before["decoder_lr"]
    assert changed_setting(before, cfg, fixed_settings()) is None
    (tmp_path / "config.toml").write_text(cfg.to_toml().replace('task = "classification"\n', ""))
    assert read_config(tmp_path / "config.toml") == cfg


@pytest.mark.parametrize("arch", QUANTISED)
def test_quantised_networks_are_chosen_by_name_or_by_their_bits(arch: str) -> None:
    data, name = ["--data", "imagenet"], arch.removesuffix("_lq")
    wide = parse_args([*data, "--arch", arch])
    assert parse_args([*data, "--config", f"{name}_w2a32"]) == wide
    narrow = parse_args([*data, "--config", f"{name}_w2a2"])
    assert narrow == dataclasses.replace(wide, activation_bits=2)
    assert parse_args([*data, "--arch", arch, "--activation-bits", "2"]) == narrow
    plain = parse_args([*data, "--arch", name])
    assert dataclasses.replace(wide, arch=name, weight_bits=None, activation_bits=None) == plain
    builtin = parse_args(["--arch", arch, "--activation-bits", "2"])
    assert (builtin.activation_bits, builtin.resolutions[0], builtin.batch_size) == (2, 96, 32)


def test_the_authors_recipe_has_what_their_program_does_otherwise() -> None:
    argv = ["--data", "imagenet", "--config"]
    paper = parse_args([*argv, "resnet18_w2a2"])
    changed = {
        "weight_decay": 5e-5,
        "decay": "weights",
        "nesterov": True,
        "schedule": "step",
        "milestones": (30, 60, 85, 95, 105),
        "levels": "nearest",
        "lighting": 0.1,
    }
    theirs = parse_args([*argv, "resnet18_w2a2_authors"])
    assert theirs == dataclasses.replace(paper, **changed)
    other = parse_args([*argv, "resnet18_w2a2_authors", "--arch", "resnet50_lq"])
    assert other == dataclasses.replace(theirs, arch="resnet50_lq")


@pytest.mark.parametrize(
    ("arch", "folder"),
    [
        ("resnet18", "runs/resnet18"),
        ("resnet50_lq", "runs/resnet50_w2a32"),
        ("torchvision/regnet_y_400mf", "runs/torchvision_regnet_y_400mf"),
        ("timm/efficientnet_lite0.ra_in1k", "runs/timm_efficientnet_lite0.ra_in1k"),
        ("my_networks:small_cnn", "runs/my_networks_small_cnn"),
    ],
)
def test_every_network_has_one_folder_of_its_own(arch: str, folder: str) -> None:
    cfg = parse_args(["--arch", arch, "--data", "images"])
    assert (cfg.arch, cfg.folder) == (arch, Path(folder))
    assert dataclasses.replace(cfg, output="here").folder == Path("here")
    if arch not in ARCHITECTURES:  # no recipe, and nothing is imported to find out
        assert cfg == TrainConfig(arch=arch, data="images")


def test_a_checked_setting_refuses_none_unless_that_is_its_default() -> None:
    assert TrainConfig(precision=None).precision is None
    with pytest.raises(ValueError, match=r"kernels must be one of .*, got None"):
        TrainConfig(kernels=None)


def test_what_a_continued_run_may_change_stands_in_the_fields() -> None:
    rules = rules_of(TrainConfig)
    at_an_epoch = {name for name, rule in rules.items() if rule.on_resume == "at an epoch"}
    assert at_an_epoch == {"loader", "batch_size", "steps_per_epoch"}
    freely = {name for name, rule in rules.items() if rule.on_resume == "freely"}
    assert freely == set(
        "data train_data val_data val_list output resume restart_epoch workers log_every "
        "checkpoint_every keep device graph profile max_skipped strict tolerate_truncated "
        "hw_decoder_load dont_use_mmap".split()
    )
    assert fixed_settings() == sorted(set(rules) - freely)
    assert fixed_settings(at_an_epoch=True) == sorted(set(rules) - freely - at_an_epoch)


def test_a_setting_that_a_checkpoint_does_not_know_has_its_default() -> None:
    before = dataclasses.asdict(TrainConfig())
    del before["sync_bn"], before["nesterov"]
    assert changed_setting(before, TrainConfig(), fixed_settings()) is None
    changed = changed_setting(before, TrainConfig(sync_bn=True), fixed_settings())
    assert changed == ("sync_bn", False, True)
    known = {**before, "sync_bn": True}
    assert changed_setting(known, TrainConfig(sync_bn=True), fixed_settings()) is None


def test_an_older_run_with_averages_was_trained_with_a_constant_decay(tmp_path: Path) -> None:
    before = dataclasses.asdict(TrainConfig(ema_decay=0.9))
    del before["ema_warmup"]
    changed = changed_setting(before, TrainConfig(ema_decay=0.9), fixed_settings())
    assert changed == ("ema_warmup", False, True)
    file = tmp_path / "trained.toml"
    text = TrainConfig(ema_decay=0.9).to_toml()
    file.write_text(text.replace("ema_warmup = true\n", ""))
    assert read_config(file) == TrainConfig(ema_decay=0.9, ema_warmup=False)
    file.write_text(text)
    assert read_config(file) == TrainConfig(ema_decay=0.9)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("ema_warmup", False, " (--no-ema-warmup)"),
        ("sync_bn", True, " (--sync-bn)"),
        ("resolutions", (64, 32), " (--resolutions 64 32)"),
        ("lr", 0.1, " (--lr 0.1)"),
        ("freeze", None, ""),
        ("milestones", (30, 60), " (--milestones 30 60)"),
        ("milestones", (), " (--milestones)"),
    ],
)
def test_a_setting_is_shown_as_it_is_typed(name: str, value: object, flag: str) -> None:
    assert as_flag(name, value) == flag


def test_images_are_named_wherever_they_are() -> None:
    assert TrainConfig().images == "the built-in set"
    assert TrainConfig(loader="synthetic").images == "the synthetic set"
    assert TrainConfig(data="d", val_data="v.tar").images == "d and v.tar"


def test_flags_beat_the_file_which_beats_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('arch = "mobilenetv2"\nlr = 1\nepochs = 7\nresolutions = [64, 32]\n')
    cfg = parse_args(["--config", str(file), "--epochs", "3", "--data", "images"])
    assert (cfg.arch, cfg.lr, cfg.epochs) == ("mobilenetv2", 1.0, 3)
    assert cfg.weight_decay == 4e-5
    assert cfg.resolutions == (64, 32)
    assert isinstance(cfg.lr, float)


def test_the_fine_tuning_recipe_is_the_paper_s_but_for_rate_and_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--data", "imagenet", "--pretrained", "resnet50.pth"]
    fine = parse_args([*argv, "--config", "resnet50_finetune"])
    paper = parse_args([*argv, "--arch", "resnet50"])
    assert (fine.epochs, fine.lr) == (paper.epochs / 10, paper.lr / 10)
    changed = {"epochs": 12, "lr": 0.01, "warmup_epochs": 1.0, "calibrate_first": 50}
    assert fine == dataclasses.replace(paper, **changed)
    monkeypatch.chdir(tmp_path)
    Path("resnet50_finetune").write_text("epochs = 5\n")
    assert parse_args([*argv, "--config", "resnet50_finetune"]).epochs == 5, "files go first"


def test_without_data_the_settings_fit_the_builtin_set_and_a_laptop() -> None:
    cfg = parse_args([])
    assert (cfg.arch, cfg.data) == ("resnet50", None)
    assert cfg.resolutions[0] < 128
    assert cfg.batch_size <= 32
    assert parse_args(["--batch-size", "7", "--epochs", "1"]).batch_size == 7
    assert parse_args(["--loader", "synthetic"]).resolutions == (224, 192, 160, 128, 96)


def test_the_authors_spelling_is_understood() -> None:
    cfg = parse_args(["--sizes", "64", "32", "--kd-type", "ens"])
    assert (cfg.resolutions, cfg.distill) == ((64, 32), "vanilla")
    assert parse_args(["--kd-type", "ens_topdown"]).distill == "full"


def test_the_saved_config_gives_the_same_run(tmp_path: Path) -> None:
    cfg = parse_args(["--arch", "resnet18", "--nesterov", "--crop-area", "0.3", "1"])
    (tmp_path / "config.toml").write_text(cfg.to_toml())
    assert parse_args(["--config", str(tmp_path / "config.toml")]) == cfg
    assert "resume" not in tomllib.loads(cfg.to_toml())


def test_the_rate_follows_the_total_batch_only_when_told() -> None:
    for flags, expected in (([], 0.1), (["--scale-lr"], 0.4)):
        settings = "--lr 0.1 --batch-size 512 --epochs 9 --warmup-epochs 0".split()
        cfg = parse_args([*settings, *flags])
        two = types.SimpleNamespace(world_size=2)
        run = types.SimpleNamespace(cfg=cfg, steps_per_epoch=10, rank=two)
        assert Run.lr(run, 0) == pytest.approx(expected)


def test_milestones_are_epochs_of_the_run() -> None:
    flags = "--epochs 9 --lr 1 --warmup-epochs 0 --schedule step --milestones 3 6 --gamma 0.5"
    cfg = parse_args(flags.split())
    alone = types.SimpleNamespace(world_size=1)
    run = types.SimpleNamespace(cfg=cfg, steps_per_epoch=10, rank=alone)
    rates = [Run.lr(run, step) for step in range(90)]
    assert rates == [1.0] * 30 + [0.5] * 30 + [0.25] * 30


def test_milestones_of_a_file_can_be_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "stepped.toml"
    file.write_text('schedule = "step"\nmilestones = [3, 6]\nepochs = 9\n')
    cfg = parse_args(["--config", str(file)])
    assert (cfg.schedule, cfg.milestones, cfg.gamma) == ("step", (3, 6), 0.1)
    (tmp_path / "again.toml").write_text(cfg.to_toml())
    assert parse_args(["--config", str(tmp_path / "again.toml")]) == cfg
    plain = parse_args(["--config", str(file), "--schedule", "cosine", "--milestones"])
    assert (plain.schedule, plain.milestones) == ("cosine", ())


def test_every_setting_is_a_documented_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"])
    assert stopped.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')} " in text
    assert "images per GPU (per process on CPUs) (default 256)" in text
    assert "{auto,cpu,cuda}" in text
    assert "(default )" not in text
    known = ",".join(ARCHITECTURES)
    assert f"--arch {{{known},torchvision/NAME,timm/NAME,MODULE:FUNCTION}}" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "vgg"], "arch must be one of"),
        (["--resolutions", "32", "64"], "strictly descending"),
        (["--distill", "all"], "distill must be one of"),
        (["--precision", "fp8"], "precision must be one of"),
        (["--loader", "ffcv"], "loader must be one of"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--lr", "-1"], "lr must not be negative"),
        (["--label-smoothing", "1"], r"label_smoothing must be in \[0, 1\)"),
        (["--warmup-epochs", "200"], "warmup_epochs must be fewer than the 4 epochs"),
        (["--schedule", "linear"], "schedule must be one of"),
        (["--schedule", "step"], "schedule step needs the epochs .*: add --milestones"),
        (["--schedule", "step", "--milestones"], "schedule step needs the epochs"),
        (["--schedule", "step", "--milestones", "2", "2"], "strictly ascending, got .2, 2."),
        (["--schedule", "step", "--milestones", "0", "2"], "must be epochs from 1"),
        (["--schedule", "step", "--milestones", "2", "4"], "must be below the 4 epochs"),
        (["--milestones", "2"], "milestones are of the schedule step, got .2,. for cosine"),
        (["--gamma", "0.5"], "gamma is of the schedule step, got 0.5 for cosine"),
        (["--gamma", "1"], r"gamma must be in \[0, 1\)"),
        (["--crop-area", "0.5"], "crop_area must be a range"),
        (["--nesterov", "--momentum", "0"], "nesterov needs a momentum"),
        (["--learning-rate", "1"], "unrecognized arguments"),
        (["--kernels", "hip"], "kernels must be one of"),
        (["--kernels", "cuda", "--fold-bn", "all"], "unrecognized arguments: --fold-bn all"),
        (["--kernels", "cuda", "--precision", "fp32"], "kernels cuda needs precision bf16 or fp16"),
        (["--optimizer", "adam"], "optimizer must be one of"),
        (["--optimizer", "apex_sgd"], "add --no-graph"),
        (["--profile", "100"], "profile must look like 100:110"),
        (["--profile", "110:100"], "profile must look like 100:110"),
        (["--profile=-1:3"], "profile must look like 100:110"),
        (["--config", "missing.toml"], "config file missing.toml cannot be read"),
        (["--config", "resnet18_finetune"], "which is no file; recipes of rsfast are: builtin, .*"),
        (["--train-data", "a.tar", "b.tar"], "unrecognized arguments: b.tar; quote a pattern"),
        (["--train-data", "a.tar"], "add --val-data PATTERN or --data DIR, got a.tar alone"),
        (["--calibrate-first", "5"], "calibrate_first needs pretrained weights"),
        (["--config", "resnet50_finetune"], "add --pretrained PATH"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_command_lines_exit_with_two_and_a_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(argv)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 0.1", "unknown setting 'learning_rate'"),
        ("lr = 'high'", "lr must be float, got 'high'"),
        ("epochs = 1.5", "epochs must be int, got 1.5"),
        ("nesterov = 1", "nesterov must be bool, got 1"),
        ("resolutions = [64, 'x']", "resolutions must be int, got 'x'"),
        ("resolutions = 64", "resolutions must be"),
        ("lr = ", "cannot be read"),
    ],
    ids=str,
)
def test_bad_config_files_are_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--config", str(tmp_path / "bad.toml")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "bad.toml" in error
    assert re.search(message, error)
