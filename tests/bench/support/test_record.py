"""No time is shown for a wrong result."""

from __future__ import annotations

import pytest
import torch

from bench.support.record import check_alike


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
