"""The Triton kernels of quantised activations, against the references in float32 and float64.

Without a CUDA device the kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_helpers import (
    CPU_OR_GPU,
    GPU_ONLY,
    PLACES,
    assert_close,
    capture_without_host_sync,
    on_another_stream,
)
from rsfast.kernels import lq_activation, lq_activation_reference
from rsfast.kernels.common.backend import load_kernels
from rsfast.kernels.lq_activation import op
from sampling import pairwise

FWD = torch.ops.rsfast.lq_activation_fwd
MOVE = torch.ops.rsfast.lq_activation_move
BWD = torch.ops.rsfast.lq_activation_bwd

# Rows of each level, channels, and how many levels move the basis.
SHAPES = [
    pytest.param((70, 33, 1), 65, 3, id="70+33+1-C65"),
    pytest.param((31,), 3, 1, id="31-C3"),
    pytest.param((1, 3), 1, 2, id="1+3-C1"),
    pytest.param((65, 9), 24, 1, id="65+9-C24-first-moves"),
    pytest.param((40, 3), 130, 0, id="40+3-C130-none-moves"),
    pytest.param((64, 36, 16, 4, 2, 2, 1, 1), 32, 8, id="8-levels-C32"),
]
BASES = [
    pytest.param((0.7,), id="K1"),
    pytest.param((0.45, 0.9), id="K2"),
    pytest.param((0.9, 0.2, 0.4), id="K3-unsorted"),
    pytest.param((0.11, 0.19, 0.42, 0.77), id="K4"),
    pytest.param((0.8, -0.3), id="K2-one-below-zero"),
]


def make_inputs(
    level_rows: tuple[int, ...],
    channels: int,
    basis: tuple[float, ...] = (0.45, 0.9),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(level_rows), channels, generator=generator).relu_()
    return {
        "x": x.to(device, dtype),
        "basis": torch.tensor(basis, device=device),
        "updates": torch.tensor(3, device=device),
    }


def run(function: Callable[..., Tensor], inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Output, gradient for a dy of the same numbers in every dtype, and state afterwards."""
    x = inputs["x"].detach().clone().requires_grad_()
    state = {name: inputs[name].clone() for name in ("basis", "updates")}
    y = function(x, **state, **options)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    return {"y": y.detach(), "dx": dx, **state}


