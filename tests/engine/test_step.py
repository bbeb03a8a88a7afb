"""TrainStep: what one call does, in every precision a CPU has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rsfast import Pyramid, RSNet, create_model
from rsfast.data import Batch, Mix
from rsfast.engine import TrainStep, is_out_of_memory
from rsfast.engine.guard import _are_finite
from rsfast.engine.optim import build_optimizer
from rsfast.engine.snapshot import Snapshot
from rsfast.engine.step import _CapturedStep
from rsfast.losses import LossTerms, MultiResolutionDistillation, PixelDistillation

RESOLUTIONS = (64, 32)


def make_batch(num_images: int = 8, *, mixed: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(num_images, 3, r, r, generator=generator) for r in RESOLUTIONS]
    labels = torch.arange(num_images) % 4
    mix = Mix(labels.flip(0), torch.rand(num_images, generator=generator)) if mixed else None
    return Batch(Pyramid.pack(levels), labels, torch.arange(num_images), mix)


def make_step(
    precision: str, lr: float = 0.01, arch: str = "tiny:network"
) -> tuple[RSNet, TrainStep]:
    torch.manual_seed(0)
    model, loss = create_model(arch, RESOLUTIONS, 4), MultiResolutionDistillation(2)
    return model, TrainStep(model, loss, build_optimizer(model, loss, lr=lr), precision=precision)


@pytest.mark.parametrize("mixed", [False, True], ids=["one label", "mixed labels"])
def test_a_step_is_forward_backward_and_sgd(mixed: bool) -> None:
    model, step = make_step("fp32", arch="resnet18")
    twin, loss = create_model("resnet18", RESOLUTIONS, 4), MultiResolutionDistillation(2)
    twin.load_state_dict(model.state_dict())
    params = [*twin.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    batch = make_batch(mixed=mixed)
    for _ in range(2):
        terms = step(batch)
        optimizer.zero_grad()
        exact = loss(twin(batch.images), batch.labels, batch.mix)
        exact.total.backward()
        optimizer.step()
        for term, exact_term in zip(terms, exact, strict=True):
            assert torch.equal(term, exact_term)
            assert not term.requires_grad
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)]
)
def test_every_precision_overfits_a_small_batch(precision: str) -> None:
    _, step = make_step(precision, arch="resnet18")
    batch = make_batch()
    losses = [float(step(batch).total) for _ in range(12)]
    assert losses[-1] < 0.2 * losses[0]


def test_low_precision_stays_near_float32_and_keeps_float32_weights() -> None:
    model, step = make_step("bf16", arch="resnet18")
    _, exact_step = make_step("fp32", arch="resnet18")
    batch = make_batch()
    assert float(step(batch).total) == pytest.approx(float(exact_step(batch).total), rel=0.05)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert {norm.running_mean.dtype for norm in model.batch_norms()} == {torch.float32}


def test_fp16_skips_a_step_whose_gradients_overflow() -> None:
    model, step = make_step("fp16")
    batch = make_batch()
    batch.images.rows[0] = float("inf")
    before = [param.detach().clone() for param in model.parameters()]
    scale = step.scaler.get_scale()
    step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert step.scaler.get_scale() < scale


def state_of(model: RSNet, step: TrainStep) -> list[torch.Tensor]:
    momenta = [state["momentum_buffer"] for state in step._optimizer.state.values()]
    state = [*step._modules.state_dict().values(), *momenta]
    return [tensor.detach().clone() for tensor in state]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_nan_in_one_level_leaves_everything_as_it_was(precision: str) -> None:
    model, step = make_step(precision)
    good, bad = make_batch(), make_batch()
    bad.images.level(1)[3] = float("nan")
    for _ in range(5):
        step(good)  # in fp16 the first ones overflow
    step.guard.read()
    before = state_of(model, step)
    for _ in range(2):
        assert not step(bad).total.isfinite()
    # Momentum, batch-norm statistics and counters of all levels too.
    for ours, exact in zip(state_of(model, step), before, strict=True):
        assert torch.equal(ours, exact)
    assert step.guard.read() == (2, 2)
    step(good)
    assert not torch.equal(state_of(model, step)[0], before[0])
    assert step.guard.read() == (0, 2)
    step(good)
    assert step.guard.read() == (0, 0)


def test_rows_of_skipped_steps_are_counted_over_reads() -> None:
    _, step = make_step("fp32")
    good, bad = make_batch(), make_batch()
    bad.images.rows.fill_(float("inf"))
    counts = []
    for batches in ([bad, bad, good, bad], [bad, bad], [good, bad]):
        for batch in batches:
            step(batch)
        counts.append(step.guard.read())
    assert counts == [(3, 2), (2, 3), (1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_single_bad_number_is_found_and_good_ones_keep_their_bits(dtype: torch.dtype) -> None:
    numbers = torch.finfo(dtype)
    good = [torch.linspace(-1, 1, 37).to(dtype), torch.full((9,), numbers.max, dtype=dtype)]
    good += [
        torch.full((3, 5), numbers.tiny / 4, dtype=dtype).t(),
        torch.ones(2, dtype=torch.float),
    ]
    before = [grad.clone() for grad in good]
    assert bool(_are_finite(good))
    assert all(torch.equal(a, b) for a, b in zip(good, before, strict=True))
    for index, grad in enumerate(good):
        for bad in (float("nan"), float("inf"), float("-inf")):
            spoilt = grad.clone()
            spoilt[(-1,) * spoilt.dim()] = bad
            assert not bool(_are_finite([*good[:index], spoilt, *good[index + 1 :]]))


class InfiniteLoss(MultiResolutionDistillation):
    """One that is infinite while its gradients are not."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> LossTerms:
        terms = super().forward(logits, labels)
        return terms._replace(ce=terms.ce + float("inf"))


