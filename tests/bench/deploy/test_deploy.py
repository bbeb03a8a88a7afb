"""The race of deployed networks: what is compared, in which order, and what the page says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.deploy import __main__ as command
from bench.deploy import report
from bench.deploy.accuracy import check_logits, distances
from bench.deploy.implementations import ANCHORS, IMPLEMENTATIONS, MATMULS
from bench.deploy.race import race
from rsfast.models import create_model
from rsfast.training.checkpoint import save_weights

_BY_NAME = {impl.name: impl for impl in IMPLEMENTATIONS}


class Recorder:
    """In a process's place: says what it was asked."""

    def __init__(self, name: str, log: list[tuple[str, int, int]]) -> None:
        self.name, self.log = name, log

    def visit(self, before: int, size: int) -> dict:
        self.log.append((self.name, before, size))
        return {"ns": [9_000_000, 1_000_000, 2_000_000], "waited": 0.5}


def test_names_are_unique_and_anchors_compete() -> None:
    assert len(_BY_NAME) == len(IMPLEMENTATIONS)
    assert set(ANCHORS.values()) <= set(_BY_NAME)
    assert {m.name for m in MATMULS} == {"matmul_fp32", "matmul_bf16", "matmul_int8"}


def test_every_pair_is_visited_once_a_round_after_another_size() -> None:
    log: list[tuple[str, int, int]] = []
    children = {name: Recorder(name, log) for name in ("a", "b")}
    sizes = {"a": (64, 48, 32), "b": (7,)}
    found = race(children, sizes, 5, 1.0, np.random.default_rng(0))
    rounds = [log[start : start + 4] for start in range(0, len(log), 4)]
    assert len(rounds) == 5
    for visits in rounds:
        pairs = Counter((name, size) for name, _, size in visits)
        assert pairs == Counter([("a", 64), ("a", 48), ("a", 32), ("b", 7)])
        assert all(before != size for name, before, size in visits if name == "a")
    assert len({tuple((name, size) for name, _, size in visits) for visits in rounds}) > 1
    assert found["a", 64].first_ms == [9.0] * 5
    assert found["a", 64].steady_ms == [1.0, 2.0] * 5
    assert found["b", 7].waited == [0.5] * 5


def test_two_rounds_are_run_whatever_the_time() -> None:
    log: list[tuple[str, int, int]] = []
    race({"a": Recorder("a", log)}, {"a": (8, 4)}, 50, 0.0, np.random.default_rng(0))
    assert len(log) == 2 * 2


def test_wrong_logits_are_refused_by_name_and_size() -> None:
    fp32, int8 = _BY_NAME["rsfast_ort_fp32_small"], _BY_NAME["rsfast_ort_int8_small"]
    anchor = _BY_NAME[ANCHORS["int8"]]
    check_logits([fp32], {fp32.name: {64: 9e-5}})
    with pytest.raises(RuntimeError, match=r"rsfast_ort_fp32_small .* at 32 pixels, is off by 2"):
        check_logits([fp32], {fp32.name: {64: 0.0, 32: 2e-4}})
    with pytest.raises(RuntimeError, match="is off by nan"):
        check_logits([fp32], {fp32.name: {64: float("nan")}})
    check_logits([int8, anchor], {int8.name: {64: 0.19}, anchor.name: {64: 0.1}})
    with pytest.raises(RuntimeError, match="rsfast_ort_int8_small"):
        check_logits([int8, anchor], {int8.name: {64: 0.21}, anchor.name: {64: 0.1}})


def test_distance_is_relative_to_the_size_of_the_logits() -> None:
    exact = {8: np.array([3.0, 4.0])}
    assert distances({"a": {8: np.array([3.0, 4.5])}}, exact) == {"a": {8: pytest.approx(0.1)}}


def test_arithmetic_that_may_differ_in_accuracy_is_told_apart() -> None:
    found = {name: impl.arithmetic for name, impl in _BY_NAME.items()}
    assert found["rsfast_ort_fp32_fast"] == found["separate_openvino_fp32"] == found["pytorch_fp32"]
    assert found["rsfast_openvino_bf16_fast"] == found["separate_openvino_bf16"]
    assert found["rsfast_openvino_bf16_fast"] != found["rsfast_openvino_bf16_small"]
    int8 = {found[n] for n in ("rsfast_ort_int8_fast", "rsfast_openvino_int8_fast")}
    assert len(int8 | {found["separate_ort_int8"]}) == 3
    assert found["rsfast_ort_int8_fast"] == found["rsfast_ort_int8_small"]


@pytest.mark.slow
def test_command_races_a_network_and_writes_the_page(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = create_model("resnet18", resolutions=(48, 32), num_classes=3)
    checkpoint = tmp_path / "net.safetensors"
    save_weights(model, torch.zeros(2), checkpoint)
    impls = ["rsfast_ort_fp32_fast", "rsfast_ort_int8_small", "separate_ort_fp32", "pytorch_fp32"]
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    arguments += ["--threads", "1", "--rounds", "4", "--heats", "2", "--impls", *impls]
    assert command.main(arguments) == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    by_name = {row["name"]: row for row in rows}
    for impl in impls:
        for resolution in (48, 32):
            row = by_name[f"latency/resnet18/b1/t1/{impl}/{resolution}"]
            assert row["n"] == 4 * 4
            assert row["value"] > 0
            assert f"switch/resnet18/b1/t1/{impl}/{resolution}" in by_name
        assert by_name[f"load/resnet18/t1/{impl}"]["n"] == 2
        assert by_name[f"memory/resnet18/t1/{impl}"]["value"] > 0
    assert by_name["disk/resnet18/separate_ort_fp32"]["files"] == 2
    assert by_name["card/matmul_fp32/t1"]["value"] > 0
    page = (tmp_path / "out" / "README.md").read_text()
    assert "latency of rsfast_ort_fp32_fast | separate_ort_fp32 | 1 |" in page
    assert "smooth patterns" in page
    assert (tmp_path / "out" / report.PICTURE).read_bytes().startswith(b"\x89PNG")
