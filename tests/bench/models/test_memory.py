"""Modelled memory: storages count while anybody holds them, and docs/memory.md is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.models.memory import RESOLUTIONS, Allocations, Case, memory_of, rows_of_doc
from without_gpu.pretended import BACKWARDS, pretended_gpu

DOC = Path(__file__).parents[3] / "docs" / "memory.md"
KIB = 256  # float32 numbers


def test_storages_count_until_nobody_holds_them() -> None:
    first = torch.ones(KIB)
    with Allocations("cpu") as count:
        count.add(first)
        count.add(first.view(2, -1))
        assert count.now == 1024
        second = first + 1
        view = second[1:]
        del second
        assert (count.now, count.peak) == (2048, 2048)
        view.add_(1)
        del view
        assert (count.now, count.peak) == (1024, 2048)
        torch.ones(3 * KIB)
        del first
    assert (count.now, count.peak) == (0, 4096)


def test_what_autograd_saves_counts_until_the_backward() -> None:
    with Allocations("cpu") as count:
        x = torch.ones(KIB, requires_grad=True)
        y = x.exp().sin()  # keeps the output of exp
        assert count.now == 3072
        total = y.sum()
        del y
        assert count.now == 2048 + 4
        total.backward()
        del total
    assert count.now == 2048  # x and its gradient


def test_another_device_does_not_count() -> None:
    with Allocations("cuda") as count:
        torch.ones(3)
    assert count.peak == 0


def test_rows_are_read_by_their_words() -> None:
    lines = ["| a | 32 | b |", "|---|---|---|", "| torch | bf16 | 1.50 |", "| net | 1 | 2 |", "5"]
    rows = rows_of_doc("\n".join(lines))
    assert rows == {("torch", "bf16"): [1.5], ("net",): [1.0, 2.0]}


@BACKWARDS
@pytest.mark.parametrize("arch", ["resnet50", "mobilenetv2"])
def test_the_docs_hold_what_is_modelled(arch: str) -> None:
    peaks = rows_of_doc(DOC.read_text())[(arch,)]
    with pretended_gpu():
        found = memory_of(Case(arch, 128)).peak
    assert found == pytest.approx(peaks[2], rel=0.02), "make memory"


@BACKWARDS
def test_memory_grows_with_the_batch_by_its_tensors() -> None:
    with pretended_gpu():
        small, large = (memory_of(Case("resnet18", batch), RESOLUTIONS[-2:]) for batch in (4, 8))
    assert small.always < small.peak < large.peak < 2 * small.peak
    images = 4 * sum(r * r for r in RESOLUTIONS[-2:]) * 4 * 2  # channels, bytes
    assert large.always - small.always == pytest.approx(images / 2**30)
