"""Normalising pixels: the reference against the formula, the kernel against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_helpers import CPU_OR_GPU, PLACES, max_error
from rsfast.kernels import normalize
from sampling import pairwise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_pixels(rows: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, 3), generator=generator, dtype=torch.uint8).to(device)


def test_matches_the_formula_and_pads_with_zeros() -> None:
    pixels = make_pixels(50)
    y = normalize(pixels, MEAN, STD, dtype=torch.float64, channels=5)
    mean, std = torch.tensor(MEAN).double(), torch.tensor(STD).double()
    torch.testing.assert_close(y[:, :3], (pixels / 255 - mean) / std, rtol=1e-6, atol=1e-6)
    assert not y[:, 3:].any()


@pairwise({"rows": [1, 31, 1300], "channels": [3, 4, 7, 8], "place": PLACES}, indirect=["place"])
def test_the_kernel_is_as_good_as_pytorch(
    rows: int, channels: int, place: tuple[str, torch.dtype]
) -> None:
    device, dtype = place
    pixels, options = make_pixels(rows, device), {"channels": channels}
    exact = normalize(pixels, MEAN, STD, dtype=torch.float64, **options)
    eager = normalize(pixels, MEAN, STD, dtype=dtype, **options)
    ours = normalize(pixels, MEAN, STD, dtype=dtype, backend="triton", **options)
    assert ours.dtype == dtype
    assert ours.shape == (rows, channels)
    assert max_error(ours, exact) <= 2 * max_error(eager, exact) + 3 * torch.finfo(dtype).eps
    assert not ours[:, 3:].any()


@pytest.mark.parametrize("device", CPU_OR_GPU, indirect=True)
def test_operator_passes_opcheck(device: str) -> None:
    arguments = (make_pixels(5, device), MEAN, STD, torch.float16, 4)
    torch.library.opcheck(torch.ops.rsfast.normalize.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3)}, "x must be contiguous uint8"),
        ({"x": torch.zeros(4, 4, dtype=torch.uint8)}, "x must be contiguous uint8"),
        ({"x": torch.zeros(3, 4, dtype=torch.uint8).t()}, "x must be contiguous uint8"),
        ({"x": torch.zeros(0, 3, dtype=torch.uint8)}, "x must have at least one row"),
        ({"mean": (0.5,)}, "mean must be 3 numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be 3 numbers"),
        ({"channels": 2}, "channels must be at least 3"),
        ({"dtype": torch.float64}, "dtype must be float16"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": make_pixels(4), "mean": MEAN, "std": STD, "backend": "triton"}
    with pytest.raises(ValueError, match=message):
        normalize(**{**arguments, **change})