def check(inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Ours, if output and gradient are bit for bit the reference's and the basis is as good."""
    ours = run(lq_activation, inputs, **options, backend="triton")
    eager = run(lq_activation_reference, inputs, **options)
    for name in ("y", "dx", "updates"):
        assert ours[name].dtype == eager[name].dtype
        assert torch.equal(ours[name], eager[name]), name
    wide = {**inputs, "x": inputs["x"].double(), "basis": inputs["basis"].double()}
    exact = run(lq_activation_reference, wide, **options)
    # Sums are rounded in float32, and the equations of 4 bits magnify that.
    of_basis = ({"basis": result["basis"]} for result in (ours, eager, exact))
    assert_close(*of_basis, operands={"basis": 16.0})
    return ours


@pytest.fixture(params=[1, None], ids=["long-shares", "short-shares"])
def _shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, each with several tiles, or many with one tile."""
    tiles = pytest.importorskip("rsfast.kernels.common.tiles", reason="Triton is not installed")
    if request.param:
        monkeypatch.setattr(tiles, "MULTIPROCESSORS", request.param)


@pairwise(
    {"level_rows, channels, moving": SHAPES, "basis": BASES, "place": PLACES}, indirect=["place"]
)
def test_levels_gradient_and_moved_basis_match_the_references(
    level_rows: tuple[int, ...],
    channels: int,
    moving: int,
    basis: tuple[float, ...],
    place: tuple[str, torch.dtype],
) -> None:
    inputs = make_inputs(level_rows, channels, basis, *place)
    ours = check(inputs, level_rows=level_rows, moving=moving)
    assert ours["updates"] == 3 + moving
    assert torch.equal(ours["basis"], inputs["basis"]) == (moving == 0)


@pytest.mark.usefixtures("_shares")
@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("channels", [32, 130])
def test_any_share_of_rows_gives_the_same_refit(channels: int, device: str) -> None:
    check(make_inputs((390, 66), channels, device=device), level_rows=(390, 66), moving=2)


def _constant(x: Tensor) -> None:
    x.fill_(0.9)


def _only_extremes(x: Tensor) -> None:
    x[::2], x[1::2] = 0.0, 7.0


def _alike_in_both(x: Tensor) -> None:
    x.copy_(torch.where(x > 0.5, 1.4, 0.0))  # codes 0 and 3: only the sum of both is determined


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("spoil", [torch.zero_, _constant, _only_extremes, _alike_in_both])
@pytest.mark.parametrize("basis", [(0.45, 0.9), (0.1, 0.2, 0.4), (0.5, 0.5)], ids=str)
def test_systems_without_a_single_solution_stay_finite(
    basis: tuple[float, ...], spoil: Callable[[Tensor], Any], device: str
) -> None:
    inputs = make_inputs((40, 9), 24, basis, device)
    spoil(inputs["x"])
    ours = check(inputs, level_rows=(40, 9), moving=2)
    assert torch.isfinite(ours["basis"]).all()
    if spoil is torch.zero_:  # zeros determine nothing
        assert torch.equal(ours["basis"], inputs["basis"])


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_the_first_update_replaces_the_basis_and_late_ones_take_a_tenth(device: str) -> None:
    inputs = make_inputs((90,), 24, device=device)
    moved = {}
    for updates in (0, 1, 7, 400, 10**12):
        inputs["updates"].fill_(updates)
        moved[updates] = check(inputs, level_rows=(90,), moving=1)["basis"]
    target = moved[0]
    late = torch.lerp(inputs["basis"], target, 0.1)
    for updates in (400, 10**12):
        torch.testing.assert_close(moved[updates], late, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        # NumPy, which the interpreter computes with, warns where infinities make NaN.
        pytest.param(float("inf"), marks=pytest.mark.filterwarnings("ignore:invalid value")),
        pytest.param(-float("inf"), marks=pytest.mark.filterwarnings("ignore:invalid value")),
    ],
    ids=str,
)
def test_what_is_not_finite_stays_visible_in_its_place_and_in_the_basis(
    value: float, device: str
) -> None:
    inputs = make_inputs((40, 9), 24, device=device)
    inputs["x"][7, 3] = value
    expected = torch.zeros_like(inputs["x"], dtype=torch.bool)
    expected[7, 3] = True
    for backend in ("torch", "triton"):
        results = run(lq_activation, inputs, level_rows=(40, 9), moving=1, backend=backend)
        assert torch.equal(results["y"].isnan(), expected)
        assert not torch.isfinite(results["basis"]).all()
        assert torch.isfinite(results["dx"]).all()


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_basis_that_is_not_finite_makes_nan_of_everything(value: float, device: str) -> None:
    inputs = make_inputs((9,), 5, (0.45, value), device)
    for backend in ("torch", "triton"):
        y = lq_activation(**inputs, level_rows=(9,), backend=backend)
        assert y.isnan().all()


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_sums_of_all_ranks_are_what_the_basis_is_fitted_to(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs((70, 33), 65, (0.1, 0.2, 0.4), device)
    options = {"level_rows": (70, 33), "moving": 2, "backend": "triton"}
    alone = run(lq_activation, inputs, **options)
    joined = []

    def of_two_alike(by_code: Tensor) -> Tensor:
        joined.append(by_code.clone())
        return by_code.mul_(2)

    monkeypatch.setattr(op.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(op.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(op, "sum_over_ranks", of_two_alike)
    together = run(lq_activation, inputs, **options, synced=True)
    torch.testing.assert_close(together["basis"], alone["basis"])
    (by_code,) = joined
    assert by_code.shape == (2, 2, 8)
    assert by_code[:, 0].sum(1).tolist() == [70 * 65, 33 * 65]
    totals = [part.double().sum().item() for part in inputs["x"].split([70, 33])]
    assert by_code[:, 1].sum(1).tolist() == pytest.approx(totals, rel=1e-6)


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_repeated_runs_give_the_same_bits(place: tuple[str, torch.dtype]) -> None:
    inputs = make_inputs((70, 33), 24, (0.45, 0.9), *place)
    options = {"level_rows": (70, 33), "moving": 2, "backend": "triton"}
    one, other = (run(lq_activation, inputs, **options) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_evaluation_without_gradients_keeps_and_moves_nothing(device: str) -> None:
    inputs = make_inputs((40, 3), 20, device=device)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    with torch.no_grad():
        ours = lq_activation(**inputs, level_rows=(40, 3), backend="triton")
    assert torch.equal(ours, lq_activation(**inputs, level_rows=(40, 3)))
    assert all(torch.equal(inputs[name], before[name]) for name in before)
    _, mask, counts, sums = FWD(
        inputs["x"], inputs["basis"], level_rows=(40, 3), save_mask=False, summed=False
    )
    assert (mask.numel(), counts.numel(), sums.numel()) == (0, 0, 0)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_an_upstream_gradient_without_strides_is_understood(device: str) -> None:
    inputs = make_inputs((9, 4), 5, device=device)
    x = inputs["x"].requires_grad_()
    for backend in ("torch", "triton"):
        y = lq_activation(**inputs, level_rows=(9, 4), backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, (x <= inputs["basis"].sum()).float())


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("summed", [False, True])
def test_operators_pass_opcheck(summed: bool, device: str) -> None:
    x, basis, updates = make_inputs((5, 1), 7, device=device).values()
    settings = {"level_rows": (5, 1), "save_mask": True, "summed": summed}
    y, mask, counts, sums = FWD(x, basis, **settings)
    torch.library.opcheck(BWD.default, (y, mask))
    if summed:
        options = {"level_rows": (5, 1), "num_channels": 7, "moving": 2, "synced": False}
        torch.library.opcheck(MOVE.default, (counts, sums, basis, updates), options)
    torch.library.opcheck(FWD.default, (x.requires_grad_(), basis), settings)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_gradients_need_the_mask(device: str) -> None:
    x, basis, _ = make_inputs((5,), 7, device=device).values()
    with pytest.raises(ValueError, match="save_mask must be True for gradients"):
        FWD(x.requires_grad_(), basis, level_rows=(5,), save_mask=False, summed=False)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_whole_graph_compiles(device: str) -> None:
    inputs = make_inputs((9, 4), 5, device=device)
    compiled = torch.compile(lq_activation, backend="aot_eager", fullgraph=True)
    options = {"level_rows": (9, 4), "moving": 2, "backend": "triton"}
    ours, eager = run(compiled, inputs, **options), run(lq_activation, inputs, **options)
    assert all(torch.equal(ours[name], eager[name]) for name in eager)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_forward_says_how_many_programs_it_has(bits: int) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    tiles = load_kernels("lq_activation.tiles")
    rows = (256 * 56 * 56, 256 * 24 * 24)
    programs = tiles.num_programs(rows, 64, bits)
    assert programs <= tiles.NUM_PROGRAMS[bits] * 132
    assert programs > 0.9 * tiles.NUM_PROGRAMS[bits] * 132


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cudnn"}, "backend must be one of"),
        ({"x": torch.zeros(14, 4).double()}, "x must be float16, bfloat16 or float32"),
        ({"x": torch.zeros(4, 14).t()}, "x must be contiguous"),
        ({"level_rows": (14, 0)}, "level_rows must be 1 to 8 counts of at least 1"),
        ({"level_rows": (14, 1)}, "level_rows must add up to the 14 rows"),
        ({"basis": torch.zeros(5)}, r"basis must be \[K\], with 1 to 4 bits K, got shape \(5,\)"),
        ({"basis": torch.zeros(0)}, "basis must be"),
        ({"basis": torch.zeros(2, 3)}, "basis must be"),
        ({"basis": torch.zeros(2).half()}, "basis must be float32 or float64, got torch.float16"),
        ({"basis": torch.zeros(2).double()}, "basis must be contiguous torch.float32"),
        ({"basis": torch.zeros(4)[::2]}, "basis must be contiguous torch.float32"),
        ({"updates": torch.zeros(1, dtype=torch.int64)}, "updates must be a single int64"),
        ({"updates": torch.zeros(())}, "updates must be a single int64, got torch.float32"),
        ({"moving": -1}, "moving must be between 0 and 2 levels, got -1"),
        ({"moving": 3}, "moving must be between 0 and 2 levels, got 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    updates = torch.zeros((), dtype=torch.int64)
    arguments = {"x": torch.zeros(14, 4), "basis": torch.ones(2), "updates": updates}
    arguments |= {"level_rows": (12, 2), "backend": "triton"}
    with pytest.raises(ValueError, match=message):
        lq_activation(**{**arguments, **change})


ON_GPU: dict[str, Any] = {"level_rows": (64 * 49, 64 * 9), "moving": 2, "backend": "triton"}


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    def inputs(self, device: str) -> dict[str, Any]:
        return make_inputs((64 * 49, 64 * 9), 512, (0.45, 0.9), device, torch.bfloat16)

    def run(self, device: str) -> dict[str, Any]:
        return run(lq_activation, self.inputs(device), **ON_GPU)

    def test_another_stream_gives_the_same_bits(self, device: str) -> None:
        here, there = self.run(device), on_another_stream(lambda: self.run(device))
        assert all(torch.equal(here[name], there[name]) for name in here)

    def test_the_host_never_waits_and_a_graph_captures_it(self, device: str) -> None:
        inputs = self.inputs(device)
        y = lq_activation(**self.inputs(device), **ON_GPU)
        start = inputs["basis"].clone()

        def from_the_start() -> Tensor:
            inputs["basis"].copy_(start)
            return lq_activation(**inputs, **ON_GPU)

        assert torch.equal(capture_without_host_sync(from_the_start), y)
