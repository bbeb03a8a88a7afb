"""Stages that fail, hang or lack something hide nothing of the others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.first_day import __main__ as command
from bench.first_day.report import write_report
from bench.first_day.run import outcomes, run_stages
from bench.first_day.stages import STAGES, Stage

ROOT = Path(__file__).parents[3]


def stage(name: str, *scripts: str, minutes: float = 1, lacks: str | None = None) -> Stage:
    """A stage that runs Python scripts, each of which finds its folder in sys.argv[1]."""
    return Stage(
        name=name,
        about=f"shows {name}",
        commands=lambda folder: [[sys.executable, "-c", s, str(folder)] for s in scripts],
        minutes=minutes,
        lacks=lambda: lacks,
    )


SLEEP = "import subprocess, sys; subprocess.run(['sleep', '60'])"
COUNT = "import sys, pathlib; open(pathlib.Path(sys.argv[1]) / 'runs', 'a').write('x')"


def test_each_stage_runs_whatever_became_of_the_others(tmp_path: Path) -> None:
    stages = [
        stage("broken", "print('the reason'); raise SystemExit(3)", COUNT),
        stage("hanging", SLEEP, minutes=0.02),
        stage("lacking", COUNT, lacks="a CUDA device"),
        stage("good", COUNT, COUNT),
    ]
    pages: list[str] = []
    start = time.monotonic()
    run_stages(stages, tmp_path, 1, lambda: pages.append(write_report(stages, tmp_path)))
    assert time.monotonic() - start < 40, "the process that a stage had started must end with it"
    found = {outcome.name: outcome for outcome in outcomes(stages, tmp_path)}
    assert [o.status for o in found.values()] == ["failed", "out of time", "left out", "passed"]
    assert "with 3" in found["broken"].why
    assert found["lacking"].why == "needs a CUDA device"
    assert not (tmp_path / "broken" / "runs").exists(), "a failed command ends its stage"
    assert (tmp_path / "good" / "runs").read_text() == "xx"
    assert len(pages) == 4
    assert "| good | not run |" in pages[2]
    assert "Not run yet: good, at most 1 minutes" in pages[2]
    assert "the reason" in pages[0]


def test_the_same_command_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    fixed, order = tmp_path / "fixed", tmp_path / "order"
    log = "import sys, pathlib; name = pathlib.Path(sys.argv[1]).name"
    log += f"; open({str(order)!r}, 'a').write(name + ' ')"
    stages = [
        stage("good", log),
        stage("bad", f"{log}; raise SystemExit(not pathlib.Path({str(fixed)!r}).exists())"),
        stage("last", log),
    ]
    run_stages(stages[:2], tmp_path, 1, lambda: None)  # cut off before the last one
    fixed.touch()
    run_stages(stages, tmp_path, 1, lambda: None)
    assert order.read_text() == "good bad last bad ", "what has run already comes last"
    assert {outcome.status for outcome in outcomes(stages, tmp_path)} == {"passed"}


def test_a_stage_finds_nothing_of_an_earlier_try(tmp_path: Path) -> None:
    once = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]) / 'run'; p.mkdir(); raise SystemExit(1)"
    )
    for _ in range(2):
        run_stages([stage("bad", once)], tmp_path, 1, lambda: None)
        assert "FileExistsError" not in (tmp_path / "bad" / "log.txt").read_text()


def test_what_passed_on_another_device_runs_again(tmp_path: Path) -> None:
    run_stages([stage("good", COUNT)], tmp_path, 1, lambda: None)
    path = tmp_path / "good" / "stage.json"
    outcome = json.loads(path.read_text())
    assert outcome["device"] == "cpu" or torch.cuda.is_available()
    path.write_text(json.dumps({**outcome, "device": "another"}))
    run_stages([stage("good", COUNT)], tmp_path, 1, lambda: None)
    assert json.loads(path.read_text())["device"] == outcome["device"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_stage_too_and_is_said_in_a_sentence(
    tmp_path: Path, number: signal.Signals
) -> None:
    words = [sys.executable, "-m", "bench.first_day", "--output", str(tmp_path / "day")]
    process = subprocess.Popen(
        [*words, "--stages", "training"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "day" / "training" / "log.txt"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.rstrip().endswith("the same command goes on")
    assert "| training | cut off |" in (tmp_path / "day" / "report.md").read_text()
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"--output {tmp_path}/day/training" not in running


@pytest.mark.parametrize(
    ("flags", "words"), [("--minutes 0", "--minutes must be"), ("--output {file}", "is a file")]
)
def test_bad_flags_are_refused(tmp_path: Path, flags: str, words: str, capsys) -> None:
    (tmp_path / "file").touch()
    given = ["--output", str(tmp_path), *flags.format(file=tmp_path / "file").split()]
    with pytest.raises(SystemExit, match="2"):
        command.main(given)
    assert words in capsys.readouterr().err


def test_what_there_is_no_time_for_is_not_begun(tmp_path: Path) -> None:
    stages = [stage("long", SLEEP), stage("late", COUNT)]
    run_stages(stages, tmp_path, 0.02, lambda: None)
    assert [o.status for o in outcomes(stages, tmp_path)] == ["out of time", "not run"]


def test_a_command_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    missing = Stage(name="missing", about="", commands=lambda _: [["no-such-command"]], minutes=1)
    run_stages([missing], tmp_path, 1, lambda: None)
    assert outcomes([missing], tmp_path)[0].status == "failed"
    assert "no-such-command" in (tmp_path / "missing" / "log.txt").read_text()


def test_the_command_writes_a_page(tmp_path: Path, capsys) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert command.main(["--output", str(tmp_path / "day"), "--stages", "tests_dali"]) == 0
    page = (tmp_path / "day" / "report.md").read_text()
    assert "| tests_dali | left out |" in page
    assert page in capsys.readouterr().out
    # One that stayed would keep workers of this process, which inherit it, from being ended.
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    outcome = json.loads((tmp_path / "day" / "tests_dali" / "stage.json").read_text())
    assert outcome["why"] == "needs a CUDA device"


def test_what_the_stages_name_exists() -> None:
    for each in STAGES:
        for words in each.commands(ROOT / "nowhere"):
            files = [w for w in words if w.startswith(("tests/", "--ignore=tests/"))]
            assert all((ROOT / word.removeprefix("--ignore=")).exists() for word in files), files
            if "-m" in words[:2]:
                module = words[words.index("-m") + 1].replace(".", "/")
                places = (ROOT / f"{module}.py", ROOT / module / "__main__.py")
                assert module == "pytest" or any(path.exists() for path in places), module
