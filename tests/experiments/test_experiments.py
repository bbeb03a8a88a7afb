"""The command: what it runs, keeps, reports, and does when something fails or stops it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import environment, make_image_folder
from rsfast import train
from rsfast.config import TrainConfig, read_config
from rsfast.config.flags import common_settings
from rsfast.data.__main__ import main as check_data
from rsfast.evaluate import _parse
from rsfast.experiments import __main__ as experiments
from rsfast.experiments import results
from rsfast.experiments.__main__ import _data_set, main
from rsfast.experiments.runs import Job, _shared
from rsfast.files.tables import read_rows

FAKE = f"{shlex.quote(sys.executable)} {Path(__file__).with_name('fake_module.py')}"
SETTINGS = ["--arch", "resnet18", "--resolutions", "48", "32", "--batch-size", "8", "--lr", "0.01"]


def command_line(output: Path, *arguments: str) -> list[str]:
    data = output.parent / "images"
    if not data.exists():
        make_image_folder(data, train=1, val=1)
    where = ["--output", str(output), "--launch", FAKE, "--data", str(data)]
    return [*arguments, *where, *SETTINGS]


def run(output: Path, *arguments: str) -> int:
    return main(command_line(output, *arguments))


def test_a_set_is_trained_tested_and_reported(tmp_path: Path, calls: Path) -> None:
    assert run(tmp_path / "out", "table2", "--seeds", "3", "--jobs", "2") == 0
    made = [line.split()[0] for line in calls.read_text().splitlines()]
    assert made.count("rsfast.train") == made.count("rsfast.evaluate") == 4 * 3
    report = tmp_path / "out" / "table2"
    rows = read_rows(report / "results.csv")
    assert len(rows) == 4 * 2 * 3
    two = {(row["method"], row["resolution"]): float(row["top1"]) for row in rows}
    assert two["I-48", "48"] == two["I-Nets", "48"]
    assert two["RS-Net", "48"] > two["I-Nets", "48"]

    comparisons = read_rows(report / "comparisons.csv")
    rs_net = [row for row in comparisons if row["ours"] == "RS-Net" and row["theirs"] == "I-Nets"]
    assert [row["resolution"] for row in rs_net] == ["48", "32", "mean"]
    assert all(float(row["mean"]) > 0 for row in rs_net)
    # A network is not compared with itself.
    (same,) = (row for row in comparisons if row["ours"] == "I-48" and row["resolution"] != "mean")
    assert same["resolution"] == "32"

    text = (report / "README.md").read_text()
    assert "| RS-Net |" in text
    assert "| rs_net | 48 32 | full | private | single | 1 |" in text
    assert "| **I-48 against I-Nets** | **mean of 1** |" in text
    assert "the 2 networks of I-Nets together" in text
    times = read_rows(report / "times.csv")
    assert all(float(row["train_s"]) == 2.0 for row in times)  # 10 steps of 8 images, 40 a second
    epochs = read_rows(report / "epochs.csv")
    assert len(epochs) == (2 + 2 + 2) * 3 * 2  # I-Nets, parallel training and the RS-Net
    assert {(row["epoch"], float(row["train_s"])) for row in epochs} == {("1", 1.0), ("2", 2.0)}
    assert all(row["top1"] == f"{row['resolution']}.0" and row["ce"] == "0.5" for row in epochs)
    assert json.loads((report / "run.json").read_text())["settings"]["lr"] == 0.01
    for picture in ("results.png", "epochs.png", "shares.png"):
        assert (report / picture).exists() == (picture != "shares.png")  # two resolutions only
    columns = read_rows(report / "per_image.csv")[0]
    assert {"image", "label", "rs_net/seed2/48", "inet_48/seed0/32"} <= set(columns)


def test_some_trainings_have_settings_of_their_own(tmp_path: Path, calls: Path) -> None:
    assert run(tmp_path / "out", "table2", "--for", "inet_*", "lr=0.05", "--seeds", "2") == 0
    found = {f.parent.parent.name: read_config(f).lr for f in tmp_path.rglob("settings.toml")}
    assert found == {"inet_48": 0.05, "inet_32": 0.05, "parallel": 0.01, "rs_net": 0.01}
    report = tmp_path / "out" / "table2"
    assert json.loads((report / "run.json").read_text())["settings"]["lr"] == [0.05, 0.01]
    text = (report / "README.md").read_text()
    assert "| inet_48 | 48 | none | private | single | 1 | 0.05 |" in text
    assert "| rs_net | 48 32 | full | private | single | 1 | 0.01 |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["inet_*", "lr=-1"], "lr must not be negative, got -1"),
        (["other", "lr=1"], "got 'other'"),
        (["inet_*", "distill=full"], "distill cannot be given"),
        (["inet_*", "data=elsewhere"], "data cannot be given: all are tested on one set"),
    ],
)
def test_bad_settings_of_some_trainings_are_refused(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert run(tmp_path / "out", "table2", "--for", *given) == 2
    assert message in capsys.readouterr().err
    assert calls.read_text() == ""


def test_trainings_at_a_time_share_the_cores(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_PYTHON", FAKE)
    monkeypatch.setattr(experiments, "default_workers", lambda: 7)
    for jobs, given, workers in ((1, [], None), (2, [], 3), (9, [], 1), (2, ["--workers", "5"], 5)):
        output = tmp_path / f"{jobs} {given}"
        assert run(output, "table2", "--jobs", str(jobs), *given) == 0
        found = {read_config(file).workers for file in output.rglob("settings.toml")}
        assert found == {workers}


@pytest.mark.parametrize(
    "means",
    [
        {},
        {"workers": 3, "hw_decoder_load": 0.5, "dont_use_mmap": True},
        {"tolerate_truncated": True},
    ],
)
def test_a_test_decodes_as_its_training(means: dict[str, Any]) -> None:
    cfg = TrainConfig(**means)
    told = common_settings(_parse(["last.pt", *_shared(cfg)]))
    for name in ("workers", "hw_decoder_load", "dont_use_mmap", "tolerate_truncated"):
        assert told[name] == getattr(cfg, name)


def test_what_is_done_is_kept(tmp_path: Path, calls: Path) -> None:
    assert run(tmp_path / "out", "table2") == 0
    done = len(calls.read_text().splitlines())
    assert run(tmp_path / "out", "table2") == 0
    assert len(calls.read_text().splitlines()) == done
    # Another set needs one more network, and another test of one that is there.
    assert run(tmp_path / "out", "fig4") == 0
    made = [line.split() for line in calls.read_text().splitlines()[done:]]
    trained = [line for line in made if line[0] == "rsfast.train"]
    assert [Path(line[2]).parent.parent.name for line in trained] == ["parallel_shared_bn"]
    tested = {
        (Path(line[1]).parent.parent.name, line[line.index("--between") + 1])
        for line in made
        if line[0] == "rsfast.evaluate"
    }
    assert tested == {
        ("parallel_shared_bn", "interpolate"),
        ("rs_net", "interpolate"),
        ("rs_net", "nearest"),
    }
    assert all(
        line[line.index("--arch") + 1] == "resnet18"
        for line in made
        if line[0] == "rsfast.evaluate"
    )
    # What was tested for the first set is tested again with it, and is still there.
    done = len(calls.read_text().splitlines())
    assert run(tmp_path / "out", "table2") == 0
    assert len(calls.read_text().splitlines()) == done


def test_finished_runs_with_other_settings_are_refused(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "table2") == 0
    done = calls.read_text()
    assert run(tmp_path / "out", "table2", "--weight-decay", "0.5") == 2
    message = "was trained with weight_decay = 0.0001, this set has 0.5"
    assert message in capsys.readouterr().err
    assert calls.read_text() == done


def test_a_failure_is_named_and_the_rest_goes_on(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "parallel")
    assert run(tmp_path / "out", "table2") == 1
    screen = capsys.readouterr().out
    assert "parallel, seed 0: failed: fake: error: no luck, exit code 1, see" in screen
    assert screen.count("top-1") == 3
    assert not (tmp_path / "out" / "table2").exists()
    # A set that does not need it is reported.
    assert run(tmp_path / "out", "table2", "table5") == 1
    assert (tmp_path / "out" / "table5" / "README.md").exists()
    monkeypatch.delenv("FAKE_FAILS")
    assert run(tmp_path / "out", "table2") == 0


def test_half_a_test_is_not_taken_for_a_whole_one(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIES", "rs_net")
    assert run(tmp_path / "out", "table2") == 1
    assert (tmp_path / "out/runs/rs_net/seed0/test_interpolate/per_image.csv").exists()
    monkeypatch.delenv("FAKE_DIES")
    done = len(calls.read_text().splitlines())
    assert run(tmp_path / "out", "table2") == 0
    assert [line.split()[0] for line in calls.read_text().splitlines()[done:]] == [
        "rsfast.evaluate"
    ]


def test_a_training_that_ended_badly_is_not_taken_for_done(tmp_path: Path, calls: Path) -> None:
    assert run(tmp_path / "out", "table2") == 0
    folder = tmp_path / "out" / "runs" / "rs_net" / "seed0"
    (folder / "trained.toml").unlink()  # all else is there, as after a crash in the last save
    done = len(calls.read_text().splitlines())
    assert run(tmp_path / "out", "table2") == 0
    # The checkpoint is another one, and tested again.
    assert [line.split()[0] for line in calls.read_text().splitlines()[done:]] == [
        "rsfast.train",
        "rsfast.evaluate",
    ]


def test_runs_that_were_not_alike_are_not_compared(
    tmp_path: Path,
    calls: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(tmp_path / "out", "table5") == 0
    monkeypatch.setenv("FAKE_BATCH", "16")
    assert run(tmp_path / "out", "table2") == 2
    error = capsys.readouterr().err
    assert "rs_net/seed0 has total_batch = 8 and" in error
    assert "inet_48/seed0 has 16: repeat one of them" in error


def test_other_images_in_the_same_output_are_refused(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "table2") == 0
    log = tmp_path / "out" / "runs" / "rs_net" / "seed0" / "log.jsonl"
    log.write_text(log.read_text().replace('"step": 0', '"step": 0, "val_set": "7:other"', 1))
    assert run(tmp_path / "out", "table2") == 2
    assert "rs_net/seed0 was trained on other images than" in capsys.readouterr().err


def test_images_are_named_as_the_training_saw_them(tmp_path: Path) -> None:
    data = make_image_folder(tmp_path / "images", train=2, val=2)
    output = tmp_path / "run"
    whole = (data / "val" / "cat" / "0000.jpg").read_bytes()
    (data / "val" / "cat" / "0000.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    assert check_data(["check", str(data)]) == 1
    flags = "--arch tiny:network --resolutions 32 24 --batch-size 2 --epochs 1 --loader pil"
    flags += f" --workers 0 --exif honour --tolerate-truncated --data {data} --output {output}"
    assert train.main(flags.split()) == 0
    start = json.loads((output / "log.jsonl").read_text().splitlines()[0])
    found = _data_set(TrainConfig(data=str(data), exif="honour", tolerate_truncated=True))
    assert found == {name: start[name] for name in ("train_set", "val_set")}
    assert found["val_set"].startswith("4:")


def test_a_report_names_images_without_the_folders_of_this_machine() -> None:
    cfg = TrainConfig(train_data="/here/train-*.tar", val_data="/here/val-*.tar", precision="fp32")
    start = {"event": "start", "config": dataclasses.asdict(cfg)}
    assert results._images(start["config"]) == "train-*.tar and val-*.tar"
    assert results._images({"data": None}) == "the built-in set"
    listed = dataclasses.asdict(TrainConfig(data="/here/imagenet", val_list="/here/list.txt"))
    for config in (start["config"], listed):
        assert "/here" not in json.dumps(results._about([{**start, "config": config}]))


def test_another_list_of_labels_is_tested_anew(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("0\n1\n")
    cfg = TrainConfig(data="images", val_list=str(labels), output=str(tmp_path / "run"))
    job = Job(cfg, {"interpolate": [32]}, "one")
    (job.folder / "test_interpolate").mkdir(parents=True)
    (job.folder / "last.pt").touch()
    job.mark_tested("interpolate", [32])
    assert job.untested() == {}
    labels.write_text("1\n0\n")
    assert job.untested() == {"interpolate": [32]}
    job.mark_tested("interpolate", [32])
    other = dataclasses.replace(cfg, val_list=None, val_data="v.tar")
    assert dataclasses.replace(job, cfg=other).untested() == {"interpolate": [32]}
    assert dataclasses.replace(job, cfg=cfg).untested() == {}


def test_a_run_that_an_older_rsfast_has_finished_is_not_one_of_another_rule(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged = ["table2", "--ema-decay", "0.9"]
    assert run(tmp_path / "out", *averaged) == 0
    for mark in (tmp_path / "out").rglob("trained.toml"):
        mark.write_text(mark.read_text().replace("ema_warmup = true\n", ""))
    done = calls.read_text()
    assert run(tmp_path / "out", *averaged) == 2
    error = capsys.readouterr().err
    assert "was trained with ema_warmup = False, this set has True" in error
    assert "take the same settings (--no-ema-warmup), or another --output" in error
    assert run(tmp_path / "out", *averaged, "--no-ema-warmup") == 0
    assert calls.read_text() == done


def test_half_a_line_in_a_log_does_not_stop_a_set(tmp_path: Path, calls: Path) -> None:
    assert run(tmp_path / "out", "table2") == 0
    report = (tmp_path / "out" / "table2" / "README.md").read_bytes()
    with open(tmp_path / "out" / "runs" / "rs_net" / "seed0" / "log.jsonl", "a") as log:
        log.write('{"event": "step", "st')  # the machine went down
    assert run(tmp_path / "out", "table2") == 0
    assert (tmp_path / "out" / "table2" / "README.md").read_bytes() == report


def test_a_report_of_more_seeds_is_not_overwritten(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "table2", "--seeds", "2") == 0
    report = (tmp_path / "out" / "table2" / "README.md").read_bytes()
    assert run(tmp_path / "out", "table2") == 2
    assert "is of 2 seeds, and would be overwritten by 1" in capsys.readouterr().err
    assert (tmp_path / "out" / "table2" / "README.md").read_bytes() == report
    assert run(tmp_path / "out", "table2", "--seeds", "3") == 0


def test_two_commands_do_not_train_the_same_network(
    tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "runs" / "parallel" / "seed0"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(tmp_path / "out", "table2") == 1
    assert f"another process is at work in {folder}" in capsys.readouterr().out
    assert not (folder / "last.pt").exists()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_lets_trainings_save_and_starts_no_more(
    tmp_path: Path, calls: Path, number: str
) -> None:
    arguments = command_line(tmp_path / "out", "table2", "--jobs", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "rsfast.experiments", *arguments],
        env={**environment(), "FAKE_SLOW": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = tmp_path / "out" / "runs"
    while len(list(started.glob("*/*/started"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.Signals[number])
    screen, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert screen.count(": stopped\n") == 2
    assert screen.count(": not started\n") == 2
    assert "the same command goes on" in errors
    assert len(calls.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table2", "--distill", "full"], "distill cannot be given: it is what the rows"),
        (["table2", "--kd-type", "ens"], "cannot be given: it is what the rows of a set"),
        (["table2", "--seed=0"], "seed cannot be given: --seeds N takes seeds 0 to N - 1"),
        (["table2", "--resume", "auto"], "resume cannot be given: every run goes on by itself"),
        (["table2", "--continue-from", "runs/a"], "continue_from cannot be given: an ancestor fix"),
        (["table2", "--data", "nowhere"], "nowhere"),
        (["--data", "nowhere"], "sets come first and must be some of table2"),
        (["fig9", "--crop-area", "0.5", "1"], "crop_area must begin below 0.3"),
        (["fig9"], "crop_area must begin below 0.3"),  # the built-in set's recipe
        (["table2", "--loader", "synthetic"], "loader must decode images"),
        (["table4"], "sets come first and must be some of table2, table5, table6"),
        (["table2", "--seeds", "0"], "must be a number from 1 to 10000, got '0'"),
        (["table2", "--lr", "-1"], "lr must not be negative"),
        (["table2", "--resolutions", "64"], "at least two to compare, got (64,)"),
        (["table2", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_exits_with_two_and_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([*arguments, "--output", str(tmp_path)])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_real_networks_from_training_to_report(tmp_path: Path) -> None:
    data = make_image_folder(tmp_path / "data", train=8, val=5)
    flags = ["--epochs", "1", "--loader", "pil", "--workers", "0", "--data", str(data)]
    command = [sys.executable, "-m", "rsfast.experiments", "fig4", "table2", *flags]
    command += ["--output", str(tmp_path / "out"), "--jobs", str(os.cpu_count()), *SETTINGS]
    subprocess.run(command, env=environment(), check=True)
    for name in ("fig4", "table2"):
        assert "# " + name in (tmp_path / "out" / name / "README.md").read_text()
    rows = read_rows(tmp_path / "out" / "fig4" / "results.csv")
    unseen = [row for row in rows if row["resolution"] == "40"]
    methods = {"RS-Net, interpolated BN", "RS-Net, nearest BN"}
    assert {row["method"] for row in unseen} == methods
    about = (tmp_path / "out" / "fig4" / "run.json").read_text()
    assert str(tmp_path) not in about  # nothing of this machine
    assert json.loads(about)["environment"]["train_set"].startswith("16:")
