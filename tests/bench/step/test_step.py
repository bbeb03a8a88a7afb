"""The race of steps keeps its books; its times mean nothing here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.step import __main__ as command
from bench.step import bench_loader, bench_train_step
from bench.support.results_file import Results
from rsfast.data.builtin import builtin_root


def test_the_race_writes_images_per_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = builtin_root(tmp_path / "cache", num_train=20, num_val=10)
    monkeypatch.setattr(bench_loader, "builtin_root", lambda: root)
    monkeypatch.setattr(bench_loader, "BATCH", 4)
    monkeypatch.setattr(bench_loader, "BATCHES", 1)
    flags = "--archs resnet18 --batches 2 --resolutions 32 16 --precision fp32 --rounds 2 --steps 1"
    assert command.main([*flags.split(), "--output", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    for impl in bench_train_step.implementations("fp32"):
        row = rows[f"train_step/resnet18/fp32/b2/{impl}"]
        assert row["unit"] == "images/s"
        assert row["n"] == 2
        assert row["value"] > 0
    ours = [row["value"] for name, row in rows.items() if "/rsfast_" in name]
    if not torch.cuda.is_available():
        assert rows["loader/pil/cpu"]["demand_images_per_s"] == max(ours)
    assert {"end_to_end/resnet18/fp32/b2/synthetic", "card/floor_flops/resnet18"} <= set(rows)
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")
    readme = (tmp_path / "README.md").read_text()
    assert "`python -m bench.step --archs resnet18 --batches 2" in readme
    assert "| train_step/resnet18/fp32/b2/rsfast_eager |" in readme


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="these are the implementations of a CPU")
def test_all_that_race_lose_the_same(precision: str) -> None:
    setting = bench_train_step.Setting("resnet18", 4, precision, (48, 32))
    names = bench_train_step.implementations(precision)
    assert names[-1] == "rsfast_eager"
    assert ("authors_amp" in names) == (precision == "bf16")
    losses = {name: float(bench_train_step.make_step(setting, name)()) for name in names}
    bench_train_step.check_losses(losses)
    assert losses["separate_amp"] < losses["authors_fp32"]  # which has more terms


def test_a_network_with_groups_races() -> None:
    setting = bench_train_step.Setting("resnext50_32x4d", 4, "fp32", (64,))
    names = ("authors_fp32", "rsfast_eager")
    losses = {name: float(bench_train_step.make_step(setting, name)()) for name in names}
    assert losses["rsfast_eager"] == pytest.approx(losses["authors_fp32"], rel=1e-4)


def test_what_does_not_fit_beside_the_others_races_rsfast_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[str] = []

    class Run:
        """Memory for two at a time; the greedy one never fits."""

        def __init__(self, impl: str) -> None:
            if len(alive) == 2 or impl == "greedy":
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.impl = impl
            alive.append(impl)

        def __call__(self) -> torch.Tensor:
            return torch.ones(())

        def __del__(self) -> None:
            if hasattr(self, "impl"):
                alive.remove(self.impl)

    monkeypatch.setattr(bench_train_step, "make_step", lambda _, impl: Run(impl))
    results = Results(tmp_path, "race", torch.device("cpu"))
    impls = ["authors_fp32", "authors_amp", "greedy", "rsfast_graph"]
    command._race(bench_train_step.Setting("resnet18"), impls, 2, 1, results)
    names = [row["name"].split("/")[-1] for row in results.rows]
    assert names == ["authors_fp32", "rsfast_graph", "authors_amp"]
    assert all(row["rsfast_graph_in_this_race"] > 0 for row in results.rows)
    assert not alive


def test_rivals_that_lose_differently_are_not_raced() -> None:
    losses = {"authors_fp32": 41.0, "rsfast_eager": 41.5, "separate_amp": 34.0}
    bench_train_step.check_losses(losses)
    with pytest.raises(AssertionError, match="rsfast_eager"):
        bench_train_step.check_losses({**losses, "rsfast_eager": 45.0})
