"""The page of bars shows what competes."""

from __future__ import annotations

import json
from pathlib import Path

from bench.support import plots


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
        row("latency/resnet18/b1/t1/rsfast_ort_fp32_fast/64", 2.0),
        row("latency/resnet18/b1/t1/separate_ort_fp32/64", 2.0),
        row("latency/resnet18/b1/t1/rsfast_ort_fp32_fast/28", 1.0),
    ]
    panels = {title: set(bars) for title, bars in plots._panels(rows).items()}
    assert panels == {
        "train_step/resnet50/b256": {"authors_fp32 fp32", "rsfast_graph bf16"},
        "kernel/conv2d/resnet18/bf16/forward": {"rsfast", "separate"},
        "latency/resnet18/b1/t1/64": {"rsfast_ort_fp32_fast", "separate_ort_fp32"},
    }
    (tmp_path / "summary.json").write_text(json.dumps({"rows": rows}))
    assert plots.main([str(tmp_path)]) == 0
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")
