"""The Triton kernel of the loss, against the float64 reference.

Without a CUDA device the kernel runs in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.support.inputs import make_loss_inputs as make_inputs
from kernel_helpers import (
    CPU_OR_GPU,
    GPU_ONLY,
    PLACES,
    capture_without_host_sync,
    on_another_stream,
    run_python,
)
from loss_helpers import DRAWS, UPSTREAMS, assert_as_good_as_pytorch, run
from rsfast.kernels import (
    DISTILL_MODES,
    distillation_loss,
    distillation_loss_and_gradients,
    distillation_loss_reference,
)
from sampling import pairwise

FWD = torch.ops.rsfast.distillation_loss_fwd
BWD = torch.ops.rsfast.distillation_loss_bwd
FWD_BWD = torch.ops.rsfast.distillation_loss_fwd_bwd

# The reference multiplies matrices, which cuBLAS does not promise to repeat.
pytestmark = pytest.mark.filterwarnings("ignore:.*CuBLAS:UserWarning")


@pairwise(
    {
        "num_resolutions, num_images": [(1, 3), (2, 1), (5, 3), (8, 1)],
        "num_classes": [pytest.param(k, id=f"K{k}") for k in (1, 3, 65, 1000, 2047, 4099)],
        "place": PLACES,
    },
    indirect=["place"],
)
def test_terms_and_gradients_match_the_float64_reference(
    num_resolutions: int, num_images: int, num_classes: int, place: tuple[str, torch.dtype]
) -> None:
    shape = (num_resolutions, num_images, num_classes)
    draws = [make_inputs(*shape, *place, seed=seed) for seed in range(DRAWS)]
    assert_as_good_as_pytorch(draws, label_smoothing=0.1)


@pairwise(
    {
        "shape, smoothing": [
            ((1, 3, 7), 0.1),
            ((2, 2, 65), 0.0),
            ((5, 3, 65), 0.1),
            ((5, 1, 2500), 0.0),
        ],
        "mode": DISTILL_MODES,
        "place": PLACES,
    },
    indirect=["place"],
)
def test_every_mode_matches_the_float64_reference(
    mode: str, shape: tuple[int, ...], smoothing: float, place: tuple[str, torch.dtype]
) -> None:
    draws = [make_inputs(*shape, *place, seed=seed) for seed in range(DRAWS)]
    assert_as_good_as_pytorch(draws, mode=mode, label_smoothing=smoothing)


@pairwise(
    {"upstream": tuple(UPSTREAMS), "num_classes": [65, 2500], "place": PLACES}, indirect=["place"]
)
def test_each_term_may_have_its_own_upstream_gradient(
    upstream: str, num_classes: int, place: tuple[str, torch.dtype]
) -> None:
    draws = [make_inputs(5, 1, num_classes, *place, seed=seed) for seed in range(DRAWS)]
    assert_as_good_as_pytorch(draws, UPSTREAMS[upstream])


@pairwise(
    {
        "kind": ["equal", "tiny", "huge", "onehot", "offset", "apart"],
        "num_classes": [65, 2500],
        "place": PLACES,
    },
    indirect=["place"],
)
def test_extreme_logits_match_the_float64_reference(
    kind: str, num_classes: int, place: tuple[str, torch.dtype]
) -> None:
    draws = []
    for seed in range(DRAWS):
        logits, labels, alpha = make_inputs(5, 1, num_classes, *place, scale=1.0, seed=seed)
        hit = torch.nn.functional.one_hot(labels, num_classes).to(logits.dtype)
        logits = {
            "equal": torch.full_like(logits, 7.0),
            "tiny": 1e-4 * logits,
            "huge": 1e4 * logits,
            "onehot": logits + 30 * hit,
            "offset": logits + 2e3,
            "apart": logits + 3e4 * torch.linspace(-1, 1, num_classes).to(logits),
        }[kind]
        draws.append((logits, labels, alpha))
    assert_as_good_as_pytorch(draws)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_an_ensemble_share_of_zero_gives_no_nan(device: str) -> None:
    logits, labels, _ = make_inputs(3, 2, 65, device)
    alpha = torch.tensor([0.0, 300.0, -300.0], device=device)  # softmax(alpha) = 0, 1, 0
    assert_as_good_as_pytorch([(logits, labels, alpha)])


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_repeated_runs_give_the_same_bits(place: tuple[str, torch.dtype]) -> None:
    inputs = make_inputs(5, 3, 1000, *place)
    first, second = (run(distillation_loss, inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_backward_can_run_twice(device: str) -> None:
    logits, labels, alpha = make_inputs(5, 3, 65, device)
    logits.requires_grad_()
    total = sum(distillation_loss(logits, labels, alpha, backend="triton"))
    (first,) = torch.autograd.grad(total, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(total, logits, torch.tensor(2.0, device=device))
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("mode", ["full", "none"])
def test_operators_pass_opcheck(mode: str, device: str) -> None:
    logits, labels, alpha = make_inputs(3, 2, 7, device)
    upstream = torch.tensor([1.0, 2.0, 3.0], device=device)
    torch.library.opcheck(BWD.default, (upstream, logits, labels, alpha, mode, 0.1))
    for gradients in (upstream, None):
        torch.library.opcheck(FWD_BWD.default, (gradients, logits, labels, alpha, mode, 0.1))
    logits.requires_grad_()
    alpha.requires_grad_()
    torch.library.opcheck(FWD.default, (logits, labels, alpha, mode, 0.1))


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("num_classes", [65, 2500], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("scale", [None, 1024.0], ids=["unscaled", "scaled"])
def test_one_launch_gives_the_terms_and_gradients_of_two(
    scale: float | None, num_classes: int, place: tuple[str, torch.dtype]
) -> None:
    inputs = make_inputs(5, 3, num_classes, *place)
    upstream = (scale or 1.0,) * 3
    two = run(distillation_loss, inputs, upstream, backend="triton", label_smoothing=0.1)
    tensor = None if scale is None else torch.tensor(scale, device=place[0])
    options = {"label_smoothing": 0.1, "scale": tensor}
    terms, *grads = distillation_loss_and_gradients(*inputs, **options, backend="triton")
    for ours, want in zip((*terms, *grads), two, strict=True):
        torch.testing.assert_close(ours, want, rtol=0, atol=0)

    reference = run(distillation_loss_reference, inputs, upstream, label_smoothing=0.1)
    terms, *grads = distillation_loss_and_gradients(*inputs, **options, backend="torch")
    for ours, want in zip((*terms, *grads), reference, strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_an_upstream_gradient_without_strides_is_understood(device: str) -> None:
    logits, labels, alpha = make_inputs(3, 2, 7, device)
    one = torch.ones((), device=device)
    args = (logits, labels, alpha, "full", 0.0)
    for ours, exact in zip(BWD(one.expand(3), *args), BWD(one.repeat(3), *args), strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_whole_graph_compiles(device: str) -> None:
    inputs = make_inputs(3, 2, 65, device)
    compiled = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True)
    ours = run(compiled, inputs, backend="triton")
    eager = run(distillation_loss, inputs, backend="triton")
    for value, want in zip(ours, eager, strict=True):
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cudnn"}, "backend must be one of"),
        ({"logits": torch.zeros(5, 3, 7, dtype=torch.float64)}, "logits must be float16"),
        ({"logits": torch.zeros(3, 5, 7).transpose(0, 1)}, "logits must be contiguous"),
        (
            {"logits": torch.zeros(5, 3, 7, device="meta")},
            "labels must be contiguous torch.int64 on meta",
        ),
        ({"logits": torch.zeros(9, 3, 7), "alpha": torch.zeros(9)}, "at most 8 resolutions"),
        ({"logits": torch.zeros(5, 0, 7), "labels": torch.zeros(0).long()}, "not empty"),
        ({"labels": torch.zeros(6).long()[::2]}, "labels must be contiguous"),
        ({"labels": torch.tensor([0, 1, 7])}, r"labels must be in \[0, 7\)"),
        ({"alpha": torch.zeros(5, dtype=torch.float64)}, "alpha must be contiguous torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    logits, labels, alpha = make_inputs(5, 3, 7)
    arguments = {"logits": logits, "labels": labels, "alpha": alpha, "backend": "triton"}
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{**arguments, **change})


def test_a_bad_scale_is_named() -> None:
    inputs = make_inputs(5, 3, 7)
    for scale in (
        torch.ones(3),
        torch.ones((), dtype=torch.float64),
        torch.ones((), device="meta"),
    ):
        with pytest.raises(ValueError, match="scale must be a scalar float32 on cpu"):
            distillation_loss_and_gradients(*inputs, scale=scale)


def test_without_triton_only_the_triton_backend_is_missing() -> None:
    done = run_python("""
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from rsfast.kernels import distillation_loss
inputs = torch.zeros(2, 1, 3), torch.tensor([1]), torch.zeros(2)
distillation_loss(*inputs)
try:
    distillation_loss(*inputs, backend="triton")
