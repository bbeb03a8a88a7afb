"""The loss of pixels: few classes, many rows, and rows that do not count.

Without a CUDA device the kernels run in Triton's interpreter (see tests/conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.support.inputs import make_loss_inputs
from kernel_helpers import CPU_OR_GPU, GPU_ONLY, PLACES, capture_without_host_sync, gpu
from loss_helpers import (
    DRAWS,
    UPSTREAMS,
    Inputs,
    assert_as_good_as_pytorch,
    loss_of_each_row,
    run,
)
from rsfast.kernels import DISTILL_MODES, distillation_loss, distillation_loss_and_gradients
from sampling import pairwise
from without_gpu.watch import HostWaits

OPERATORS = torch.ops.rsfast
IGNORED = 255

# The reference multiplies matrices, which cuBLAS does not promise to repeat.
pytestmark = pytest.mark.filterwarnings("ignore:.*CuBLAS:UserWarning")


@pytest.fixture(params=[False, True], ids=["row", "tile"])
def tiles_of_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a program has many rows, however few there are: else it has one."""
    tiles = pytest.importorskip("rsfast.kernels.distillation_loss.tiles")
    monkeypatch.setattr(tiles, "MANY_ROWS", 1 if request.param else 10**9)
    return request.param


def make_inputs(
    shape: tuple[int, ...],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    ignored: str = "some",
    seed: int = 0,
) -> Inputs:
    """Those of the loss with uint8 labels, of which none, some (the first one, too) or all are 255.

    A single row counts, unless none does.
    """
    logits, labels, alpha = make_loss_inputs(*shape, device, dtype, seed=seed)
    labels = labels.to(torch.uint8)
    if ignored == "all":
        labels.fill_(IGNORED)
    elif ignored == "some" and shape[1] > 1:
        labels[::3] = IGNORED
    return logits, labels, alpha


