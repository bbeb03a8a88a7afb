"""Networks with folded batch norm are the same networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rsfast import Pyramid, RSNet, create_model, kernels
from rsfast.data import Batch
from rsfast.engine import TrainStep
from rsfast.losses import MultiResolutionDistillation
from rsfast.models.deferred import DeferredPyramid
from rsfast.models.layers import Conv2d, MaxPool2d, SwitchableBatchNorm2d
from rsfast.models.mobilenetv2 import InvertedResidual
from rsfast.models.resnet import Bottleneck
from rsfast.optim import build_optimizer

RESOLUTIONS = (64, 48, 32)


def make_network(arch: str, bn: str = "private") -> RSNet:
    torch.manual_seed(0)
    model = create_model(arch, RESOLUTIONS, 4, bn).double()
    for norm in model.batch_norms():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    return model


def make_images(num_images: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(num_images, 3, r, r) for r in RESOLUTIONS]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def train_once(model: RSNet, into: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a step; gradients and state after it."""
    model = copy.deepcopy(model).fold_batch_norm(into).train()
    loss = MultiResolutionDistillation(len(RESOLUTIONS)).double()
    logits = model(make_images())
    loss(logits, torch.tensor([0, 3, 1, 3])).total.backward()
    grads = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {**grads, **model.state_dict()}


@pytest.mark.parametrize(
    ("arch", "into", "bn"),
    [
        ("resnet18", "statistics", "private"),
        ("resnet18", "1x1", "private"),
        ("resnet18", "all", "private"),
        ("resnet50", "statistics", "shared"),
        ("resnet50", "1x1", "shared"),
        ("resnet50", "all", "private"),
        ("mobilenetv2", "statistics", "shared"),
        ("mobilenetv2", "1x1", "private"),
        ("mobilenetv2", "all", "shared"),
    ],
)
def test_a_folded_network_trains_as_it_does_unfolded(arch: str, into: str, bn: str) -> None:
    model = make_network(arch, bn)
    (want, exact), (ours, found) = (train_once(model, choice) for choice in ("none", into))
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        # Gradients that cancel (a shift before the next batch norm) have no digits of their own.
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("arch", ["resnet50", "mobilenetv2"])
def test_evaluation_is_not_changed_at_all(arch: str) -> None:
    model, images = make_network(arch).eval(), make_images()
    with torch.no_grad():
        want = model(images)
        assert torch.equal(model.fold_batch_norm("all")(images), want)


@pytest.mark.parametrize(
    ("into", "absorbed", "applied", "measured"),
    [
        # Of 53 all are applied; only what follows the stem and the 3x3 of each block has to be
        # measured.
        ("statistics", 0, 53, 1 + 16),
        # That of the stem is applied (PyTorch's pooling has no fused kernel); of each of 16 blocks
        # the second goes into the third convolution; the first, the last and that of a shortcut
        # are applied, each once.
        ("1x1", 16, 1 + 16 + 16 + 4, 1 + 16),
        ("all", 16 + 16, 1 + 16 + 4, 1),
    ],
)
def test_most_of_the_batch_norms_of_a_resnet50_are_folded(
    monkeypatch: pytest.MonkeyPatch,
    into: str,
    absorbed: int,
    applied: int,
    measured: int,
) -> None:
    calls: dict[str, list[dict]] = {}
    for name in ("apply_bn_act", "bn_affine", "batch_moments"):
        calls[name] = spy_on(monkeypatch, name)
    make_network("resnet50").fold_batch_norm(into).train()(make_images())
    assert len(calls["bn_affine"]) == absorbed
    assert len(calls["apply_bn_act"]) == applied
    assert len(calls["batch_moments"]) == 53
    assert sum(options["known"] is None for options in calls["batch_moments"]) == measured


def spy_on(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict]:
    """Keyword arguments of the calls of an operation to come."""
    calls, function = [], getattr(kernels, name)

    def spy(*args, **options):
        calls.append(options)
        return function(*args, **options)

    monkeypatch.setattr(kernels, name, spy)
    return calls


def make_layer(**settings: bool) -> tuple[SwitchableBatchNorm2d, Pyramid]:
    torch.manual_seed(0)
    norm = SwitchableBatchNorm2d(6, 2, "relu")
    for name, value in {"deferred": True, **settings}.items():
        setattr(norm, name, value)
    return norm, Pyramid(torch.randn(40, 6), sizes=((4, 4), (2, 2)), num_images=2)