except ImportError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("no ImportError")
""")
    assert done.returncode == 0, done.stderr


def test_import_leaves_triton_and_cuda_alone() -> None:
    done = run_python("""
import os, sys
before = dict(os.environ)
import rsfast.kernels, torch
assert "triton" not in sys.modules
assert not torch.cuda.is_initialized()
assert dict(os.environ) == before
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    def test_labels_out_of_range_fail_an_assertion(self, device: str) -> None:
        done = run_python("""
import torch
from rsfast.kernels import distillation_loss
inputs = torch.zeros(2, 1, 3).cuda(), torch.tensor([3]).cuda(), torch.zeros(2).cuda()
distillation_loss(*inputs, backend="triton")
torch.cuda.synchronize()
""")
        assert done.returncode != 0
        assert "labels must be in [0, K)" in done.stderr

    @pytest.mark.parametrize("num_classes", [1000, 4099])
    def test_another_stream_gives_the_same_bits(self, num_classes: int, device: str) -> None:
        inputs = make_inputs(5, 33, num_classes, device, torch.bfloat16)
        here = run(distillation_loss, inputs, backend="triton")
        there = on_another_stream(lambda: run(distillation_loss, inputs, backend="triton"))
        assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))

    def test_the_host_never_waits_and_a_graph_captures_it(self, device: str) -> None:
        inputs = make_inputs(5, 33, 1000, device, torch.bfloat16)
        exact = run(distillation_loss, inputs, backend="triton")
        captured = capture_without_host_sync(
            lambda: run(distillation_loss, inputs, backend="triton")
        )
        assert all(torch.equal(one, other) for one, other in zip(captured, exact, strict=True))
