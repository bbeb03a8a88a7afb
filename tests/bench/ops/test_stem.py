"""Other forms of the stem compute the same; their times mean nothing here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.models import traffic
from bench.ops import __main__ as command
from bench.ops import bench_bn_act_max_pool as max_pool
from bench.ops import bench_stem as stem
from bench.support.record import as_packed, check_alike
from bench.support.results_file import Results
from bench.support.shapes import DTYPES, BatchNormLayer, ConvLayer
from bench.support.timing import DEVICE

LAYER = ConvLayer(((16, 12), (8, 8), (2, 2)), 3, 5, 7, 2, 1)


@pytest.mark.parametrize("size", [(16, 12), (2, 2), (8, 30)], ids=str)
def test_regrouped_images_and_weight_give_the_same_output_and_gradient(
    size: tuple[int, int],
) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    images = torch.randn(2, 4, *size, **options).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(5, 4, 7, 7, **options).requires_grad_()
    blocks = stem.regroup_images(images)
    assert blocks.shape == (2, 16, size[0] // 2 + 3, size[1] // 2 + 3)
    assert blocks.is_contiguous(memory_format=torch.channels_last)
    taps = stem.regroup_weight(weight)
    assert taps.shape == (5, 16, 4, 4)
    found, want = F.conv2d(blocks, taps), F.conv2d(images, weight, stride=2, padding=3)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    dy = torch.randn(want.shape, **options)
    (found_grad,), (want_grad,) = (torch.autograd.grad(y, weight, dy) for y in (found, want))
    torch.testing.assert_close(found_grad, want_grad, rtol=1e-12, atol=1e-12)


def test_every_tap_and_pixel_is_there_once() -> None:
    weight = torch.arange(1.0, 1 + 2 * 3 * 49).view(2, 3, 7, 7)
    taps = stem.regroup_weight(weight)
    assert torch.equal(taps[taps != 0].sort().values, weight.flatten())
    images = torch.arange(1.0, 1 + 3 * 4 * 6).view(1, 3, 4, 6)
    blocks = stem.regroup_images(images)
    assert torch.equal(blocks[blocks != 0].sort().values, images.flatten())
    # Block (0, 1), second row, first column, third channel.
    assert blocks[0, 3 * 2 + 2, 2, 3] == images[0, 2, 1, 2]


def test_what_cannot_be_regrouped_is_named() -> None:
    with pytest.raises(ValueError, match="even sizes to be regrouped, got 8 x 7"):
        stem.regroup_images(torch.zeros(1, 3, 8, 7))
    with pytest.raises(ValueError, match=r"weight must be \[C_out, C, 7, 7\], got \(5, 3, 3, 3\)"):
        stem.regroup_weight(torch.zeros(5, 3, 3, 3))


@pytest.mark.parametrize("direction", stem.PASSES)
def test_all_ways_of_feeding_the_stem_are_alike(direction: str) -> None:
    runs = stem.make_runs(LAYER, DTYPES[0], direction, num_images=2)
    names = [name for name in stem.IMPLEMENTATIONS if name in runs]
    assert set(stem.IMPLEMENTATIONS) - set(names) <= {"space_to_depth_here"}
    check_alike(runs, names, as_packed)
    shapes = [tuple(tensor.shape) for tensor in as_packed(runs["space_to_depth"]())]
    assert shapes == [(2 * (8 * 6 + 4 * 4 + 1), 5) if direction == "forward" else (5, 3, 7, 7)]


def test_the_stem_is_that_of_a_resnet() -> None:
    assert stem.STEM[1:] == (3, 64, 7, 2, 1)
    assert max_pool.STEM.sizes == stem.STEM.out_sizes
    assert max_pool.STEM[1:] == (64, "relu", False, True)


def test_bytes_of_pooling_in_one_pass() -> None:
    layer = max_pool.STEM
    elements = layer.channels * sum(layer.level_rows(max_pool.NUM_IMAGES))
    forward = max_pool.moved_bytes(layer, torch.bfloat16, "forward")
    assert forward == pytest.approx(4.75 * elements)  # 2 of them for the statistics
    both = max_pool.moved_bytes(layer, torch.bfloat16, "forward_backward")
    assert both - forward == pytest.approx(7.5 * elements)
    passes = traffic.passes(layer)
    assert [2 * number for number in passes] == [4.75, 7.5]


@pytest.mark.parametrize("direction", max_pool.PASSES)
def test_all_ways_to_pool_are_alike(direction: str) -> None:
    layer = BatchNormLayer(((6, 4), (3, 5), (1, 1)), 5, "relu", False, pooled=True)
    runs = max_pool.make_runs(layer, DTYPES[0], direction)
    check_alike(runs, max_pool.IMPLEMENTATIONS, list)
    y, *grads = runs["separate"]()
    assert y.shape == (max_pool.NUM_IMAGES * (3 * 2 + 2 * 3 + 1), 5)
    assert len(grads) == (0 if direction == "forward" else 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes with the shapes of a GPU")
def test_the_command_times_the_stem_and_its_pooling(tmp_path: Path) -> None:
    results = Results(tmp_path, "ops", DEVICE)
    command.Session(2, results, without=["C8"]).stem()
    names = {row["name"] for row in results.rows}
    assert "kernel/stem/64px-C3-C64-k7s2/fp32/forward/space_to_depth_here" in names
    assert "kernel/stem/64px-C3-C64-k7s2/fp32/wgrad/C4" in names
    assert "kernel/bn_act_max_pool/32px-C64-relu/fp32/forward_backward/separate" in names
    assert not any(name.endswith("C8") for name in names)
