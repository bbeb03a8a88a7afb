"""The benchmarks of operations keep their books; their times mean nothing here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.ops import __main__ as command
from bench.ops import bench_switchable_bn_act as norm


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes with the shapes of a GPU")
def test_the_command_writes_rows_of_the_agreed_names(tmp_path: Path) -> None:
    flags = ["--output", str(tmp_path), "--archs", "resnet18", "--rounds", "2"]
    assert command.main(flags) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "summary.json").read_text())["rows"]}
    expected = {
        "card/copy_bandwidth",
        "kernel/distillation_loss/R3-N8-K100/fp32/forward_backward/authors",
        "kernel/distillation_loss/R3-N8-K100-mixed/fp32/forward_backward/reference",
        "kernel/distillation_loss/R3-N576-K11-pixels/fp32/forward_backward/reference",
        "kernel/global_avg_pool/resnet18/fp32/forward/eager",
        "kernel/switchable_bn_act/resnet18/fp32/forward_backward/eager",
        "kernel/conv2d/resnet18/fp32/forward_backward/rsfast",
        "kernel/subsample/resnet18/fp32/forward_backward/slices",
        "kernel/conv2d/64px-C3-C64-k7s2/fp32/forward/separate",
        "kernel/switchable_bn_act/16px-C64-relu/fp32/forward/reference",
        "kernel/bn_act_max_pool/32px-C64-relu/fp32/forward/separate",
    }
    assert expected <= set(rows)
    assert not any("switchable_bn_act/32px" in name for name in rows)  # the stem's is pooled
    assert all(row["value"] > 0 and row["unit"] for row in rows.values())
    # With two rounds the median is a mean, and a sum of means is the mean of sums.
    in_all = sum(
        count * rows[f"kernel/switchable_bn_act/{layer}/fp32/forward/eager"]["value"]
        for layer, count in norm.layers("resnet18").items()
    )
    whole = rows["kernel/switchable_bn_act/resnet18/fp32/forward/eager"]["value"]
    assert whole == pytest.approx(in_all)
