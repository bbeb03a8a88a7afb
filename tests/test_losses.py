"""The loss module: alpha, precision under autocast, and its settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate, one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel_helpers import skip_unless_it_runs_on
from loss_helpers import loss_of_each_row
from rsfast import Pyramid
from rsfast.data import Mix
from rsfast.losses import (
    LossTerms,
    MultiResolutionDistillation,
    PixelDistillation,
    _resized_rows,
)


def test_alpha_starts_with_equal_shares_and_equal_logits_cost_six_ln_k() -> None:
    loss = MultiResolutionDistillation(5)
    torch.testing.assert_close(loss.ensemble_weights, torch.full((5,), 0.2))
    total = loss(torch.zeros(5, 2, 1000), torch.tensor([3, 999])).total
    assert total.item() == pytest.approx(6 * math.log(1000))
    assert total.item() == pytest.approx(41.4465, abs=1e-3)


def test_total_is_the_sum_of_the_named_terms() -> None:
    terms = LossTerms(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0))
    assert terms.total == 7.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_is_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 10), torch.tensor([0, 1, 2, 3])
    loss = MultiResolutionDistillation(3)
    exact = loss(logits, labels)
    with torch.autocast("cpu", dtype):
        terms = loss(logits, labels)
    for term, exact_term in zip(terms, exact, strict=True):
        assert term.dtype == torch.float32
        assert torch.equal(term, exact_term)


def test_alpha_is_trained_towards_the_better_resolution() -> None:
    torch.manual_seed(0)
    labels = torch.arange(8) % 4
    good = 4.0 * one_hot(labels, 4).float()
    loss = MultiResolutionDistillation(2)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss(torch.stack([good, torch.randn(8, 4)]), labels).total.backward()
        optimizer.step()
    assert loss.ensemble_weights[0] > 0.7


def test_label_smoothing_reaches_both_cross_entropies() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 10), torch.tensor([0, 1, 2, 3])
    hard = MultiResolutionDistillation(3)(logits, labels)
    soft = MultiResolutionDistillation(3, label_smoothing=0.1)(logits, labels)
    exact = sum(cross_entropy(z, labels, label_smoothing=0.1) for z in logits)
    torch.testing.assert_close(soft.ce, exact)
    assert soft.ensemble != hard.ensemble
    torch.testing.assert_close(soft.distill, hard.distill)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
def test_mixed_labels_reach_both_cross_entropies_of_all_levels(
    smoothing: float, copies: int
) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2 * copies, 4, 10), torch.tensor([0, 1, 2, 3])
    mix = Mix(labels=torch.tensor([3, 1, 9, 0]), share=torch.tensor([0.25, 0.5, 0.0, 1.0]))
    loss = MultiResolutionDistillation(2, label_smoothing=smoothing, copies=copies)
    mixed, plain = loss(logits, labels, mix), loss(logits, labels)
    own, other = (one_hot(classes, 10).float() for classes in (labels, mix.labels))
    target = mix.share[:, None] * own + (1 - mix.share[:, None]) * other  # [N, K]
    exact = [cross_entropy(z, target, label_smoothing=smoothing) for z in logits]
    torch.testing.assert_close(mixed.ce, sum(exact))
    of_all = cross_entropy(logits.mean(0), target, label_smoothing=smoothing)  # shares are equal
    torch.testing.assert_close(mixed.ensemble, of_all)
    assert torch.equal(mixed.distill, plain.distill)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_resolutions": 0}, "num_resolutions must be at least 1"),
        ({"num_resolutions": 3, "mode": "half"}, "mode must be one of"),
    ],
    ids=["no resolution", "mode"],
)
def test_bad_settings_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiResolutionDistillation(**arguments)


def test_maps_are_refused_by_the_loss_of_images_which_names_that_of_pixels() -> None:
    maps = Pyramid.pack([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)])
    with pytest.raises(ValueError, match="a Pyramid of maps, whose loss is PixelDistillation"):
        MultiResolutionDistillation(2)(maps, torch.zeros(2, dtype=torch.int64))  # type: ignore[arg-type]


def test_copies_of_a_resolution_share_its_weight_in_the_ensemble() -> None:
    loss = MultiResolutionDistillation(2, copies=3)
    assert loss.alpha.shape == (6,)
    torch.testing.assert_close(loss.ensemble_weights, torch.tensor([0.5, 0.5]))
    with torch.no_grad():
        loss.alpha.copy_(torch.tensor([1.0, 2.0, 3.0, 0.0, -1.0, 4.0]))
    shares = torch.softmax(loss.alpha, 0)
    expected = torch.stack([shares[:3].sum(), shares[3:].sum()])
    torch.testing.assert_close(loss.ensemble_weights, expected)
    torch.testing.assert_close(torch.softmax(loss.scores, 0), expected)


def test_without_copies_the_scores_are_alpha_to_the_bit() -> None:
    loss = MultiResolutionDistillation(5)
    torch.manual_seed(0)
    with torch.no_grad():
        loss.alpha.normal_(std=3.0)
    assert torch.equal(loss.scores, loss.alpha)


def test_no_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        MultiResolutionDistillation(2, copies=0)


def resized_by_hand(levels: list[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """[L, N * H * W, K] rows, each pixel from the four around its centre in the smaller map."""
    rows = []
    for level in levels:
        _, _, h, w = level.shape
        for image in level:
            for i in range(height):
                for j in range(width):
                    y = max((i + 0.5) * h / height - 0.5, 0.0)
                    x = max((j + 0.5) * w / width - 0.5, 0.0)
                    top, left = int(y), int(x)
                    down, right = min(top + 1, h - 1), min(left + 1, w - 1)
                    dy, dx = y - top, x - left
                    upper = (1 - dx) * image[:, top, left] + dx * image[:, top, right]
                    lower = (1 - dx) * image[:, down, left] + dx * image[:, down, right]
                    rows.append((1 - dy) * upper + dy * lower)
    return torch.stack(rows).unflatten(0, (len(levels), -1))


def make_maps(
    sizes: tuple[tuple[int, int], ...] = ((3, 2), (2, 2), (1, 1)),
    classes: int = 4,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Levels of logits, and labels [2, 9, 7] of which some are 255."""
    torch.manual_seed(0)
    levels = [3 * torch.randn(2, classes, *size, dtype=dtype) for size in sizes]
    labels = torch.randint(0, classes, (2, 9, 7)).to(torch.uint8)
    labels[0, ::4] = 255
    labels[1, :, 0] = 255
    return [level.requires_grad_() for level in levels], labels


