"""What only a GPU can show: `make test-gpu`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import make_image_folder
from kernel_helpers import host_must_not_wait
from rsfast import Pyramid, create_model, train
from rsfast.data import Augment, Batch, Loader, Mix, prefetch, train_loader, val_loader
from rsfast.engine import TrainStep
from rsfast.engine.metrics import LossMeter
from rsfast.engine.optim import build_optimizer, set_lr
from rsfast.files.pictures import LEVEL_MODES
from rsfast.kernels import choose_backend
from rsfast.losses import LossTerms, MultiResolutionDistillation
from rsfast.models import RSNet
from rsfast.models.parts import freeze
from run_helpers import assert_same_run, stop_when

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RESOLUTIONS = (64, 48, 32)


def make_batch(device: str, num_images: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(num_images, 3, r, r, generator=generator) for r in RESOLUTIONS]
    indices = torch.arange(num_images)
    return Batch(Pyramid.pack(levels).to(device), (indices % 4).to(device), indices)


def make_step(
    arch: str,
    device: str,
    precision: str,
    *,
    graph: bool = False,
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    frozen: Sequence[str] = (),
) -> tuple[RSNet, TrainStep]:
    torch.manual_seed(seed)
    backend = backend or choose_backend("auto", torch.device(device))
    model = create_model(arch, RESOLUTIONS, 4, backend=backend).to(device, dtype)
    loss = MultiResolutionDistillation(len(RESOLUTIONS), backend=backend).to(device, dtype)
    freeze(model, frozen)
    optimizer = build_optimizer(model, loss, lr=0.003)
    return model, TrainStep(model, loss, optimizer, precision=precision, graph=graph)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenetv2"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 0.01), ("bf16", 0.1), ("fp16", 0.03)])
def test_first_loss_is_that_of_the_cpu(arch: str, precision: str, bound: float) -> None:
    _, gpu_step = make_step(arch, "cuda", precision)
    _, cpu_step = make_step(arch, "cpu", "fp32")
    exact = float(cpu_step(make_batch("cpu")).total)
    assert float(gpu_step(make_batch("cuda")).total) == pytest.approx(exact, rel=bound)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", ["resnet50", "mobilenetv2"])
def test_losses_over_fifty_steps_are_as_near_to_float64_as_those_of_plain_pytorch(
    arch: str, precision: str
) -> None:
    def losses(seed: int, precision: str, **settings: Any) -> Tensor:
        batch = make_batch("cuda", seed=seed)
        dtype = settings.get("dtype", torch.float32)
        batch = Batch(batch.images.to(dtype), batch.labels, batch.indices)
        _, step = make_step(arch, "cuda", precision, seed=seed, **settings)
        return torch.stack([step(batch).total for _ in range(50)]).double()

    choices = (
        {"precision": "fp32", "backend": "torch", "dtype": torch.float64},
        {"precision": precision, "backend": "torch"},
        {"precision": precision, "graph": True},
    )
    exact, eager, ours = (torch.stack([losses(s, **c) for s in range(3)]) for c in choices)
    # Means over steps and seeds, because each error is luck.
    assert (ours - exact).abs().mean() <= 2 * (eager - exact).abs().mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_overfits_a_small_batch(precision: str) -> None:
    _, step = make_step("resnet18", "cuda", precision)
    batch = make_batch("cuda")
    losses = [float(step(batch).total) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "tiny:quantised"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nothing_waits_for_the_device_between_log_lines(
    precision: str, graph: bool, arch: str
) -> None:
    _, step = make_step(arch, "cuda", precision, graph=graph)
    batch, meter = make_batch("cuda"), LossMeter(LossTerms._fields, torch.device("cuda"))
    meter.add(step(batch))  # first-use set-up may wait
    with host_must_not_wait():
        for index in range(3):
            set_lr(step._optimizer, 0.1 / (index + 1))
            meter.add(step(batch))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("arch", "frozen"),
    [
        ("mobilenetv2", ()),
        ("mobilenetv2", ("stem", "features.3", "classifier")),
        ("tiny:quantised", ()),
    ],
    ids=str,
)
def test_graph_and_eager_give_the_same_losses_over_fifty_steps(
    arch: str,
    frozen: tuple[str, ...],
    precision: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for graph in (False, True):
            # Without max pooling, whose backward adds in any order.
            options: dict[str, Any] = {"graph": graph, "backend": backend, "frozen": frozen}
            model, step = make_step(arch, "cuda", precision, **options)
            batch, losses = make_batch("cuda"), []
            for index in range(50):
                set_lr(step._optimizer, 0.003 * (1 - index / 50))
                losses.append(step(batch).total)
            runs.append((torch.stack(losses).tolist(), model.state_dict()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0][0] == runs[1][0]
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name]), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graph_and_eager_give_the_same_losses_on_mixed_labels(
    precision: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    batch, shares = make_batch("cuda"), torch.rand(10, 8, device="cuda")
    mixes = [Mix(batch.labels.roll(index), share) for index, share in enumerate(shares)]
    try:
        runs = []
        for graph in (False, True):
            # Without max pooling, whose backward adds in any order.
            _, step = make_step("mobilenetv2", "cuda", precision, graph=graph, backend=backend)
            batches = [dataclasses.replace(batch, mix=mix) for mix in mixes]
            step(batches[0])  # first-use set-up may wait
            with host_must_not_wait():
                losses = [step(mixed).total for mixed in batches]
            runs.append(torch.stack(losses).tolist())
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0] == runs[1]


def test_a_captured_step_refuses_a_batch_without_the_mixed_labels_that_others_have() -> None:
    _, step = make_step("resnet18", "cuda", "bf16", graph=True)
    batch = make_batch("cuda")
    step(dataclasses.replace(batch, mix=Mix(batch.labels, torch.ones(8, device="cuda"))))
    with pytest.raises(ValueError, match="batch must be with mixed labels"):
        step(batch)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_an_overflow_at_the_first_step_spoils_nothing(graph: bool) -> None:
    model, step = make_step("resnet18", "cuda", "fp16", graph=graph)
    good, bad = make_batch("cuda"), make_batch("cuda")
    bad.images.rows[0] = float("inf")
    before = [param.detach().clone() for param in model.parameters()]
    scale = step.scaler.get_scale()
    step(bad)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(s["momentum_buffer"].any() for s in step._optimizer.state.values())
    assert step.scaler.get_scale() < scale
    for _ in range(10):  # the scale comes down until gradients fit
        loss = step(good).total
    assert loss.isfinite()
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("arch", ["resnet18", "tiny:quantised"])
def test_a_nan_in_one_level_leaves_everything_as_it_was(
    arch: str, precision: str, graph: bool
) -> None:
    model, step = make_step(arch, "cuda", precision, graph=graph)
    good, bad = make_batch("cuda"), make_batch("cuda")
    bad.images.level(1)[3] = float("nan")
    for _ in range(10):
        step(good)  # in fp16 the first ones overflow
    step.guard.read()
    before = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    with host_must_not_wait():
        for _ in range(2):
            step(bad)
    for ours, exact in zip((*model.parameters(), *model.buffers()), before, strict=True):
        assert torch.equal(ours, exact)
    assert step.guard.read() == (2, 2)
    assert step(good).total.isfinite()
    assert step.guard.read() == (0, 2)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_batch_that_does_not_fit_is_named_with_one_that_does(graph: bool) -> None:
    model, step = make_step("resnet50", "cuda", "bf16", graph=graph)
    total = torch.cuda.get_device_properties(0).total_memory
    # A step of 512 images is modelled to take 3.5 to 3.75 GiB.
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"batch_size 512 does not fit") as caught:
            step(make_batch("cuda", num_images=512))
        words = str(caught.value).split()
        fits = int(words[words.index("does", words.index("below:")) - 1])
        assert 1 <= fits < 512
        # The words must not hold on to the memory that they speak of.
        del model, step, caught
        _, step = make_step("resnet50", "cuda", "bf16")
        assert step(make_batch("cuda", num_images=fits)).total.isfinite()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_captured_step_refuses_another_shape_in_words() -> None:
    _, step = make_step("resnet18", "cuda", "bf16", graph=True)
    step(make_batch("cuda"))
    with pytest.raises(ValueError, match="batch must have the shape that was captured, 8 images"):
        step(make_batch("cuda", num_images=4))


def test_a_replay_does_not_change_losses_handed_out_before() -> None:
    _, step = make_step("resnet18", "cuda", "bf16", graph=True)
    batch = make_batch("cuda")
    first = step(batch).total
    before = float(first)
    for _ in range(5):
        step(batch)
    assert float(first) == before


@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65, 1.0])
@pytest.mark.parametrize(
    ("make", "modes"),
    [(train_loader, {"crop": "single"}), (train_loader, {"crop": "multi"}), (val_loader, {})],
    ids=["single", "multi", "val"],
)
def test_dali_on_the_gpu_agrees_with_pillow(
    tmp_path: Path, make: Callable[..., Loader], modes: dict[str, str], hw_decoder_load: float
) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    root = make_image_folder(tmp_path, train=8, val=8)
    modes = {"normalize": "none", "device": "cuda", **modes}
    ours = make(root, RESOLUTIONS, 4, hw_decoder_load=hw_decoder_load, **modes)
    oracle = make(root, RESOLUTIONS, 4, backend="pil", workers=0, **modes)
    for batch, exact in zip(ours, oracle, strict=True):
        assert torch.equal(batch.labels, exact.labels)
        error = 255 * (batch.images.rows - exact.images.rows).abs()
        # nvJPEG rounds its inverse DCT otherwise than libjpeg: NVIDIA's own tests allow 1 before
        # any resize. Colours that are not interpolated would make it 3.5 to 4.3 (computed with
        # libjpeg on a CPU).
        assert error.mean() < 1.0


def test_dali_keeps_its_pictures_until_a_busy_stream_has_copied_them(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    root = make_image_folder(tmp_path, train=40)

    def rows(cycles: int) -> Tensor:
        found = []
        for batch in train_loader(root, RESOLUTIONS, 4, normalize="none", device="cuda"):
            found.append(batch.images.rows)
            torch.cuda._sleep(cycles)  # the next copy waits behind it, while DALI goes on
        return torch.cat(found)

    difference = 255 * (rows(0) - rows(50_000_000)).abs()
    assert difference.mean() < 1.0  # other pictures differ by tens


def test_dali_does_not_wait_for_the_step(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    root = make_image_folder(tmp_path, train=20)
    loader = train_loader(root, RESOLUTIONS, 4, device="cuda")
    batches = prefetch(loader, torch.device("cuda", torch.cuda.current_device()))
    for _ in range(3):  # first-use set-up may wait
        next(batches)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # two seconds or more, of a step
    step_done = torch.cuda.Event()
    step_done.record()
    for _ in range(3):
        next(batches)
    assert not step_done.query()


@pytest.mark.parametrize("levels", LEVEL_MODES)
def test_mixed_lit_and_erased_batches_are_those_of_a_cpu(levels: str, tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, train=20)
    options = {"backend": "pil", "workers": 0, "levels": levels}
    options["augment"] = Augment(mixup=0.4, cutmix=1.0, random_erasing=0.5, lighting=0.1)
    here, there = (
        train_loader(root, RESOLUTIONS, 4, device=device, **options) for device in ("cpu", "cuda")
    )
    device = torch.device("cuda", torch.cuda.current_device())
    for exact, batch in zip(here, prefetch(there, device), strict=True):
        torch.cuda._sleep(1_000_000)  # the step, while the next batch is mixed
        assert batch.mix is not None
        assert exact.mix is not None
        assert torch.equal(batch.mix.labels.cpu(), exact.mix.labels)
        assert torch.equal(batch.mix.share.cpu(), exact.mix.share)
        error = (batch.images.rows.cpu() - exact.images.rows).abs()
        assert error.max() < 1.5 / (255 * 0.22)  # a step of 255 where the sum lies between two
        assert error.mean() < 1e-4


def test_the_command_trains_on_the_gpu_in_bf16_by_default(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "images")
    flags = "--arch resnet18 --resolutions 64 32 --batch-size 4 --epochs 2 --loader pil --workers 0"
    output = tmp_path / "run"
    assert train.main([*flags.split(), "--data", str(root), "--output", str(output)]) == 0
    start = json.loads((output / "log.jsonl").read_text().splitlines()[0])
    assert start["config"]["precision"] == "bf16"
    assert start["gpu"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("graph", ["--graph", "--no-graph"])
@pytest.mark.parametrize("arch", ["mobilenetv2", "resnet18"])
def test_a_run_stopped_after_a_step_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, graph: str
) -> None:
    root = make_image_folder(tmp_path / "images", train=12)
    flags = f"--arch {arch} --resolutions 64 48 --batch-size 4 --epochs 2 --loader pil --workers 0"
    common = [*flags.split(), graph, "--deterministic", "--log-every", "2", "--data", str(root)]
    outputs = tmp_path / "whole", tmp_path / "parts"
    try:
        assert train.main([*common, "--output", str(outputs[0])]) == 0
        with monkeypatch.context() as patch:
            stop_when(patch, lambda run: run.steps_done == 9)
            assert train.main([*common, "--output", str(outputs[1])]) == 75
        assert train.main([*common, "--output", str(outputs[1]), "--resume", "auto"]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(outputs[1], outputs[0])
