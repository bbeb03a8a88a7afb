"""The Triton kernels of switchable batch norm, against the float64 reference.

Without a CUDA device the kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.support.inputs import make_bn_inputs
from bn_helpers import ALL_VARIANTS, STATE, assert_as_good_as_pytorch, run
from kernel_helpers import (
    CPU_OR_GPU,
    GPU_ONLY,
    PLACES,
    capture_without_host_sync,
    on_another_stream,
    run_python,
    to_float64,
)
from rsfast.kernels import switchable_bn_act, switchable_bn_act_reference
from sampling import pairwise

STATS = torch.ops.rsfast.switchable_bn_act_stats
FWD = torch.ops.rsfast.switchable_bn_act_fwd
BWD = torch.ops.rsfast.switchable_bn_act_bwd

# Rows of each level, their sets, channels: odd channel counts, one row, one set for all levels,
# sets out of order and unused, more shares than the finalising kernels read at once.
SHAPES = [
    pytest.param((70, 33, 1), (2, 0, 1), 65, id="70+33+1-C65"),
    pytest.param((31,), (0,), 3, id="31-C3"),
    pytest.param((1,), (1,), 16, id="1-C16"),
    pytest.param((9, 6, 3), (0, 0, 0), 24, id="9+6+3-C24-one-set"),
    pytest.param((64, 36, 16, 4, 2, 2, 1, 1), (0, 1, 2, 0, 1, 2, 0, 1), 32, id="8-levels-C32"),
]
LONG = [
    pytest.param((2250, 5), (1, 0), 64, id="2250+5-C64"),
    pytest.param((300, 40), (0, 2), 640, id="300+40-C640"),
    pytest.param((40, 3), (2, 1), 2047, id="40+3-C2047"),
]
# Long ones take seconds in the interpreter: in one type, but for the slow tests.
PLACES_OF_LONG = [
    *(place for place in PLACES if place.id != "cpu-float16"),
    pytest.param(("cpu", torch.float16), id="cpu-float16", marks=pytest.mark.slow),
]


def all_variants(*quick: str) -> list[Any]:
    """All, but only those of some ids outside of the slow tests."""
    return [
        pytest.param(*v.values, id=v.id, marks=[] if v.id in quick else pytest.mark.slow)
        for v in ALL_VARIANTS
    ]


LARGE = {
    "level_rows": (5000, 1234, 77),
    "banks": (0, 1, 2),
    "activation": "relu",
    "training": True,
}
MODES = [pytest.param(True, id="train"), pytest.param(False, id="eval")]


@pytest.fixture(params=[1, None], ids=["long-shares", "short-shares"])
def _shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, each with several tiles, or many with one tile."""
    tiles = pytest.importorskip("rsfast.kernels.common.tiles", reason="Triton is not installed")
    if request.param:
        monkeypatch.setattr(tiles, "MULTIPROCESSORS", request.param)


@pairwise(
    {
        "level_rows, banks, channels": SHAPES,
        "activation, residual": ALL_VARIANTS,
        "training": MODES,
        "place": PLACES,
    },
    indirect=["place"],
)
def test_output_gradients_and_state_match_the_float64_reference(
    level_rows: tuple[int, ...],
    banks: tuple[int, ...],
    channels: int,
    activation: str | None,
    residual: bool,
    training: bool,
    place: tuple[str, torch.dtype],
) -> None:
    device, dtype = place
    inputs = make_bn_inputs(level_rows, channels, 3, residual=residual, device=device, dtype=dtype)
    options = {"activation": activation, "training": training}
    assert_as_good_as_pytorch(inputs, level_rows=level_rows, banks=banks, **options)


@pytest.mark.usefixtures("_shares")
@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize(("activation", "residual"), all_variants("plain", "add-relu", "add-silu"))
def test_any_share_of_rows_matches_the_float64_reference(
    activation: str | None, residual: bool, device: str
) -> None:
    inputs = make_bn_inputs((290, 66), 32, 2, residual=residual, device=device)
    options = {"activation": activation, "training": True}
    assert_as_good_as_pytorch(inputs, level_rows=(290, 66), banks=(0, 1), **options)


