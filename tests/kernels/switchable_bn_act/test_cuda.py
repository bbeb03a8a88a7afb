"""The CUDA kernels of switchable batch norm, against the float64 reference.

They run on a CPU, in tests/csrc/emulated_gpu.cpp; the GPU has test_extension.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.support.inputs import make_bn_inputs
from bn_helpers import (
    HALVES,
    STATE,
    VARIANTS,
    VECTOR_SHAPES,
    assert_as_good_as_pytorch,
    run,
)
from emulator import EmulatedGpu, emulated_extension
from kernel_helpers import run_python, skip_unless_it_runs_on, to_float64
from rsfast.kernels import switchable_bn_act, switchable_bn_act_reference
from sampling import pairwise

FWD = torch.ops.rsfast.switchable_bn_act_one_pass_fwd
BWD = torch.ops.rsfast.switchable_bn_act_one_pass_bwd

IS_BUILT = importlib.util.find_spec("rsfast._C") is not None
# A block alone, several waves, levels side by side; slices that fit into shared memory and that
# do not. A chunk of the narrow tile has 64 rows forward and 32 backward.
GPUS = [
    pytest.param({"num_multiprocessors": 1}, id="1-block"),
    pytest.param({"num_multiprocessors": 3, "seed": 1}, id="3-blocks"),
    pytest.param({"num_multiprocessors": 7, "ring_slots": 5, "seed": 2}, id="7-blocks"),
]
TRAINING = {"training": True, "backend": "cuda"}


@pytest.fixture(scope="module")
def _extension() -> Iterator[EmulatedGpu]:
    with emulated_extension() as gpu:
        yield gpu


@pytest.fixture
def gpu(_extension: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    """The emulated GPU, as it is without settings."""
    for name, value in vars(EmulatedGpu()).items():
        monkeypatch.setattr(_extension, name, value)
    return _extension


def configure(gpu: EmulatedGpu, **settings: Any) -> None:
    for name, value in settings.items():
        setattr(gpu, name, value)


@pairwise(
    {
        "level_rows, banks, channels": VECTOR_SHAPES,
        "activation, residual": VARIANTS,
        "dtype": HALVES,
        "settings": GPUS,
    }
)
def test_output_gradients_and_state_match_the_float64_reference(
    level_rows: tuple[int, ...],
    banks: tuple[int, ...],
    channels: int,
    activation: str | None,
    residual: bool,
    dtype: torch.dtype,
    settings: dict[str, Any],
    gpu: EmulatedGpu,
) -> None:
    configure(gpu, **settings)
    inputs = make_bn_inputs(level_rows, channels, 3, residual=residual, dtype=dtype)
    levels = {"level_rows": level_rows, "banks": banks}
    assert_as_good_as_pytorch(inputs, "cuda", **levels, activation=activation, training=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("activation", "residual"), VARIANTS)
def test_blocks_of_full_size_match_the_float64_reference(
    activation: str | None, residual: bool, dtype: torch.dtype, gpu: EmulatedGpu
) -> None:
    configure(gpu, num_multiprocessors=4, narrow=False, seed=3)
    inputs = make_bn_inputs((1500, 65), 72, 2, residual=residual, dtype=dtype)
    levels = {"level_rows": (1500, 65), "banks": (0, 1)}
    assert_as_good_as_pytorch(inputs, "cuda", **levels, activation=activation, training=True)


@pytest.mark.parametrize("ring_slots", [2, 3, 7, 100])
@pytest.mark.parametrize("rows", [63, 64, 65, 500, 2250])
def test_every_share_of_rows_that_stays_on_the_chip_gives_the_same_bits(
    rows: int, ring_slots: int, gpu: EmulatedGpu
) -> None:
    inputs = make_bn_inputs((rows,), 16, 1, residual=True, dtype=torch.float16)
    options = {"level_rows": (rows,), "banks": (0,), "activation": "relu"}
    # As many blocks in any case: they are what sums are split by.
    configure(gpu, num_multiprocessors=2, ring_slots=2)
    want = run(switchable_bn_act, inputs, **options, **TRAINING)
    configure(gpu, ring_slots=ring_slots)
    results = run(switchable_bn_act, inputs, **options, **TRAINING)
    assert all(torch.equal(results[name], want[name]) for name in want)
    assert_as_good_as_pytorch(inputs, "cuda", **options, training=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "kind", ["far-mean", "rare", "tiny", "constant", "outlier-first", "outlier-last", "ramp"]
)
def test_difficult_rows_match_the_float64_reference(
    kind: str, dtype: torch.dtype, gpu: EmulatedGpu
) -> None:
    level_rows, banks = (200, 40), (0, 1)
    inputs = make_bn_inputs(level_rows, 16, 2)
    x = inputs["x"]
    if kind == "far-mean":
        x.mul_(100).add_(1e4)
    elif kind == "rare":  # one row in 40 differs, by 1 / 20 of the mean
        x.fill_(1e4)[::40] = 1.05e4
    elif kind == "tiny":
        x.mul_(1e-3)
    elif kind == "constant":
        x[:, ::2] = torch.linspace(-1e4, 1e4, 8)
    elif kind == "ramp":
        x.add_(torch.linspace(-1e3, 1e3, 240)[:, None])
    else:
        x[0 if kind == "outlier-first" else -1] = 1e4
    inputs["x"], inputs["dy"] = x.to(dtype), inputs["dy"].to(dtype)
    levels = {"level_rows": level_rows, "banks": banks}
    assert_as_good_as_pytorch(inputs, "cuda", **levels, activation="relu", training=True)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_nan_is_not_hidden_and_stays_in_its_level_and_channel(
    activation: str, gpu: EmulatedGpu
) -> None:
    inputs = make_bn_inputs((40, 30), 16, 2, residual=True, dtype=torch.float16)
    inputs["x"][7, 3] = float("nan")
    options = {"level_rows": (40, 30), "banks": (0, 1), **TRAINING}
    results = run(switchable_bn_act, inputs, activation=activation, **options)
    expected = torch.zeros_like(results["y"], dtype=torch.bool)
    expected[:40, 3] = True
    assert torch.equal(results["y"].isnan(), expected)
    assert torch.equal(results["dx"].isnan(), expected)
    assert results["running_mean"].isnan().sum() == 1


def test_state_follows_the_reference_over_several_steps(gpu: EmulatedGpu) -> None:
    options = {"level_rows": (40, 12), "banks": (2, 0), "training": True}
    ours, exact = (make_bn_inputs((40, 12), 8, 3, dtype=torch.float16) for _ in range(2))
    exact = to_float64(exact)
    for seed in range(4):
        x = 3 + torch.randn(52, 8, generator=torch.Generator().manual_seed(seed)).half()
        for inputs, function in ((ours, switchable_bn_act), (exact, switchable_bn_act_reference)):
            state = {name: t for name, t in inputs.items() if name not in ("x", "dy", "residual")}
            backend = {"backend": "cuda"} if inputs is ours else {}
            function(x.to(inputs["x"].dtype), **state, **options, **backend)
    assert ours["num_batches_tracked"].tolist() == [4, 0, 4]
    for name in STATE[:2]:
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-6, atol=1e-6)
        untouched = make_bn_inputs((40, 12), 8, 3, dtype=torch.float16)[name][1]
        assert torch.equal(ours[name][1], untouched)


def test_sets_without_a_level_get_a_gradient_of_zero(gpu: EmulatedGpu) -> None:
    inputs = make_bn_inputs((9,), 8, 3, dtype=torch.float16)
    results = run(switchable_bn_act, inputs, level_rows=(9,), banks=(1,), **TRAINING)
    for name in ("dweight", "dbias"):
        assert not results[name][[0, 2]].any()
        assert results[name][1].all()


def one_wave(gpu: EmulatedGpu, **settings: Any) -> dict[str, Tensor]:
    """Results on three blocks that share each slice of two levels, in several waves."""
    configure(gpu, num_multiprocessors=3, **settings)
    inputs = make_bn_inputs((300, 150), 72, 2, residual=True, dtype=torch.bfloat16)
    options = {"level_rows": (300, 150), "banks": (0, 1), "activation": "relu", **TRAINING}
    return run(switchable_bn_act, inputs, **options)


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_order_of_threads_makes_no_difference(seed: int, gpu: EmulatedGpu) -> None:
    want, results = one_wave(gpu), one_wave(gpu, seed=seed)
    assert all(torch.equal(results[name], want[name]) for name in want)


@pytest.mark.parametrize("barrier", range(6))
def test_no_barrier_can_be_left_out(barrier: int, gpu: EmulatedGpu) -> None:
    want = one_wave(gpu)

    def differs(seed: int) -> bool:
        try:
            results = one_wave(gpu, seed=seed, skip_barrier=barrier)
        except RuntimeError as error:
            return "deadlock" in str(error)
        return not all(torch.equal(results[name], want[name]) for name in want)

    assert any(differs(seed) for seed in range(1, 21))


def test_either_backward_reads_the_mask(gpu: EmulatedGpu) -> None:
    skip_unless_it_runs_on("cpu")
    level_rows, banks = (70, 33), (1, 0)
    inputs = make_bn_inputs(level_rows, 24, 2, residual=True, dtype=torch.float16)
    x, residual, weight, bias = (inputs[name] for name in ("x", "residual", "weight", "bias"))
    state = [inputs[name] for name in STATE]
    levels = {"level_rows": level_rows, "banks": banks, "activation": "relu6"}
    options = {**levels, "eps": 1e-5}
    y, mask, mean, var = FWD(
        x, residual, weight, bias, *state, **options, save_mask=True, momentum=0.1
    )
    affine = mean, var, weight, bias
    triton = torch.ops.rsfast.switchable_bn_act_fwd
    settings = {**options, "batch_statistics": True}
    want, want_mask = triton(x, residual, *affine, **settings, save_mask=True)
    torch.testing.assert_close(y, want)
    assert torch.equal(mask, want_mask)
    ours = BWD(inputs["dy"], x, mask, weight, bias, mean, var, **options)
    theirs = torch.ops.rsfast.switchable_bn_act_bwd(
        inputs["dy"], x, None, mask, *affine, **settings
    )
    for grad, want_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize(("activation", "residual"), VARIANTS)
def test_operators_pass_opcheck(activation: str | None, residual: bool, gpu: EmulatedGpu) -> None:
    inputs = make_bn_inputs((5, 3, 1), 8, 3, residual=residual, dtype=torch.float16)
    tensors = [inputs[name] for name in ("x", "residual", "weight", "bias", *STATE)]
    settings = {"level_rows": (5, 3, 1), "banks": (2, 0, 1), "activation": activation, "eps": 1e-5}
    more = {"save_mask": residual and activation is not None, "momentum": 0.1}
    torch.library.opcheck(FWD.default, tuple(tensors), {**settings, **more})
    _, mask, mean, var = FWD(*tensors, **settings, **more)
    saved = inputs["dy"], inputs["x"], mask, inputs["weight"], inputs["bias"], mean, var
    torch.library.opcheck(BWD.default, saved, settings)


def test_an_upstream_gradient_without_strides_and_a_second_backward(gpu: EmulatedGpu) -> None:
    inputs = make_bn_inputs((9, 4), 8, 2, residual=True, dtype=torch.float16)
    inputs.pop("dy")
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "residual")]
    options = {"level_rows": (9, 4), "banks": (0, 1), "activation": "relu", **TRAINING}
    y = switchable_bn_act(**inputs, **options)
    ones = torch.ones((), dtype=torch.float16)
    of_expanded, of_repeated = (
        torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for dy in (ones.expand(13, 8), ones.repeat(13, 8))
    )
    assert all(torch.equal(a, b) for a, b in zip(of_expanded, of_repeated, strict=True))


def test_training_without_gradients_moves_the_state(gpu: EmulatedGpu) -> None:
    inputs = make_bn_inputs((9, 4), 8, 2, residual=True, dtype=torch.float16)
    inputs.pop("dy")
    with torch.no_grad():
        y = switchable_bn_act(**inputs, level_rows=(9, 4), banks=(0, 1), **TRAINING)
    assert not y.requires_grad
    assert inputs["num_batches_tracked"].tolist() == [1, 1]


# Dynamo makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_whole_graph_compiles(gpu: EmulatedGpu) -> None:
    inputs = make_bn_inputs((9, 4), 8, 2, residual=True, dtype=torch.float16)
    options = {"level_rows": (9, 4), "banks": (0, 1), "activation": "relu", **TRAINING}
    compiled = torch.compile(switchable_bn_act, backend="aot_eager", fullgraph=True)
    ours, eager = (run(f, inputs, **options) for f in (compiled, switchable_bn_act))
    for name, want in eager.items():
        torch.testing.assert_close(ours[name], want)


def test_evaluation_is_that_of_the_triton_kernels(gpu: EmulatedGpu) -> None:
    skip_unless_it_runs_on("cpu")
    inputs = make_bn_inputs((9, 4), 8, 2, dtype=torch.float16)
    options = {"level_rows": (9, 4), "banks": (0, 1), "activation": "relu"}
    ours, want = (
        run(switchable_bn_act, inputs, **options, backend=backend) for backend in ("cuda", "triton")
    )
    assert all(torch.equal(ours[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(12, 8)}, "x must be float16 or bfloat16 with a multiple of 8"),
        ({"x": torch.zeros(8, 12).half().t()}, "x must be contiguous"),
        ({"weight": torch.zeros(2, 8).half()}, "weight must be contiguous torch.float32"),
        ({"level_rows": (12, 0)}, "level_rows must be 1 to 8 counts of at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    inputs = make_bn_inputs((8, 4), 8, 2, dtype=torch.float16)
    inputs.pop("dy")
    arguments = {**inputs, "level_rows": (8, 4), "banks": (0, 1), **TRAINING, **change}
    with pytest.raises(ValueError, match=message):
        switchable_bn_act(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(97).half()[1:].view(12, 8)}, "x must begin at a multiple of 16 bytes"),
        ({"x": torch.zeros(12, 7).half()}, "C a multiple of 8"),
        ({"bias": torch.zeros(3, 8)}, "bias does not have the device, type, shape or strides"),
        ({"residual": torch.zeros(12, 8)}, "residual does not have the device, type, shape"),
        ({"level_rows": (8, 5)}, "level_rows must add up to the rows of x"),
        ({"banks": (0, 2)}, "level 1 has 4 rows and set 2"),
        ({"activation": "gelu"}, "activation must be relu or relu6, got gelu"),
        ({"residual": None}, "save_mask is for an activation after a residual"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_operator_reads_nothing_astray(
    change: dict[str, Any], message: str, gpu: EmulatedGpu
) -> None:
    inputs = make_bn_inputs((8, 4), 8, 2, residual=True, dtype=torch.float16)
    inputs.pop("dy")
    levels = {"level_rows": (8, 4), "banks": (0, 1), "activation": "relu", "save_mask": True}
    with pytest.raises(RuntimeError, match=message):
        FWD(**{**inputs, **levels, "momentum": 0.1, "eps": 1e-5, **change})


@pytest.mark.parametrize("activation", ["silu", "hardswish"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_smooth_activations_are_refused(activation: str, training: bool) -> None:
    inputs = make_bn_inputs((8, 4), 8, 2, dtype=torch.float16)
    inputs.pop("dy")
    options = {"activation": activation, "training": training, "backend": "cuda"}
    with pytest.raises(ValueError, match=rf"activation .* got '{activation}': choose .* triton"):
        switchable_bn_act(**inputs, level_rows=(8, 4), banks=(0, 1), **options)


def test_seven_channels_are_refused() -> None:
    inputs = make_bn_inputs((8, 4), 7, 2, dtype=torch.float16)
    inputs.pop("dy")
    with pytest.raises(ValueError, match="multiple of 8 channels for backend cuda"):
        switchable_bn_act(**inputs, level_rows=(8, 4), banks=(0, 1), **TRAINING)


@pytest.mark.skipif(IS_BUILT, reason="the extension rsfast._C is built")
def test_without_the_extension_the_install_command_is_named() -> None:
    done = run_python("""
import torch
from rsfast.kernels import switchable_bn_act
state = [torch.ones(1, 8) for _ in range(4)]
arguments = (torch.ones(4, 8).half(), *state, torch.zeros(1, dtype=torch.int64), (4,), (0,))
try:
    switchable_bn_act(*arguments, training=True, backend="cuda")
except ImportError as error:
    assert "RSFAST_BUILD_CUDA=1 pip install --no-build-isolation" in str(error), error
else:
    raise AssertionError("no ImportError")
""")
    assert done.returncode == 0, done.stderr