@pytest.mark.parametrize("mode", ["full", "largest", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
def test_the_loss_of_pixels_is_that_of_a_loop_over_them(mode: str, smoothing: float) -> None:
    levels, labels = make_maps()
    loss = PixelDistillation(3, mode, smoothing).double()
    with torch.no_grad():
        loss.alpha.copy_(torch.tensor([0.5, 1.0, -1.0]))
    leaves = [*levels, loss.alpha]
    rows = resized_by_hand(levels, 9, 7)
    exact = loss_of_each_row(rows, labels.flatten(), loss.alpha, mode, smoothing, 255)
    ours = loss(levels, labels)
    for value, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-13)
    for value, want in zip(
        torch.autograd.grad(ours.total, leaves),
        torch.autograd.grad(sum(exact), leaves),
        strict=True,
    ):
        torch.testing.assert_close(value, want, rtol=1e-11, atol=1e-13)


def test_the_gradient_of_resizing_is_that_of_finite_differences() -> None:
    levels, _ = make_maps(((3, 2), (5, 4)))
    for size in ((5, 4), (9, 7), (2, 3)):  # the second level's own, larger and smaller
        torch.autograd.gradcheck(lambda *maps, size=size: _resized_rows(maps, size), levels)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [1, 4, 19])
def test_resized_rows_are_pytorchs_interpolation_in_float32(
    classes: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    levels, _ = make_maps(classes=classes, dtype=dtype)
    maps = [level.detach().to(memory_format=layout) for level in levels]
    with torch.autocast("cpu", torch.bfloat16):
        rows = _resized_rows(maps, (9, 7))
    assert rows.dtype == torch.float32
    assert rows.is_contiguous()
    for of_level, level in zip(rows, maps, strict=True):
        exact = interpolate(level.float(), size=(9, 7), mode="bilinear", align_corners=False)
        torch.testing.assert_close(of_level, exact.permute(0, 2, 3, 1).flatten(0, 2))


class LargeTensors(TorchDispatchMode):
    """Keeps what operations return of at least so many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.kept += [tensor for tensor in tensors if tensor.numel() >= self.numbers]
        return result


def test_the_kernels_make_two_tensors_of_all_pixels_resized_logits_and_gradient() -> None:
    skip_unless_it_runs_on("cpu")
    levels, labels = make_maps(classes=19, dtype=torch.float32)
    loss = PixelDistillation(3, backend="triton")
    with LargeTensors(labels.numel() * 19) as large:  # a level of all
        loss(levels, labels).total.backward()
    places = {tensor.untyped_storage().data_ptr() for tensor in large.kept}
    assert len(places) == 2
    assert {t.untyped_storage().nbytes() for t in large.kept} == {3 * labels.numel() * 19 * 4}


def test_a_pyramid_of_logits_gives_the_loss_of_its_levels() -> None:
    levels, labels = make_maps(dtype=torch.float32)
    loss = PixelDistillation(3)
    pyramid = Pyramid.pack(levels)
    exact, ours = loss(levels, labels), loss(pyramid, labels)
    for value, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(value, want)
    for value, want in zip(
        torch.autograd.grad(ours.total, levels),
        torch.autograd.grad(exact.total, levels),
        strict=True,
    ):
        torch.testing.assert_close(value, want)


def test_pixels_of_equal_logits_cost_r_plus_one_times_ln_k_whatever_does_not_count() -> None:
    loss = PixelDistillation(2, ignore_label=7)
    maps = [torch.zeros(1, 11, size, size) for size in (4, 2)]
    labels = torch.arange(16).clamp(max=10).reshape(1, 4, 4)
    assert loss(maps, labels).total.item() == pytest.approx(3 * math.log(11))
    assert loss(maps, torch.full((1, 4, 4), 7)).total.item() == 0.0


def test_the_loss_of_pixels_has_the_weights_of_that_of_images() -> None:
    pixels, images = PixelDistillation(2, copies=2), MultiResolutionDistillation(2, copies=2)
    assert pixels.load_state_dict(images.state_dict()).missing_keys == []
    assert torch.equal(pixels.ensemble_weights, images.ensemble_weights)
    assert isinstance(pixels, MultiResolutionDistillation)
    assert pixels.ignore_label == 255


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [torch.zeros(2, 4, 3, 2)]}, "logits must have 3 levels, got 1"),
        ({"labels": torch.zeros(2, 63).byte()}, r"labels must be \[N, H, W\], got shape \(2, 63\)"),
        ({"labels": torch.zeros(3, 9, 7).byte()}, "level 0 of logits must be .* with N = 3"),
        ({"labels": torch.full((2, 9, 7), 4)}, r"labels must be in \[0, 4\) or ignore_index"),
        ({"logits": torch.zeros(3, 2, 4)}, r"level 0 of logits must be \[N, K, h, w\]"),
        ({"mix": (torch.zeros(2).long(), torch.ones(2))}, "mix must be None"),
    ],
    ids=["levels", "flat labels", "images", "class", "flat logits", "mix"],
)
def test_maps_that_do_not_fit_are_named(change: dict, message: str) -> None:
    levels, labels = make_maps(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        PixelDistillation(3)(**{"logits": levels, "labels": labels, **change})