@pytest.mark.parametrize("place", PLACES_OF_LONG, indirect=True)
@pytest.mark.parametrize(("level_rows", "banks", "channels"), LONG)
def test_many_shares_and_channels_match_the_float64_reference(
    level_rows: tuple[int, ...],
    banks: tuple[int, ...],
    channels: int,
    place: tuple[str, torch.dtype],
) -> None:
    device, dtype = place
    inputs = make_bn_inputs(level_rows, channels, 3, residual=True, device=device, dtype=dtype)
    options = {"activation": "relu", "training": True}
    assert_as_good_as_pytorch(inputs, level_rows=level_rows, banks=banks, **options)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("activation", ["silu", "hardswish"])
@pytest.mark.parametrize("far", [-1000.0, 1000.0], ids=str)
def test_smooth_activations_far_from_zero_are_those_of_their_limits(
    far: float, activation: str, device: str
) -> None:
    inputs = make_bn_inputs((20,), 5, 1, residual=True, device=device)
    inputs["residual"] += far
    options = {"level_rows": (20,), "banks": (0,), "training": True, "backend": "triton"}
    ours = run(switchable_bn_act, inputs, activation=activation, **options)
    share = 1.0 if far > 0 else 0.0
    want = run(switchable_bn_act, inputs, activation=None, **options)
    torch.testing.assert_close(ours["dresidual"], share * inputs["dy"])
    torch.testing.assert_close(ours["y"], share * want["y"])
    assert torch.isfinite(ours["dx"]).all()


