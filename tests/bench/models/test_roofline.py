"""Floors of a step, computed from the networks."""

from __future__ import annotations

import pytest

from bench.models import roofline
from bench.support.shapes import PAPER_RESOLUTIONS


def test_the_floors_are_those_of_the_papers_multiply_adds() -> None:
    floors = roofline.step_floors("resnet50", PAPER_RESOLUTIONS)
    assert floors.flops / 6e9 == pytest.approx(11.27, abs=0.01)
    # Batch norm alone moves 8 passes over 30.6 million elements in 16 bits, and its residuals;
    # 6.125 over the 2.2 million of the stem, its pooling included.
    assert floors.bytes_16_bit > 2 * (8 * (30.6e6 - 2.2e6) + 6.125 * 2.2e6)


def test_bytes_are_those_of_convolutions_and_batch_norm() -> None:
    # Of one image at 32 pixels: (pixels, channels in, pixels, channels out) of each convolution.
    convs = [(32**2, 3, 16**2, 64), *4 * [(8**2, 64, 8**2, 64)]]
    for side, c in ((4, 128), (2, 256), (1, 512)):
        convs += 2 * [((2 * side) ** 2, c // 2, side**2, c)] + 3 * [(side**2, c, side**2, c)]
    elements = sum(3 * (before * c_in + behind * c_out) for before, c_in, behind, c_out in convs)
    elements += 6.125 * 16**2 * 64  # the stem
    elements += (2 * 8 + 2 * 10) * 8**2 * 64
    elements += sum((3 * 8 + 2 * 10) * side**2 * c for side, c in ((4, 128), (2, 256), (1, 512)))
    assert roofline.step_floors("resnet18", (32,)).bytes_16_bit == 2 * elements
