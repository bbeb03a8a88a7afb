"""Runs of quantised networks: bases and their counts are state like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import make_image_folder
from rsfast import Pyramid, RSNet, analyze, create_model, evaluate, train
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.engine.ema import AveragedModel
from rsfast.engine.optim import build_optimizer
from rsfast.files.tables import read_rows
from rsfast.files.unpickle import load_dict
from rsfast.losses import MultiResolutionDistillation
from rsfast.models.deploy import calibrate
from rsfast.models.lq import LQActivation, LQConv2d
from rsfast.training import checkpoint
from run_helpers import assert_same_run, stop_when

SMALL = """--resolutions 32 24 --batch-size 4 --lr 0.01 --log-every 2 --seed 3 --epochs 2
    --loader pil --workers 0""".split()
STEPS = 5  # of an epoch: ceil(18 / 4)
TINY = ("--arch", "tiny:quantised")
RESNET = ("--arch", "resnet18_lq", "--activation-bits", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=9, val=5)


def start(folder: Path, output: Path, *flags: str) -> int:
    return train.main([*SMALL, "--data", str(folder), "--output", str(output), *flags])


def state_of(output: Path, part: str = "model", end: str = "") -> dict[str, Tensor]:
    state = load_dict(output / "last.pt")[part]
    return {name: tensor for name, tensor in state.items() if name.endswith(end)}


@pytest.mark.parametrize(
    ("flags", "stops"),
    [
        (TINY, (3, 8)),
        ((*TINY, "--deterministic", "--ema-decay", "0.9"), (2,)),
        pytest.param(
            (*RESNET, "--ema-decay", "0.9", "--fix-activation-basis", "--precision", "bf16"),
            (7,),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tiny", "deterministic ema", "resnet18 2/2 bf16"],
)
def test_a_run_stopped_within_an_epoch_continues_bit_for_bit_with_its_bases(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    stops: tuple[int, ...],
) -> None:
    whole = tmp_path / "whole"
    assert start(folder, whole, *flags) == 0
    for stop_at in stops:
        output = tmp_path / f"stopped{stop_at}"
        with monkeypatch.context() as patch:
            stop_when(patch, lambda run, stop_at=stop_at: run.steps_done == stop_at)
            assert start(folder, output, *flags) == 75
        updates = state_of(output, end="quantizer.updates").values()
        assert {int(count) for count in updates} == {2 * stop_at}
        assert start(folder, output, *flags, "--resume", "auto") == 0
        assert_same_run(output, whole)
    bases = state_of(whole, end=".basis")
    first = create_model(
        flags[1], (32, 24), 2, activation_bits=2 if flags[1] == "resnet18_lq" else None
    ).state_dict()
    assert bases
    assert not any(torch.equal(basis, first[name]) for name, basis in bases.items())


def test_a_deterministic_run_has_the_same_bits_again(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert start(folder, tmp_path / name, *TINY, "--deterministic") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_the_largest_resolution_alone_moves_the_bases_of_activations_if_asked_to(
    folder: Path, tmp_path: Path
) -> None:
    flags = ["--epochs", "1", "--steps-per-epoch", "2", "--fix-activation-basis"]
    assert start(folder, tmp_path / "run", *RESNET, *flags) == 0
    counts = state_of(tmp_path / "run", end=".updates")
    weights = {name for name in counts if ".quantizer." in name}
    assert len(counts) - len(weights) == 16  # activations, one for each convolution of a branch
    for name, count in counts.items():
        assert int(count) == (2 * 2 if name in weights else 2), name


def make_step() -> tuple[RSNet, TrainStep, Batch]:
    torch.manual_seed(0)
    model, loss = create_model("tiny:quantised", (32, 24), 4), MultiResolutionDistillation(2)
    step = TrainStep(model.train(), loss, build_optimizer(model, loss, lr=0.05), precision="fp32")
    labels = torch.arange(8) % 4
    batch = Batch(Pyramid.pack([torch.randn(8, 3, r, r) for r in (32, 24)]), labels, labels)
    return model, step, batch


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_left_out_leaves_bases_and_counts_as_they_were(bad: float) -> None:
    model, step, batch = make_step()
    step(batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = batch.images.rows.clone()
    rows[-1] = bad
    step(Batch(batch.images.with_rows(rows), batch.labels, batch.labels))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert step.guard.read() == (1, 1)
    step(batch)
    updates = [int(m.updates) for m in model.modules() if isinstance(m, LQActivation)]
    assert updates == [4, 4]


def error_of(model: RSNet) -> float:
    """What is left of the weights when they are quantised, relative to their size."""
    convs = [m for m in model.eval().modules() if isinstance(m, LQConv2d)]
    left = sum((conv.quantizer(conv.weight) - conv.weight).square().sum() for conv in convs)
    return float(left / sum(conv.weight.square().sum() for conv in convs))


@torch.no_grad()
def test_averaged_bases_fit_the_averaged_weights() -> None:
    model, step, batch = make_step()
    ema = AveragedModel(model, 0.9)
    bases, counts = [], []
    for _ in range(12):
        with torch.enable_grad():
            step(batch)
        ema.update(model)
        bases.append(model.network.conv2.quantizer.basis.clone())
        counts.append(int(ema.module.network.conv2.quantizer.updates))
    average = bases[0]
    for basis in bases[1:]:
        average = 0.9 * average + 0.1 * basis
    torch.testing.assert_close(ema.module.network.conv2.quantizer.basis, average)
    assert counts == [2 * n for n in range(1, 13)]
    stale = AveragedModel(model, 0.9).module
    stale.load_state_dict(ema.module.state_dict())
    for module in stale.modules():
        if isinstance(module, LQConv2d):
            module.quantizer.basis.copy_(create_model_basis(module))
    assert error_of(ema.module) < 1.05 * error_of(model) < error_of(stale)


def create_model_basis(conv: LQConv2d) -> Tensor:
    """The basis that a convolution of this size begins with."""
    sizes = conv.in_channels, conv.out_channels, conv.kernel_size[0]
    return LQConv2d(*sizes, bits=2).quantizer.basis


@pytest.mark.parametrize("training", [True, False])
def test_calibrating_moves_no_basis_and_leaves_the_mode(training: bool) -> None:
    model = create_model("tiny:quantised", (32, 24), 2).train(training)
    before = {n: t.clone() for n, t in model.state_dict().items() if "quantizer" in n}
    calibrate(model, [Pyramid.pack([torch.randn(2, 3, r, r) for r in (32, 24)])] * 2)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(module.training == training for module in model.modules())
    assert model.network.bn2.num_batches_tracked.tolist() == [2, 2]


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    flags = "--val-crop none --ema-decay 0.5 --epochs 1 --steps-per-epoch 2".split()
    assert start(folder, output, *RESNET, *flags) == 0
    return output


def test_statistics_before_the_first_step_are_estimated_with_the_bases_of_the_file(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Tensor] = {}

    def epochs(run: Any, interrupt: Any) -> None:
        found.update({k: v.clone() for k, v in run.model.state_dict().items()})
        run.log.close()

    monkeypatch.setattr(train, "train_epochs", epochs)
    flags = ["--pretrained", str(trained / "last.pt"), "--calibrate-first", "2"]
    assert start(folder, tmp_path / "run", *RESNET, *flags) == 0
    source = state_of(trained, "ema")
    for name, tensor in source.items():
        if name.endswith((".basis", ".updates")):
            assert torch.equal(found[name], tensor), name
    assert not torch.equal(found["network.bn1.running_mean"], source["network.bn1.running_mean"])


def test_a_run_that_continues_another_has_its_bits(
    folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*RESNET[:2], "--activation-bits", "32", "--continue-from", str(trained)]
    assert start(folder, tmp_path / "run", *flags, "--ema-decay", "0.5") == 2
    error = capsys.readouterr().err
    assert "was trained with activation_bits = 2, this run has 32" in error
    assert len(error.splitlines()) == 1


PIL = ("--loader", "pil", "--workers", "0", "--batch-size", "4")


def test_a_trained_network_is_evaluated_at_and_between_its_resolutions(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    for between in ("interpolate", "calibrate"):
        output = tmp_path / between
        flags = ["--resolutions", "36", "28", "--between", between, "--data", str(folder)]
        flags += ["--calibration-batches", "1"]
        arguments = [str(trained / "last.pt"), *flags, "--output", str(output), *PIL]
        assert evaluate.main(arguments) == 0
        rows = {row["resolution"]: row for row in read_rows(output / "accuracy.csv")}
        assert rows["28"]["batch_norm"] == (
            "0.50 x 32 + 0.50 x 24" if between == "interpolate" else "calibrated"
        )
        last = read_rows(trained / "summary.csv")[-1]
        for resolution in ("32", "24"):
            assert float(rows[resolution]["top1"]) == float(last[f"top1_{resolution}"])
            assert int(rows[resolution]["parameters"]) == sum(
                p.numel()
                for p in create_model("resnet18_lq", (32,), 2, activation_bits=2).parameters()
            )


def test_a_loaded_network_has_its_bits_and_answers_alike_at_each_resolution(trained: Path) -> None:
    model, _ = checkpoint.load_model(trained / "last.pt")
    assert model.bits == (2, 2)
    torch.manual_seed(0)
    images = [torch.randn(3, 3, r, r) for r in (32, 24)]
    with torch.no_grad():
        logits = model.eval()(images)
        for level, resolution in enumerate((32, 24)):
            own = model.at(resolution)(images[level])
            torch.testing.assert_close(own, logits[level], rtol=1e-4, atol=1e-5)


def test_every_question_about_a_quantised_run_is_answered(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "analysis"
    flags = ["--resolutions", "24:36:4", "--output", str(output), "--data", str(folder)]
    assert analyze.main([str(trained), *flags, *PIL]) == 0
    for name in ("alpha", "batch_norm", "dense", "features", "shares"):
        assert read_rows(output / f"{name}.csv"), name
    layers = {row["layer"] for row in read_rows(output / "batch_norm.csv")}
    # 20 of ResNet-18, four in front of blocks, four at the end of stages.
    assert len(layers) == 28