@pytest.mark.usefixtures("_shares")
@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize(
    "kind", ["far-mean", "tiny", "constant", "outlier-first", "outlier-last", "ramp"]
)
def test_difficult_rows_match_the_float64_reference(kind: str, device: str) -> None:
    level_rows, banks = (600, 40), (0, 1)
    inputs = make_bn_inputs(level_rows, 16, 2, device=device)
    x = inputs["x"]
    if kind == "far-mean":
        x += 1e4
    elif kind == "tiny":
        x *= 1e-4
    elif kind == "constant":
        x[:, ::2] = torch.linspace(-1e4, 1e4, 8, device=device)
    elif kind == "ramp":
        x += torch.linspace(-1e3, 1e3, 640, device=device)[:, None]
    else:
        x[0 if kind == "outlier-first" else -1] = 1e4
    assert_as_good_as_pytorch(
        inputs, level_rows=level_rows, banks=banks, activation="relu", training=True
    )


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
def test_nan_is_not_hidden_and_stays_in_its_level_and_channel(activation: str, device: str) -> None:
    inputs = make_bn_inputs((40, 30), 16, 2, residual=True, device=device)
    inputs["x"][7, 3] = float("nan")
    options = {"level_rows": (40, 30), "banks": (0, 1), "training": True, "backend": "triton"}
    results = run(switchable_bn_act, inputs, activation=activation, **options)
    expected = torch.zeros_like(results["y"], dtype=torch.bool)
    expected[:40, 3] = True
    assert torch.equal(results["y"].isnan(), expected)
    assert torch.equal(results["dx"].isnan(), expected)
    assert results["running_mean"].isnan().sum() == 1


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_state_follows_the_reference_over_several_steps(device: str) -> None:
    options = {"level_rows": (40, 12), "banks": (2, 0), "training": True}
    ours, exact = (make_bn_inputs((40, 12), 5, 3, device=device) for _ in range(2))
    exact = to_float64(exact)
    for seed in range(4):
        x = 3 + torch.randn(52, 5, generator=torch.Generator().manual_seed(seed)).to(device)
        for inputs, function in ((ours, switchable_bn_act), (exact, switchable_bn_act_reference)):
            state = {name: t for name, t in inputs.items() if name not in ("x", "dy", "residual")}
            backend = {"backend": "triton"} if inputs is ours else {}
            function(x.to(inputs["x"].dtype), **state, **options, **backend)
    assert ours["num_batches_tracked"].tolist() == [4, 0, 4]
    for name in STATE[:2]:
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-6, atol=1e-6)
        untouched = make_bn_inputs((40, 12), 5, 3, device=device)[name][1]
        assert torch.equal(ours[name][1], untouched)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_sets_without_a_level_get_a_gradient_of_zero(device: str) -> None:
    inputs = make_bn_inputs((9,), 5, 3, device=device)
    options = {"level_rows": (9,), "banks": (1,), "training": True, "backend": "triton"}
    results = run(switchable_bn_act, inputs, **options)
    for name in ("dweight", "dbias"):
        assert not results[name][[0, 2]].any()
        assert results[name][1].all()


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "add"])
def test_repeated_runs_give_the_same_bits(residual: bool, place: tuple[str, torch.dtype]) -> None:
    device, dtype = place
    inputs = make_bn_inputs((70, 33), 24, 2, residual=residual, device=device, dtype=dtype)
    options = {"level_rows": (70, 33), "banks": (0, 1), "training": True, "backend": "triton"}
    one, other = (run(switchable_bn_act, inputs, activation="relu", **options) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_evaluation_without_gradients_writes_only_the_output(device: str) -> None:
    inputs = make_bn_inputs((40, 3), 20, 2, residual=True, device=device)
    inputs.pop("dy")
    before = {name: inputs[name].clone() for name in STATE}
    options = {"level_rows": (40, 3), "banks": (0, 1), "activation": "relu"}
    with torch.no_grad():
        ours = switchable_bn_act(**inputs, **options, backend="triton")
        want = switchable_bn_act(**inputs, **options)
    torch.testing.assert_close(ours, want)
    assert all(torch.equal(inputs[name], before[name]) for name in STATE)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_an_upstream_gradient_without_strides_is_understood(device: str) -> None:
    inputs = make_bn_inputs((9, 4), 5, 2, residual=True, device=device)
    inputs.pop("dy")
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "residual")]
    options = {"level_rows": (9, 4), "banks": (0, 1), "activation": "relu", "training": True}
    y = switchable_bn_act(**inputs, **options, backend="triton")
    ones = torch.ones((), device=device)
    expanded, repeated = ones.expand(13, 5), ones.repeat(13, 5)
    assert expanded.stride() == (0, 0)
    of_expanded, of_repeated = (
        torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in (expanded, repeated)
    )
    assert all(torch.equal(a, b) for a, b in zip(of_expanded, of_repeated, strict=True))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_backward_can_run_twice(device: str) -> None:
    inputs = make_bn_inputs((9, 4), 5, 2, device=device)
    dy = inputs.pop("dy")
    inputs["x"].requires_grad_()
    options = {"level_rows": (9, 4), "banks": (0, 1), "activation": "relu", "training": True}
    y = switchable_bn_act(**inputs, **options, backend="triton")
    (first,) = torch.autograd.grad(y, inputs["x"], dy, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(y, inputs["x"], 2 * dy)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize(
    ("activation", "residual"), all_variants("relu", "add", "silu", "add-relu", "add-silu")
)
def test_operators_pass_opcheck(activation: str | None, residual: bool, device: str) -> None:
    level_rows, banks = (5, 1), (2, 0)
    inputs = make_bn_inputs(level_rows, 7, 3, residual=residual, device=device)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    state = tuple(inputs[name] for name in STATE)
    levels = {"level_rows": level_rows, "banks": banks}
    torch.library.opcheck(STATS.default, (x, *state), {**levels, "momentum": 0.1})
    affine = *STATS(x, *state, **levels, momentum=0.1), weight, bias
    settings = {**levels, "activation": activation, "batch_statistics": True, "eps": 1e-5}
    keep = {"save_mask": residual and activation in ("relu", "relu6")}
    _, mask = FWD(x, inputs["residual"], *affine, **settings, **keep)
    kept = inputs["residual"] if activation in ("silu", "hardswish") else None
    torch.library.opcheck(BWD.default, (inputs["dy"], x, kept, mask, *affine), settings)
    for tensor in (x, weight, bias, *([inputs["residual"]] if residual else [])):
        tensor.requires_grad_()
    torch.library.opcheck(FWD.default, (x, inputs["residual"], *affine), {**settings, **keep})


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_gradients_behind_a_residual_need_the_mask(device: str) -> None:
    inputs = make_bn_inputs((9,), 5, 1, residual=True, device=device)
    names = ("residual", "running_mean", "running_var", "weight", "bias")
    settings = {"level_rows": (9,), "banks": (0,), "activation": "relu", "eps": 1e-5}
    settings |= {"batch_statistics": False, "save_mask": False}
    with pytest.raises(ValueError, match="save_mask must be True"):
        FWD(inputs["x"].requires_grad_(), *(inputs[name] for name in names), **settings)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("training", MODES)
def test_whole_graph_compiles(training: bool, device: str) -> None:
    inputs = make_bn_inputs((9, 4), 5, 2, residual=True, device=device)
    options = {"level_rows": (9, 4), "banks": (0, 1), "activation": "relu", "training": training}
    compiled = torch.compile(switchable_bn_act, backend="aot_eager", fullgraph=True)
    ours = run(compiled, inputs, backend="triton", **options)
    eager = run(switchable_bn_act, inputs, backend="triton", **options)
    for name, want in eager.items():
        torch.testing.assert_close(ours[name], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cudnn"}, "backend must be one of"),
        ({"x": torch.zeros(12, 3).double()}, "x must be float16, bfloat16 or float32"),
        ({"x": torch.zeros(3, 12).t()}, "x must be contiguous"),
        ({"x": torch.zeros(12, 3, device="meta")}, "weight must be contiguous .* on meta"),
        ({"residual": torch.zeros(3, 12).t()}, "residual must be contiguous"),
        ({"weight": torch.zeros(2, 3).half()}, "weight must be contiguous torch.float32"),
        ({"running_var": torch.zeros(3, 2).t()}, "running_var must be contiguous"),
        ({"bias": torch.zeros(2, 4)}, r"bias must be \[2, 3\]"),
        ({"num_batches_tracked": torch.zeros(2)}, "num_batches_tracked must be contiguous"),
        ({"level_rows": (12, 0)}, "level_rows must be 1 to 8 counts of at least 1"),
        ({"level_rows": (12, 1)}, "level_rows must add up to the 12 rows"),
        ({"level_rows": (4,) + (1,) * 8, "banks": (0,) * 9}, "level_rows must be 1 to 8 counts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    inputs = make_bn_inputs((8, 4), 3, 2)
    inputs.pop("dy")
    arguments = {**inputs, "level_rows": (8, 4), "banks": (0, 1), "backend": "triton", **change}
    with pytest.raises(ValueError, match=message):
        switchable_bn_act(**arguments)


def test_a_cpu_without_the_interpreter_is_refused_in_words() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run_python("""
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from rsfast.kernels import global_avg_pool
try:
    global_avg_pool(torch.zeros(4, 3), (4,), 1, backend="triton")
except ValueError as error:
    assert "needs tensors on a GPU" in str(error), error
else:
    raise AssertionError("no ValueError")
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "add"])
class TestOnTheGpu:
    def run(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return run(switchable_bn_act, inputs, **LARGE, backend="triton")

    def inputs(self, residual: bool, device: str) -> dict[str, Any]:
        options = {"residual": residual, "device": device, "dtype": torch.bfloat16}
        return make_bn_inputs(LARGE["level_rows"], 256, 3, **options)

    def test_another_stream_gives_the_same_bits(self, residual: bool, device: str) -> None:
        inputs = self.inputs(residual, device)
        here, there = self.run(inputs), on_another_stream(lambda: self.run(inputs))
        assert all(torch.equal(here[name], there[name]) for name in here)

    def test_the_host_never_waits_and_a_graph_captures_it(
        self, residual: bool, device: str
    ) -> None:
        inputs = self.inputs(residual, device)
        exact = self.run(inputs)
        captured = capture_without_host_sync(lambda: self.run(inputs))
        assert all(torch.equal(exact[name], captured[name]) for name in exact)

    def test_a_large_batch_matches_the_float64_reference(self, residual: bool, device: str) -> None:
        inputs = self.inputs(residual, device)
        assert_as_good_as_pytorch(inputs, **LARGE)