@pytest.mark.parametrize("fused", [True, False])
def test_an_infinite_loss_with_finite_gradients_is_left_out_too(fused: bool) -> None:
    model, loss = create_model("resnet18", RESOLUTIONS, 4), InfiniteLoss(2)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1, fused=fused)
    step = TrainStep(model, loss, optimizer, precision="fp32")
    before = state_of(model, step)
    step(make_batch())
    for ours, exact in zip(state_of(model, step), before, strict=True):
        assert torch.equal(ours, exact)
    assert step.guard.read() == (1, 1)


@pytest.mark.parametrize("mixed", [False, True], ids=["one label", "mixed labels"])
def test_a_batch_that_does_not_fit_is_named_with_one_that_does(
    mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, step = make_step("fp32")
    forward = model.forward

    def full_above_three_images(images: Pyramid) -> torch.Tensor:
        if images.num_images > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    monkeypatch.setattr(model, "forward", full_above_three_images)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        step(make_batch(12, mixed=mixed))
    assert str(caught.value) == (
        "batch_size 12 does not fit into the memory of cpu at 64 pixels and below: 3 does (tried)"
    )
    assert all(param.grad is None for param in model.parameters())
    step(make_batch(3, mixed=mixed))


def make_maps(num_images: int) -> Batch:
    torch.manual_seed(1)
    images = [torch.randn(num_images, 3, r, r) for r in RESOLUTIONS]
    labels = torch.randint(0, 4, (num_images, RESOLUTIONS[0], RESOLUTIONS[0])).byte()
    labels[:, :9] = 255
    return Batch(Pyramid.pack(images), labels, torch.arange(num_images))


def make_step_of_maps() -> tuple[RSNet, TrainStep]:
    torch.manual_seed(0)
    model = create_model("mask_helpers:network", RESOLUTIONS, 4, task="segmentation").train()
    loss = PixelDistillation(2)
    optimizer = build_optimizer(model, loss, lr=0.05)
    return model, TrainStep(model, loss, optimizer, precision="fp32")


def test_a_step_of_segmentation_trains_and_names_a_batch_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, step = make_step_of_maps()
    losses = [step(make_maps(4)).ce.item() for _ in range(8)]
    assert losses[-1] < losses[0]
    forward = model.forward

    def full_above_three_images(images: Pyramid) -> Pyramid:
        if images.num_images > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    monkeypatch.setattr(model, "forward", full_above_three_images)
    with pytest.raises(torch.OutOfMemoryError, match="batch_size 8 does not fit .*: 2 does"):
        step(make_maps(8))


def test_a_step_of_segmentation_that_is_not_finite_is_left_out() -> None:
    model, step = make_step_of_maps()
    step(make_maps(4))
    before = state_of(model, step)
    batch = make_maps(4)
    batch.images.rows[5, 0] = float("nan")
    step(batch)
    weights = dict(model.named_parameters())
    for name, param in weights.items():
        assert bool(torch.isfinite(param).all()), name
    for ours, exact in zip(state_of(model, step), before, strict=True):
        assert torch.equal(ours, exact)
    assert step.guard.read() == (1, 1)


def test_leaving_a_capture_does_not_hide_that_memory_ran_out() -> None:
    def capture() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError, match="operation failed") as caught:
        capture()
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("something else"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_warm_up_steps_leave_no_trace(precision: str, steps_before: int) -> None:
    batch, other = make_batch(), make_batch(4)
    losses, states = [], []
    for warm_up_steps in (0, 3):
        model, step = make_step(precision)
        for _ in range(steps_before):
            step(batch)
        # What TrainStep does before it captures a graph, here around a few steps on a CPU.
        before = Snapshot(step._modules, step._optimizer, step.scaler, torch.device("cpu"))
        addresses = [param.data_ptr() for param in model.parameters()]
        for _ in range(warm_up_steps):
            step(other)
            torch.rand(1)
        before.restore()
        assert addresses == [param.data_ptr() for param in model.parameters()]
        losses.append([step(batch).total.item() for _ in range(3)])
        momenta = [state["momentum_buffer"] for state in step._optimizer.state.values()]
        rest = [torch.get_rng_state(), torch.tensor(step.scaler.get_scale())]
        states.append([*step._modules.state_dict().values(), *momenta, *rest])
    assert losses[0] == losses[1]
    for ours, exact in zip(*states, strict=True):
        assert torch.equal(ours, exact)


class Graph:
    """In the place of a CUDA graph: runs the step on the captured memory."""

    def __init__(self, step: TrainStep, memory: Batch, terms: LossTerms) -> None:
        self._arguments = step, memory, terms

    def replay(self) -> None:
        step, memory, terms = self._arguments
        for term, value in zip(terms, step._run(memory), strict=True):
            term.copy_(value)


def make_captured(mixed: bool) -> tuple[TrainStep, _CapturedStep]:
    """A step, and the same one replayed on memory of its own."""
    (_, eager), (_, step) = make_step("fp32"), make_step("fp32")
    memory = make_batch(mixed=mixed)
    terms = LossTerms(*torch.zeros(3).unbind())
    return eager, _CapturedStep(Graph(step, memory, terms), memory, terms)  # type: ignore[arg-type]


@pytest.mark.parametrize("mixed", [False, True], ids=["one label", "mixed labels"])
def test_a_replay_reads_the_labels_of_its_own_batch(mixed: bool) -> None:
    eager, captured = make_captured(mixed)
    first, totals = make_batch(mixed=mixed), []
    second = dataclasses.replace(
        first,
        labels=first.labels.roll(1),
        mix=first.mix and Mix(first.mix.labels.roll(3), 1 - first.mix.share),
    )
    for batch in (first, second, first):
        exact = eager(batch)
        for term, exact_term in zip(captured(batch), exact, strict=True):
            assert torch.equal(term, exact_term)
        totals.append(float(exact.total))
    assert len(set(totals)) == 3


@pytest.mark.parametrize(
    ("mixed", "words"),
    [(False, "without mixed labels .* got one with:"), (True, "with mixed .* got one without:")],
)
def test_a_captured_step_takes_mixed_labels_always_or_never(mixed: bool, words: str) -> None:
    _, captured = make_captured(mixed)
    before = captured._batch.labels.clone()
    other = make_batch(mixed=not mixed)
    with pytest.raises(ValueError, match=f"batch must be {words} give all batches"):
        captured(dataclasses.replace(other, labels=other.labels.flip(0)))
    assert torch.equal(captured._batch.labels, before)


def test_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="precision must be one of .* got 'fp8'"):
        make_step("fp8")


def test_a_cpu_runs_the_same_step_with_or_without_a_graph() -> None:
    batch, losses = make_batch(), []
    for graph in (True, False):
        torch.manual_seed(0)
        model, loss = create_model("resnet18", RESOLUTIONS, 4), MultiResolutionDistillation(2)
        optimizer = build_optimizer(model, loss, lr=0.01)
        step = TrainStep(model, loss, optimizer, precision="fp32", graph=graph)
        losses.append([float(step(batch).total) for _ in range(2)])
    assert losses[0] == losses[1]
