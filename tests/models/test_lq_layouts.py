"""Quantisers of activations on pyramids of both layouts and on tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_helpers import skip_unless_it_runs_on
from rsfast import Pyramid, kernels
from rsfast.models.lq import LQActivation


def images() -> Pyramid:
    torch.manual_seed(0)
    return Pyramid.pack([torch.randn(2, 5, size, size).relu() for size in (4, 3)])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("largest_only", [False, True])
def test_packed_rows_are_quantised_in_one_call_of_their_backend(
    largest_only: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        skip_unless_it_runs_on("cpu")
    packed, by_level = LQActivation(2), LQActivation(2)
    packed.largest_only = by_level.largest_only = largest_only
    want = by_level(images().by_level())
    seen: list[dict[str, Any]] = []
    real = kernels.lq_activation

    def observed(*args: Any, **options: Any) -> Any:
        seen.append(options)
        return real(*args, **options)

    monkeypatch.setattr(kernels, "lq_activation", observed)
    y = packed(images().on_backend(backend))
    assert seen == [{"moving": 1 if largest_only else 2, "synced": True, "backend": backend}]
    assert y.is_packed
    assert y.backend == backend
    assert not want.is_packed
    assert torch.equal(y.rows, want.rows)
    torch.testing.assert_close(packed.basis, by_level.basis)
    assert packed.updates == by_level.updates


def test_evaluation_moves_nothing_in_any_layout() -> None:
    quantiser = LQActivation(2).eval()
    before = quantiser.basis.clone()
    for x in (images(), images().by_level(), images().level(0)):
        quantiser(x)
    assert torch.equal(quantiser.basis, before)
    assert quantiser.updates == 0
