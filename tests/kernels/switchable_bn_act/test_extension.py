"""The operators of `rsfast._C` on a GPU, against the float64 reference and the Triton kernels."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.support.inputs import make_bn_inputs
from bn_helpers import HALVES, VARIANTS, VECTOR_SHAPES, assert_as_good_as_pytorch, run
from kernel_helpers import capture_without_host_sync, on_another_stream, skip_unless_it_runs_on
from rsfast.kernels import switchable_bn_act

IS_BUILT = importlib.util.find_spec("rsfast._C") is not None
TRAINING = {"training": True, "backend": "cuda"}


@pytest.fixture
def _built() -> None:
    if not IS_BUILT:
        pytest.skip("the extension rsfast._C is not built")
    skip_unless_it_runs_on("cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("activation", "residual"), VARIANTS)
@pytest.mark.parametrize(("level_rows", "banks", "channels"), VECTOR_SHAPES)
def test_the_gpu_matches_the_float64_reference(
    level_rows: tuple[int, ...],
    banks: tuple[int, ...],
    channels: int,
    activation: str | None,
    residual: bool,
    dtype: torch.dtype,
) -> None:
    options = {"residual": residual, "device": "cuda", "dtype": dtype}
    inputs = make_bn_inputs(level_rows, channels, 3, **options)
    levels = {"level_rows": level_rows, "banks": banks}
    assert_as_good_as_pytorch(inputs, "cuda", **levels, activation=activation, training=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("channels", [24, 64, 256])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "add"])
class TestManyRowsOnTheGpu:
    LEVELS = {"level_rows": (200000, 12345, 77), "banks": (0, 1, 2)}  # noqa: RUF012

    @pytest.fixture
    def inputs(self, residual: bool, channels: int, dtype: torch.dtype) -> dict[str, Any]:
        options = {"residual": residual, "device": "cuda", "dtype": dtype}
        return make_bn_inputs(self.LEVELS["level_rows"], channels, 3, **options)

    def run(self, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
        options = {**self.LEVELS, "activation": "relu", **TRAINING, **options}
        return run(switchable_bn_act, inputs, **options)

    # Without an activation: of so many numbers some are 0 up to a rounding, and keep their gradient
    # in one precision and lose it in the other.
    def test_results_match_the_float64_reference(self, inputs: dict[str, Any]) -> None:
        assert_as_good_as_pytorch(inputs, "cuda", **self.LEVELS, activation=None, training=True)

    def test_results_are_close_to_those_of_the_triton_kernels(self, inputs: dict[str, Any]) -> None:
        ours, theirs = (
            self.run(inputs, activation=None, backend=backend) for backend in ("cuda", "triton")
        )
        for name, want in theirs.items():
            torch.testing.assert_close(ours[name], want, rtol=2e-2, atol=2e-2)

    def test_repeated_runs_give_the_same_bits(self, inputs: dict[str, Any]) -> None:
        want = self.run(inputs)
        for _ in range(20):
            results = self.run(inputs)
            assert all(torch.equal(results[name], want[name]) for name in want)

    def test_another_stream_gives_the_same_bits(self, inputs: dict[str, Any]) -> None:
        here, there = self.run(inputs), on_another_stream(lambda: self.run(inputs))
        assert all(torch.equal(here[name], there[name]) for name in here)

    def test_the_host_never_waits_and_a_graph_captures_it(self, inputs: dict[str, Any]) -> None:
        exact = self.run(inputs)
        captured = capture_without_host_sync(lambda: self.run(inputs))
        assert all(torch.equal(exact[name], captured[name]) for name in exact)
