"""`python -m rsfast.latency`: what it measures, in what order, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy_helpers import RESOLUTIONS, Exported, end_process
from rsfast import latency
from rsfast.deploy.manifest import VALIDATION_FILE
from rsfast.deploy.table import Table
from rsfast.files.tables import read_rows, write_rows
from rsfast.latency import Configuration, Row, main, measure

COLUMNS = [
    *("runtime", "precision", "mode", "threads", "batch", "resolution"),
    *("p50_ms", "p95_ms", "load_ms", "memory_mib", "switch_ms", "rounds", "top1"),
]


@pytest.fixture
def accuracy(tmp_path: Path) -> Path:
    """As rsfast.evaluate writes it, of more resolutions than were trained."""
    top1 = {"64": 71.0, "57": 70.0, "48": 69.0, "32": 60.0, "ensemble": 73.0}
    rows = ({"resolution": r, "trained": r != "57", "top1": value} for r, value in top1.items())
    write_rows(tmp_path / "accuracy.csv", rows)
    return tmp_path / "accuracy.csv"


def run(folder: Path, *flags: str, without: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process that cannot import the package of this path's name."""
    without.mkdir(parents=True)
    (without / "__init__.py").write_text(f"raise ImportError('{without.name} is not to be had')\n")
    path = os.pathsep.join([str(without.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "rsfast.latency", str(folder), *flags],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=Path(latency.__file__).parents[1],
    )


def test_the_command_writes_a_table_and_a_picture_and_needs_no_torch(
    exported: Exported, accuracy: Path, tmp_path: Path
) -> None:
    output = tmp_path / "measured"
    flags = "--mode fast small --batch 1 2 --rounds 3 --precision fp32 bf16".split()
    flags += ["--accuracy", str(accuracy), "--output", str(output)]
    done = run(exported.folder, *flags, without=tmp_path / "absent" / "torch")
    assert done.returncode == 0, done.stderr
    assert "left out: precision bf16 needs runtime openvino, got onnxruntime" in done.stdout
    rows = read_rows(output / "latency.csv")
    assert list(rows[0]) == COLUMNS
    found = [(row["mode"], int(row["batch"]), int(row["resolution"])) for row in rows]
    modes = ("fast", "small")
    assert found == [(mode, n, r) for mode in modes for n in (1, 2) for r in RESOLUTIONS]
    for row in rows:
        assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"])
        assert 0 < float(row["memory_mib"]) < 1000
        assert float(row["load_ms"]) > 0
        assert abs(float(row["switch_ms"])) < 1000
        assert row["rounds"] == "3"
        assert float(row["top1"]) == {64: 71.0, 48: 69.0, 32: 60.0}[int(row["resolution"])]
    with Image.open(output / "latency.png") as picture:
        assert picture.width > picture.height, "two panels, one for each batch size"
    table = Table.read(output / "latency.csv", mode="fast", batch=1)
    assert [row.resolution for row in table.rows] == list(RESOLUTIONS)


def test_without_matplotlib_the_table_is_written_all_the_same(
    exported: Exported, tmp_path: Path
) -> None:
    flags = ["--rounds", "1", "--mode", "small", "--output", str(tmp_path / "measured")]
    done = run(exported.folder, *flags, without=tmp_path / "absent" / "matplotlib")
    assert done.returncode == 0, done.stderr
    assert "no picture, matplotlib is not to be had: pip install matplotlib" in done.stderr
    assert [path.name for path in (tmp_path / "measured").iterdir()] == ["latency.csv"]
    assert len(read_rows(tmp_path / "measured" / "latency.csv")) == len(RESOLUTIONS)


def test_int8_has_no_accuracy_but_its_own(
    exported: Exported, accuracy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(folder: Path, configuration: Configuration, rounds: int) -> list[Row]:
        values = dict.fromkeys(("p50_ms", "p95_ms", "load_ms", "memory_mib", "switch_ms"), 1.0)
        parts = dataclasses.asdict(configuration) | values
        return [Row(**parts, resolution=r, rounds=rounds) for r in RESOLUTIONS]

    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    shutil.copy(folder / "model.onnx", folder / "model.int8.onnx")
    monkeypatch.setattr(latency, "_in_own_process", measured)
    arguments = [str(folder), "--precision", "fp32", "int8", "--accuracy", str(accuracy)]

    def top1() -> list[str]:
        return [row["top1"] for row in read_rows(folder / "latency.csv")]

    assert main(arguments) == 0
    assert top1() == ["71.0", "69.0", "60.0", "", "", ""]
    checked = {name: {"64": 70.5, "48": 68.0, "32": 50.0} for name in ("fp32", "int8")}
    (folder / VALIDATION_FILE).write_text(json.dumps({"top1": checked}))
    assert main(arguments) == 0
    assert top1() == ["71.0", "69.0", "60.0", "70.5", "68.0", "50.0"]
    assert main(arguments[:4]) == 0
    assert top1() == 2 * ["70.5", "68.0", "50.0"]
    (folder / VALIDATION_FILE).write_text("{")
    assert main(arguments) == 2


def test_without_accuracies_the_picture_shows_resolutions(
    exported: Exported, tmp_path: Path
) -> None:
    arguments = [str(exported.folder), "--rounds", "1", "--mode", "small"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert {row["top1"] for row in read_rows(tmp_path / "latency.csv")} == {""}
    assert (tmp_path / "latency.png").exists()


class Clock:
    """A network whose calls take known times: longer at the first call after another size."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.now_ns = 0

    def __call__(self, images: np.ndarray) -> None:
        size = images.shape[2]
        switched = not self.calls or self.calls[-1] != size
        self.calls.append(size)
        self.now_ns += (size + 7 * switched) * 1_000_000

    def read(self) -> int:
        return self.now_ns

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(latency, "load", lambda *_, **__: self)
        monkeypatch.setattr(latency.time, "perf_counter_ns", self.read)


def turns(calls: list[int]) -> Iterator[list[int]]:
    """The calls one after another at one size."""
    start = 0
    for n in range(1, len(calls) + 1):
        if n == len(calls) or calls[n] != calls[start]:
            yield calls[start:n]
            start = n


@pytest.mark.parametrize("resolutions", [RESOLUTIONS, (64, 48), (48,)], ids=str)
def test_turns_are_in_random_order_and_begin_with_a_switch(
    resolutions: tuple[int, ...],
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(exported.folder, tmp_path / "copy")
    manifest = latency.Manifest.read(folder)
    dataclasses.replace(manifest, resolutions=resolutions).write(folder)
    net = Clock()
    net.use(monkeypatch)
    rows = measure(folder, Configuration("onnxruntime", "fp32", "small", 1, 1), rounds=20)
    assert [row.resolution for row in rows] == list(resolutions)
    for row in rows:
        assert (row.p50_ms, row.p95_ms) == (row.resolution, row.resolution)
        assert row.switch_ms == (7 if len(resolutions) > 1 else None)
        assert row.load_ms == 0
    if len(resolutions) > 1:
        warm_up = 2 * len(resolutions)
        order = list(turns(net.calls[warm_up:]))
        assert [len(turn) for turn in order] == [5] * 20 * len(resolutions)
    if len(resolutions) > 2:
        sizes = [turn[0] for turn in order]
        rounds = {tuple(sizes[n : n + 3]) for n in range(0, len(sizes), 3)}
        assert len(rounds) > 3, "orders differ"


@pytest.mark.parametrize(("share", "warned"), [(0.01, False), (0.4, True)])
def test_a_busy_machine_is_warned_of(
    share: float,
    warned: bool,
    exported: Exported,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Clock()
    net.use(monkeypatch)
    monkeypatch.setattr(latency, "waited_ns", lambda: int(share * net.now_ns))
    measure(exported.folder, Configuration("onnxruntime", "fp32", "small", 1, 1), rounds=2)
    message = "threads 1, batch 1 waited 40% of the time for a core that others had"
    assert (message in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--threads 0", "threads must be at least 1, got 0"),
        ("--batch 0", "batch must be at least 1, got 0"),
        ("--rounds 0", "rounds must be at least 1, got 0"),
        ("--precision bf16", "precision bf16 needs runtime openvino"),
        ("--precision fp32 int8", "export with --int8"),
        ("--accuracy nowhere.csv", "nowhere.csv must be a CSV file with resolution and top1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    flags: str,
    message: str,
    exported: Exported,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latency, "_in_own_process", lambda *_: pytest.fail("it was measured"))
    assert main([str(exported.folder), *flags.split()]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("rsfast.latency: error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_accuracies_of_other_resolutions_are_refused(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "accuracy.csv", [{"resolution": 64, "top1": 71.0}])
    assert main([str(exported.folder), "--accuracy", str(tmp_path / "accuracy.csv")]) == 2
    assert "at all resolutions, [48, 32] are missing" in capsys.readouterr().err


def test_a_process_that_was_killed_is_an_error(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "measure", end_process)
    assert main([str(exported.folder)]) == 1
    assert "onnxruntime fp32 fast, threads 1, batch 1 was killed" in capsys.readouterr().err