@pairwise(
    {
        # By rows few: in the interpreter every program takes milliseconds.
        "shape, tiles_of_rows": [
            *(((1, 1, 2), tiled) for tiled in (False, True)),
            *(((8, 3, 150), tiled) for tiled in (False, True)),
            *(((2, 3, 40), tiled) for tiled in (False, True)),
            ((3, 65, 11), True),
            ((3, 65, 150), True),
            ((8, 65, 2), True),
            ((4, 65, 40), True),
        ],
        "mode": DISTILL_MODES,
        "place": PLACES,
    },
    indirect=["place", "tiles_of_rows"],
)
def test_terms_and_gradients_match_the_float64_reference(
    shape: tuple[int, ...], mode: str, tiles_of_rows: bool, place: tuple[str, torch.dtype]
) -> None:
    draws = [make_inputs(shape, *place, seed=seed) for seed in range(DRAWS)]
    assert_as_good_as_pytorch(draws, mode=mode, label_smoothing=0.1, ignore_index=IGNORED)


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_many_classes_and_a_class_that_does_not_count(place: tuple[str, torch.dtype]) -> None:
    draws = [make_loss_inputs(5, 6, 1100, *place, seed=seed) for seed in range(DRAWS)]
    ignored = int(draws[0][1][2])
    assert_as_good_as_pytorch(draws, ignore_index=ignored)


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_programs_that_go_over_several_tiles(
    place: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = pytest.importorskip("rsfast.kernels.distillation_loss.launch")
    draws = [make_inputs((2, 4099, 2), *place, seed=seed) for seed in range(DRAWS)]
    assert launch.num_sums(draws[0][0]) == 33  # tiles of 128 rows
    monkeypatch.setattr(launch.tiles, "MULTIPROCESSORS", 1)
    assert launch.num_sums(draws[0][0]) == 3
    assert_as_good_as_pytorch(draws, ignore_index=IGNORED)


@pytest.mark.parametrize("shape", [(3, 7, 5), (8, 2, 2), (1, 4, 11)], ids=str)
@pytest.mark.parametrize("mode", DISTILL_MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
@pytest.mark.parametrize("ignored", ["none", "some"])
def test_the_reference_is_the_mean_over_the_rows_that_count(
    ignored: str, smoothing: float, mode: str, shape: tuple[int, ...]
) -> None:
    logits, labels, alpha = make_inputs(shape, "cpu", torch.float64, ignored)
    inputs = (logits, labels, alpha.double())
    options = {"mode": mode, "label_smoothing": smoothing, "ignore_index": IGNORED}
    ours = run(distillation_loss, inputs, **options)
    exact = run(loss_of_each_row, inputs, **options)
    for value, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-13)
    assert not ours.dlogits[:, labels == IGNORED].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
@pytest.mark.parametrize("shape", [(3, 9, 11), (2, 3, 1100)], ids=str)
def test_no_row_that_counts_costs_nothing(
    shape: tuple[int, ...], smoothing: float, device: str, backend: str, tiles_of_rows: bool
) -> None:
    inputs = make_inputs(shape, device, ignored="all")
    options = {"ignore_index": IGNORED, "label_smoothing": smoothing, "backend": backend}
    terms, *grads = distillation_loss_and_gradients(*inputs, **options)
    for value in (*run(distillation_loss, inputs, **options), *terms, *grads):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize(
    ("backend", "device"),
    # On a GPU PyTorch divides by numbers of the host and by those of the device in different ways.
    [("torch", "cpu"), ("triton", "cpu"), pytest.param("triton", "cuda", marks=gpu)],
    indirect=["device"],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
@pytest.mark.parametrize("shape", [(3, 9, 11), (2, 3, 1100)], ids=str)
def test_where_all_rows_count_nothing_changes_by_a_bit(
    shape: tuple[int, ...], smoothing: float, device: str, backend: str, tiles_of_rows: bool
) -> None:
    logits, labels, alpha = make_loss_inputs(*shape, device)
    options = {"label_smoothing": smoothing, "backend": backend}
    exact = run(distillation_loss, (logits, labels, alpha), **options)
    choices = [(labels, IGNORED), (labels, -100)]
    if shape[-1] < IGNORED:
        choices += [(labels.to(torch.uint8), None), (labels.to(torch.uint8), IGNORED)]
    for of_kind, ignored in choices:
        ours = run(distillation_loss, (logits, of_kind, alpha), ignore_index=ignored, **options)
        assert all(torch.equal(one, other) for one, other in zip(ours, exact, strict=True))


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("scale", [None, 1024.0], ids=["unscaled", "scaled"])
def test_one_launch_gives_the_terms_and_gradients_of_two(
    scale: float | None, place: tuple[str, torch.dtype], tiles_of_rows: bool
) -> None:
    # PyTorch adds up the sums of more programs in an order that depends on how many sums there are.
    inputs = make_inputs((3, 9 if tiles_of_rows else 3, 11), *place)
    tensor = None if scale is None else torch.tensor(scale, device=place[0])
    for backend, bounds in (("triton", {"rtol": 0.0, "atol": 0.0}), ("torch", {})):
        options: dict[str, Any] = {"ignore_index": IGNORED, "backend": backend}
        two = run(distillation_loss, inputs, (scale or 1.0,) * 3, **options)
        terms, *grads = distillation_loss_and_gradients(*inputs, **options, scale=tensor)
        for ours, want in zip((*terms, *grads), two, strict=True):
            torch.testing.assert_close(ours, want, **bounds)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_operators_pass_opcheck(device: str, tiles_of_rows: bool) -> None:
    logits, labels, alpha = make_inputs((3, 5, 7), device)
    upstream = torch.tensor([1.0, 2.0, 3.0], device=device)
    arguments = (logits, labels, alpha, "full", 0.1, None, None, IGNORED)
    torch.library.opcheck(OPERATORS.distillation_loss_bwd.default, (upstream, *arguments))
    torch.library.opcheck(OPERATORS.distillation_loss_fwd_bwd.default, (upstream, *arguments))
    logits.requires_grad_()
    alpha.requires_grad_()
    torch.library.opcheck(OPERATORS.distillation_loss_fwd.default, arguments)


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_whole_graph_compiles(device: str, tiles_of_rows: bool) -> None:
    inputs = make_inputs((3, 5, 7), device)
    compiled = torch.compile(distillation_loss, backend="aot_eager", fullgraph=True)
    options = {"ignore_index": IGNORED, "backend": "triton"}
    for value, want in zip(
        run(compiled, inputs, **options), run(distillation_loss, inputs, **options), strict=True
    ):
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_rows_are_counted_without_a_host_that_waits(
    device: str, backend: str, tiles_of_rows: bool
) -> None:
    inputs = make_inputs((3, 5, 7), device)
    with HostWaits() as watch:
        run(distillation_loss, inputs, ignore_index=IGNORED, backend=backend)
    assert "aten.ne.Scalar" in watch.seen
    # `run` adds up the terms with numbers of the host.
    assert not [place for _, place in watch.found if place.startswith("rsfast")]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 255, 7])}, r"\[0, 7\) or ignore_index \(255\), got values f"),
        ({"labels": torch.tensor([0, 255, 1]), "ignore_index": None}, "got values from 0 to 255"),
        ({"labels": torch.tensor([0, -1, 1])}, "got values from -1 to 1"),
        ({"labels": torch.zeros(3).int()}, r"labels must be int64 or uint8 \[3\], got torch.int32"),
        (
            {"labels": torch.tensor([0, 156, 1]).byte(), "ignore_index": -100},
            r"ignore_index must be in \[0, 256\) for uint8 labels, or None, got -100",
        ),
        ({"labels": torch.zeros(3).byte(), "ignore_index": 256}, r"for uint8 .*, got 256"),
        (
            {"partner_labels": torch.zeros(3).long(), "share": torch.ones(3)},
            "ignore_index must be None where images are mixed",
        ),
        (
            {
                **dict.fromkeys(["labels", "partner_labels"], torch.zeros(3).byte()),
                **{"share": torch.ones(3), "ignore_index": None},
            },
            r"partner_labels must be int64 \[3\], got torch.uint8",
        ),
    ],
    ids=[
        "class",
        "not ignored",
        "negative",
        "int32",
        "bytes",
        "no byte",
        "mixed",
        "uint8 partners",
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, backend: str) -> None:
    logits, labels, alpha = make_inputs((5, 3, 7))
    arguments: dict[str, Any] = {"labels": labels, "ignore_index": IGNORED, **change}
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits, alpha=alpha, backend=backend, **arguments)


@pytest.mark.parametrize("device", GPU_ONLY, indirect=True)
class TestOnTheGpu:
    def test_the_host_never_waits_and_a_graph_captures_it(self, device: str) -> None:
        inputs = make_inputs((3, 8 * 96 * 96, 40), device)

        def both() -> list[Tensor]:
            return list(run(distillation_loss, inputs, backend="triton", ignore_index=IGNORED))

        exact = both()
        captured = capture_without_host_sync(both)
        assert all(torch.equal(one, other) for one, other in zip(captured, exact, strict=True))

    def test_a_network_sized_batch_matches_the_float64_reference(self, device: str) -> None:
        draws = [make_inputs((3, 2 * 96 * 96, k), device) for k in (11, 40, 65)]
        for inputs in draws:
            assert_as_good_as_pytorch([inputs], UPSTREAMS["total"], ignore_index=IGNORED)