def test_rows_that_are_asked_for_are_normalised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = make_layer()
    plain = copy.deepcopy(norm)
    plain.deferred = False
    want = plain(x)
    calls = spy_on(monkeypatch, "apply_bn_act")
    y = norm(x)
    assert isinstance(y, DeferredPyramid)
    assert (y.num_channels, y.num_levels, y.level_rows) == (6, 2, (32, 8))
    assert not calls
    for rows in (y.rows, y.with_banks((1, 0)).rows, y.to(torch.float64).rows):
        torch.testing.assert_close(rows.float(), want.rows)
    torch.testing.assert_close(y.level(1), want.level(1))
    assert len(calls) == 1
    assert norm.num_batches_tracked.tolist() == [1, 1]
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(norm.named_buffers())[name], buffer)


def test_a_reader_without_gradients_does_not_take_those_of_others() -> None:
    norm, x = make_layer()
    y = norm(x)
    with torch.no_grad():
        assert not y.rows.requires_grad
        assert "C=6" in repr(y)
    assert y.rows.requires_grad


def test_a_residual_evaluation_and_synced_statistics_are_not_deferred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm, x = make_layer()
    assert type(norm(x, x)) is Pyramid
    assert type(norm.eval()(x)) is Pyramid
    model = create_model("resnet18", RESOLUTIONS, 4).sync_batch_norm().fold_batch_norm("all")
    assert not any(layer.deferred for layer in model.batch_norms())
    assert not any(conv.folded or conv.measured for conv in model.convolutions())
    model.sync_batch_norm(False)
    assert all(layer.deferred for layer in model.batch_norms())
    assert sum(conv.folded for conv in model.convolutions()) == 19
    norm, x = make_layer(synced=True)
    monkeypatch.setattr(kernels, "switchable_bn_act", lambda rows, *_, **__: rows)
    assert type(norm(x)) is Pyramid


def test_a_deferred_norm_may_be_read_twice() -> None:
    """By a convolution that applies it and as a shortcut."""
    torch.manual_seed(0)
    norms = [SwitchableBatchNorm2d(6, 2, "relu").double() for _ in range(2)]
    conv = Conv2d(6, 6, 1).double()
    rows = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for folded in (False, True):
        conv.measured = conv.folded = folded
        for norm in norms:
            norm.deferred = folded
        y = norms[0](Pyramid(rows, sizes=((4, 4), (2, 2)), num_images=2))
        y = norms[1](conv(y), y).rows
        leaves = (rows, *conv.parameters(), *norms[0].parameters(), *norms[1].parameters())
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for ours, want in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, want)


def test_pooling_of_another_shape_gets_normalised_rows() -> None:
    norm, x = make_layer()
    pool = MaxPool2d(2, 2)
    want = pool(Pyramid(norm(x).rows, x.sizes, x.num_images))
    assert torch.equal(pool(norm(x)).rows, want.rows)


@pytest.mark.slow
def test_losses_over_fifty_steps_are_as_near_to_float64_as_those_of_plain_pytorch() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on small tensors several would wait for each other
    try:
        exact, eager, ours = (
            torch.stack([fifty_losses(dtype, into, seed) for seed in range(3)])
            for dtype, into in [
                (torch.float64, "none"),
                (torch.float32, "none"),
                (torch.float32, "all"),
            ]
        )
    finally:
        torch.set_num_threads(threads)
    # Means over steps and seeds, because each error is luck.
    assert (ours - exact).abs().mean() <= 2 * (eager - exact).abs().mean()
    assert (exact[:, -1] < 0.5 * exact[:, 0]).all()


def fifty_losses(dtype: torch.dtype, into: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    model = create_model("resnet18", (32, 24), 4)
    stem = [Conv2d(3, 16, 3), SwitchableBatchNorm2d(16, 2, "relu"), MaxPool2d(3, 2, 1)]
    blocks = [Bottleneck(16, 8, 1, 2), Bottleneck(32, 16, 2, 2), InvertedResidual(64, 64, 1, 2, 2)]
    model.backbone = nn.Sequential(*stem, *blocks)
    model.classifier = nn.Linear(64, 4)
    model.to(dtype).fold_batch_norm(into).train()
    loss = MultiResolutionDistillation(2).to(dtype)
    step = TrainStep(model, loss, build_optimizer(model, loss, lr=1e-3), precision="fp32")
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(8, 3, r, r, generator=generator).to(dtype) for r in (32, 24)]
    batch = Batch(Pyramid.pack(levels), torch.arange(8) % 4, torch.arange(8))
    return torch.stack([step(batch).total for _ in range(50)]).double()


def test_an_unknown_place_to_fold_into_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"into must be one of \('none', 'statistics', '1x1', 'all'\), got '3x3'"
    ):
        create_model("resnet18", RESOLUTIONS, 4).fold_batch_norm("3x3")
