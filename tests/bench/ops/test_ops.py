"""The benchmarks' own bookkeeping; their times mean nothing here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import bench_switchable_bn_act as norm
from bench import bench_train_step, kernels, plots, roofline, train_step
from bench.record import check_alike
from bench.results_file import Results
from bench.shapes import batch_norm_layers, pooled_map


@pytest.mark.parametrize(
    ("arch", "layers", "elements"),
    # Outputs of all convolutions of one image at 224 pixels, and channels before pooling.
    [("resnet50", 53, 11.1), ("resnet18", 20, 2.48), ("mobilenetv2", 52, 6.68)],
)
def test_layers_are_those_of_the_network(arch: str, layers: int, elements: float) -> None:
    found = batch_norm_layers(arch)
    assert sum(found.values()) == layers
    at_224 = sum(count * layer.sizes[0][0] ** 2 * layer.channels for layer, count in found.items())
    assert at_224 / 1e6 == pytest.approx(elements, rel=0.01)
    channels = {"resnet50": 2048, "resnet18": 512, "mobilenetv2": 1280}[arch]
    assert pooled_map(arch).sizes == ((7, 7), (6, 6), (5, 5), (4, 4), (3, 3))
    assert pooled_map(arch).channels == channels


def test_bytes_of_a_two_kernel_design() -> None:
    plain, added = (
        next(layer for layer in norm.CASES if layer.residual is residual)
        for residual in (False, True)
    )
    size = sum(plain.level_rows(norm.NUM_IMAGES)) * plain.channels * 2
    assert norm.moved_bytes(plain, torch.bfloat16, "forward") == 3 * size
    assert norm.moved_bytes(plain, torch.bfloat16, "forward_backward") == 8 * size
    size = sum(added.level_rows(norm.NUM_IMAGES)) * added.channels * 4
    passes = 9 if added.activation is None else 10
    assert norm.moved_bytes(added, torch.float32, "forward_backward") == passes * size


def test_the_floors_are_those_of_the_papers_multiply_adds() -> None:
    floors = roofline.step_floors("resnet50", (224, 192, 160, 128, 96))
    assert floors.flops / 6e9 == pytest.approx(11.27, abs=0.01)
    # Batch norm alone moves 8 passes over 30.6 million elements in 16 bits, and its residuals.
    assert floors.bytes_16_bit > 2 * 8 * 30.6e6


def test_the_step_race_writes_images_per_second(tmp_path: Path) -> None:
    flags = "--archs resnet18 --batches 2 --resolutions 32 16 --precision fp32 --rounds 2 --steps 1"
    assert train_step.main([*flags.split(), "--output", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    for impl in bench_train_step.IMPLEMENTATIONS:
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
    assert "`python -m bench.train_step --archs resnet18 --batches 2" in readme
    assert "| train_step/resnet18/fp32/b2/rsfast_eager |" in readme


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
    train_step._race(bench_train_step.Setting("resnet18"), impls, 2, 1, results)
    names = [row["name"].split("/")[-1] for row in results.rows]
    assert names == ["authors_fp32", "rsfast_graph", "authors_amp"]
    assert all(row["rsfast_graph_in_this_race"] > 0 for row in results.rows)
    assert not alive


def test_plots_show_what_competes(tmp_path: Path) -> None:
    def row(name: str, value: float) -> dict:
        return {"name": name, "value": value, "unit": "us", "p25": value, "p75": value, "n": 3}

    rows = [
        row("card/copy_bandwidth", 4300.0),
        row("train_step/resnet50/fp32/b256/authors_fp32", 900.0),
        row("train_step/resnet50/bf16/b256/rsfast_graph", 2310.0),
        row("kernel/conv2d/resnet18/bf16/forward/rsfast", 9.0),
        row("kernel/conv2d/resnet18/bf16/forward/separate", 9.0),
        row("kernel/conv2d/56px-C64-C64-k3s1/bf16/forward/rsfast", 1.0),
        row("kernel/conv2d/56px-C64-C64-k3s1/bf16/forward/separate", 1.0),
        row("loader/pil/cpu", 100.0),
    ]
    panels = {title: set(bars) for title, bars in plots._panels(rows).items()}
    assert panels == {
        "train_step/resnet50/b256": {"authors_fp32 fp32", "rsfast_graph bf16"},
        "kernel/conv2d/resnet18/bf16/forward": {"rsfast", "separate"},
    }
    (tmp_path / "summary.json").write_text(json.dumps({"rows": rows}))
    assert plots.main([str(tmp_path)]) == 0
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")


def test_rivals_that_lose_differently_are_not_raced() -> None:
    losses = {"authors_fp32": 41.0, "rsfast_eager": 41.5, "separate_amp": 34.0}
    bench_train_step.check_losses(losses)
    with pytest.raises(AssertionError, match="rsfast_eager"):
        bench_train_step.check_losses({**losses, "rsfast_eager": 45.0})


def test_a_wrong_result_is_not_timed() -> None:
    exact = torch.linspace(1, 2, 10, dtype=torch.float64)
    runs = {
        "exact": lambda: [exact],
        "reference": lambda: [exact.half()],
        "good": lambda: [exact.half() * (1 + 2**-11)],
        "bad": lambda: [exact.half() * 1.01],
    }
    check_alike(runs, ["good"], list)
    with pytest.raises(AssertionError, match="bad is off by"):
        check_alike(runs, ["good", "bad"], list)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes with the shapes of a GPU")
def test_the_command_writes_rows_of_the_agreed_names(
    tmp_path: Path,
) -> None:
    flags = ["--output", str(tmp_path), "--archs", "resnet18", "--rounds", "2"]
    assert kernels.main(flags) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    expected = {
        "card/copy_bandwidth",
        "kernel/distillation_loss/R3-N8-K100/fp32/forward_backward/authors",
        "kernel/global_avg_pool/resnet18/fp32/forward/eager",
        "kernel/switchable_bn_act/resnet18/fp32/forward_backward/eager",
        "kernel/conv2d/resnet18/fp32/forward_backward/rsfast",
        "kernel/conv2d/64px-C3-C64-k7s2/fp32/forward/separate",
        "kernel/switchable_bn_act/32px-C64-relu/fp32/forward/reference",
    }
    assert expected <= set(rows)
    assert all(row["value"] > 0 and row["unit"] for row in rows.values())
    # With two rounds the median is a mean, and a sum of means is the mean of sums.
    in_all = sum(
        count * rows[f"kernel/switchable_bn_act/{layer}/fp32/forward/eager"]["value"]
        for layer, count in batch_norm_layers("resnet18", norm.RESOLUTIONS).items()
    )
    whole = rows["kernel/switchable_bn_act/resnet18/fp32/forward/eager"]["value"]
    assert whole == pytest.approx(in_all)
