"""Stages that fail, hang or lack something hide nothing of the others."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

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
    assert "| good | not reached |" in pages[2]
    assert "the reason" in pages[0]


def test_the_same_command_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    stages = [
        stage("good", COUNT),
        stage("bad", COUNT + f"; raise SystemExit(not pathlib.Path({str(fixed)!r}).exists())"),
        stage("last", COUNT),
    ]
    run_stages(stages[:2], tmp_path, 1, lambda: None)  # cut off before the last one
    fixed.touch()
    run_stages(stages, tmp_path, 1, lambda: None)
    runs = [(tmp_path / s.name / "runs").read_text() for s in stages]
    assert runs == ["x", "xx", "x"]
    assert {outcome.status for outcome in outcomes(stages, tmp_path)} == {"passed"}


def test_what_there_is_no_time_for_is_not_begun(tmp_path: Path) -> None:
    stages = [stage("long", SLEEP), stage("late", COUNT)]
    run_stages(stages, tmp_path, 0.02, lambda: None)
    assert [o.status for o in outcomes(stages, tmp_path)] == ["out of time", "not reached"]


def test_a_command_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    missing = Stage(name="missing", about="", commands=lambda _: [["no-such-command"]], minutes=1)
    run_stages([missing], tmp_path, 1, lambda: None)
    assert outcomes([missing], tmp_path)[0].status == "failed"
    assert "no-such-command" in (tmp_path / "missing" / "log.txt").read_text()


def test_the_command_writes_a_page(tmp_path: Path, capsys) -> None:
    assert command.main(["--output", str(tmp_path / "day"), "--stages", "tests_dali"]) == 0
    page = (tmp_path / "day" / "report.md").read_text()
    assert "| tests_dali | left out |" in page
    assert page in capsys.readouterr().out
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
