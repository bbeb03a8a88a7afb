"""What the table of convolutions makes of times; those it takes here mean nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.step import conv_table
from bench.support import shapes
from bench.support.record import check_alike
from bench.support.shapes import ConvLayer

DENSE = ConvLayer(((9, 8), (5, 5), (2, 1)), 4, 6, 3, 2, 1)
DEPTHWISE = ConvLayer(((6, 6), (3, 3)), 8, 8, 3, 1, 8)
# 400, 200 and 100 MFLOP: 4, 2 and 0.5 TFLOP/s, all together 2.
LINE = conv_table.Line(
    "net", "14px", "bf16", "dgrad", 3, (4e8, 2e8, 1e8), (100.0, 100.0, 200.0), 350.0
)


def test_operations_are_those_of_the_output() -> None:
    each = 2 * 2 * (4 * 9 * 6)
    assert conv_table.level_flops(DENSE, 2) == [5 * 4 * each, 3 * 3 * each, 1 * 1 * each]
    assert conv_table.level_flops(DEPTHWISE, 1) == [36 * 2 * 9 * 8, 9 * 2 * 9 * 8]


def test_small_levels_are_held_against_the_best_one() -> None:
    assert LINE.rates == pytest.approx([4.0, 2.0, 0.5, 2.0])
    assert LINE.below_half((224, 160, 96)) == [96]
    # At 4 TFLOP/s all of it takes 175 us, in each of three layers.
    assert LINE.small_levels_us == pytest.approx(3 * (400 - 175))
    assert LINE.packing_us == pytest.approx(3 * (350 - 400))
    even = LINE._replace(level_us=(100.0, 50.0, 25.0))
    assert even.below_half((224, 160, 96)) == []
    assert even.small_levels_us == pytest.approx(0)


def test_the_table_has_a_line_per_pass() -> None:
    lines = [LINE, LINE._replace(direction="wgrad", level_us=(100.0, 50.0, 25.0))]
    heads, rule, first, second = conv_table.markdown(lines, (224, 160, 96), 8.0).splitlines()
    assert heads.startswith("| network | layer | type | pass | number | 224 | 160 | 96 | all |")
    assert rule.count("---") == heads.count("|") - 1
    cells = "| net | 14px | bf16 | dgrad | 3 | 4 | 2 | 0.5 | 2 | 25.0% | 96 | 675 | -150 |"
    assert first == cells
    assert " | wgrad | 3 | 4 | 4 | 4 | 2 | 25.0% | none | 0 | 525 |" in second


@pytest.mark.parametrize("direction", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("layer", [DENSE, DEPTHWISE], ids=str)
def test_levels_and_the_operator_compute_the_same(layer: ConvLayer, direction: str) -> None:
    runs = conv_table.make_runs(layer, shapes.DTYPES[0], direction, 2)
    assert list(runs) == ["exact", "reference", *map(str, range(len(layer.sizes))), "all"]
    check_alike(runs, ["all"], list)
    (first,), (packed,) = runs["0"](), runs["all"]()
    size, channels = {
        "forward": (layer.out_sizes[0], layer.c_out),
        "dgrad": (layer.sizes[0], layer.c_in),
        "wgrad": ((3, 3), layer.c_in // layer.groups),
    }[direction]
    assert first.shape == (layer.c_out if direction == "wgrad" else 2, channels, *size)
    if direction != "wgrad":
        torch.testing.assert_close(
            packed[: first.numel() // channels].view(2, *size, channels).permute(0, 3, 1, 2), first
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="small settings are those of a CPU")
def test_the_command_writes_rows_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = Counter(dict(list(shapes.conv_layers("resnet18", (64, 48, 32)).items())[:2]))
    monkeypatch.setattr(shapes, "conv_layers", lambda *_: few)
    flags = ["--output", str(tmp_path), "--archs", "resnet18", "--batch", "1", "--rounds", "2"]
    assert conv_table.main(flags) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    image, second = map(str, few)
    for layer, passes in ((image, "forward wgrad"), (second, "forward dgrad wgrad")):
        for direction in passes.split():
            for level in (64, 48, 32, "all"):
                row = rows[f"conv/resnet18/{layer}/fp32/{direction}/{level}"]
                assert row["unit"] == "us"
                assert min(row["value"], row["tflop_s"], row["share_of_matmul"]) > 0
    assert f"conv/resnet18/{image}/fp32/dgrad/all" not in rows
    readme = (tmp_path / "README.md").read_text()
    assert "Convolutions of 1 images per level" in readme
    assert f"| resnet18 | {second} | fp32 | dgrad | {few[list(few)[1]]} |" in readme
    assert capsys.readouterr().out.count("us per step to win") == 5
