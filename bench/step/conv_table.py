"""What the vendor library makes of each k x k convolution: `python -m bench.step.conv_table`.

Level by level, and all levels by rsfast's operator, which runs the library on each of them; forward
and the gradients of x ("dgrad") and of the weight ("wgrad") by themselves, but none of images.
Small levels that do not fill the chip are what one implicit matrix product over packed rows could
help. The operator's results are checked before times are taken.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.models import roofline
from bench.support import shapes
from bench.support.record import check_alike
from bench.support.results_file import Results
from bench.support.shapes import ARCHITECTURES, PAPER_ARCHITECTURES, RESOLUTIONS, ConvLayer
from bench.support.timing import DEVICE, time_interleaved
from rsfast import Pyramid
from rsfast.kernels import conv2d
from rsfast.kernels.common.windows import geometry_of

__all__ = ["Line", "level_flops", "main", "make_runs", "markdown"]

_ABOUT = """Convolutions of {batch} images per level, device time, cuDNN choosing among its \
algorithms by trial. Below the resolutions are TFLOP/s of each level, two operations per \
multiply-add; "all" is rsfast's operator over packed rows, "share" that of a large bfloat16 matrix \
product ({rate:.3g} TFLOP/s). Levels "below half" have less than half the rate of the layer's best \
one. "Small levels" is what a step would save if all levels had that rate, "packing" what the \
operator takes beyond its levels (copies, sums of gradients): together the most that one packed \
implicit matrix product could win, and less where the best rate is that of a level in the cache."""


class Line(NamedTuple):
    """One pass of one kind of layer.

    Attributes:
        arch, layer, dtype: names.
        direction: "forward", "dgrad" or "wgrad".
        number: how many such layers the network has.
        flops: of each level.
        level_us: microseconds of each level.
        packed_us: microseconds of all levels by the packed operator.
    """

    arch: str
    layer: str
    dtype: str
    direction: str
    number: int
    flops: Sequence[float]
    level_us: Sequence[float]
    packed_us: float

    @property
    def rates(self) -> list[float]:
        """TFLOP/s of each level, then of the packed operator."""
        flops, times = [*self.flops, sum(self.flops)], [*self.level_us, self.packed_us]
        return [count / us / 1e6 for count, us in zip(flops, times, strict=True)]

    def below_half(self, resolutions: Sequence[int]) -> list[int]:
        """Resolutions whose level has less than half the best level's rate."""
        rates = self.rates[:-1]
        return [r for r, rate in zip(resolutions, rates, strict=True) if rate < max(rates) / 2]

    @property
    def small_levels_us(self) -> float:
        """Microseconds per step saved if every level had the best one's rate."""
        best = max(self.rates[:-1])
        return self.number * (sum(self.level_us) - sum(self.flops) / best / 1e6)

    @property
    def packing_us(self) -> float:
        """Microseconds per step that the packed operator takes beyond its levels."""
        return self.number * (self.packed_us - sum(self.level_us))


def level_flops(layer: ConvLayer, num_images: int) -> list[float]:
    """Twice the multiply-adds of each level, in any of the passes."""
    taps = layer.c_out * layer.c_in // layer.groups * layer.kernel**2
    return [2.0 * num_images * height * width * taps for height, width in layer.out_sizes]


def make_runs(
    layer: ConvLayer, dtype: torch.dtype, direction: str, num_images: int
) -> dict[str, Callable[[], list[Tensor]]]:
    """A callable per level, "0" and up, "all" for the operator, and what it is checked by."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    mask = [direction == "dgrad", direction == "wgrad"]
    geometry = geometry_of(layer.stride, layer.kernel // 2, 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    x_rows, y_rows = layer.rows(num_images)
    x = Pyramid(normal(x_rows, layer.c_in), layer.sizes, num_images)
    dy = Pyramid(normal(y_rows, layer.c_out), layer.out_sizes, num_images)
    weight = normal(layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel)
    weight = (weight / weight[0].numel() ** 0.5).contiguous(memory_format=torch.channels_last)

    def of_level(x: Tensor, dy: Tensor, weight: Tensor) -> list[Tensor]:
        if direction == "forward":
            return [F.conv2d(x, weight, None, *geometry, layer.groups)]
        rest = False, [0, 0], layer.groups, [*mask, False]
        grads = torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, *rest)
        return [grads[mask.index(True)]]

    def packed() -> list[Tensor]:
        if direction == "forward":
            return [conv2d(x.rows, weight, layer.sizes, num_images, **layer.geometry)]
        grads = torch.ops.rsfast.conv2d_bwd(
            dy.rows,
            x.rows,
            weight,
            heights=[height for height, _ in layer.sizes],
            widths=[width for _, width in layer.sizes],
            num_images=num_images,
            **geometry._asdict(),
            groups=layer.groups,
            wants_dx=mask[0],
            wants_dweight=mask[1],
        )
        return [grads[mask.index(True)]]

    def together(dtype: torch.dtype) -> list[Tensor]:
        pairs = zip(x.to(dtype).levels(), dy.to(dtype).levels(), strict=True)
        parts = [of_level(*pair, weight.to(dtype))[0] for pair in pairs]
        if direction == "wgrad":
            return [sum(part.to(torch.promote_types(dtype, torch.float32)) for part in parts)]
        return [torch.cat([part.permute(0, 2, 3, 1).flatten(0, 2) for part in parts])]

    runs = {"exact": lambda: together(torch.float64), "reference": lambda: together(dtype)}
    for index, pair in enumerate(zip(x.levels(), dy.levels(), strict=True)):
        runs[str(index)] = functools.partial(of_level, *pair, weight)
    return {**runs, "all": packed}


def markdown(lines: Sequence[Line], resolutions: Sequence[int], rate: float) -> str:
    """A table of the lines; `rate` is the TFLOP/s that "all" is a share of."""
    heads = ["network", "layer", "type", "pass", "number", *map(str, resolutions), "all", "share"]
    heads += ["below half", "small levels, us/step", "packing, us/step"]
    rows = [heads, ["---"] * len(heads)]
    for line in lines:
        cells = [*map(str, line[:5]), *(f"{value:.3g}" for value in line.rates)]
        slow = ", ".join(map(str, line.below_half(resolutions))) or "none"
        cells += [f"{line.rates[-1] / rate:.1%}", slow]
        rows.append([*cells, f"{line.small_levels_us:.0f}", f"{line.packing_us:.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.step.conv_table", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--archs", nargs="+", choices=ARCHITECTURES, default=PAPER_ARCHITECTURES)
    parser.add_argument("--batch", type=int, default=shapes.NUM_IMAGES, help="images per level")
    parser.add_argument("--rounds", type=int, default=30, help="of each level (30)")
    args = parser.parse_args(argv)
    results = Results(args.output, "conv_table", DEVICE)
    rate = roofline.measure_card(results)[1] / 1e12
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # as a run has it
        lines = [
            _time((arch, layer, number, dtype, direction), args, results, rate)
            for arch in args.archs
            for layer, number in shapes.conv_layers(arch, RESOLUTIONS).items()
            for dtype in shapes.DTYPES
            for direction in ("forward", "dgrad", "wgrad")
            if direction != "dgrad" or layer.sizes[0][0] < RESOLUTIONS[0]  # not of images
        ]
    table = f"{_ABOUT.format(batch=args.batch, rate=rate)}\n\n{markdown(lines, RESOLUTIONS, rate)}"
    results.finish(["bench.step.conv_table", *(sys.argv[1:] if argv is None else argv)], table)
    return 0


def _time(
    case: tuple[str, ConvLayer, int, torch.dtype, str],
    args: argparse.Namespace,
    results: Results,
    rate: float,
) -> Line:
    """Adds rows to the results, and prints where time is lost."""
    arch, layer, number, dtype, direction = case
    runs = make_runs(layer, dtype, direction, args.batch)
    check_alike(runs, ["all"], list)
    del runs["exact"], runs["reference"]
    times = time_interleaved(runs, DEVICE, rounds=args.rounds)
    samples = [[1e6 * second for second in seconds] for seconds in times.values()]
    *level_us, packed_us = map(statistics.median, samples)
    names = arch, str(layer), shapes.short_name(dtype), direction
    line = Line(*names, number, level_flops(layer, args.batch), level_us, packed_us)
    for level, us, tflop_s in zip((*RESOLUTIONS, "all"), samples, line.rates, strict=True):
        row = "/".join(["conv", *names, str(level)])
        results.add(row, us, "us", tflop_s=tflop_s, share_of_matmul=tflop_s / rate)
    slow = line.below_half(RESOLUTIONS) or "none"
    won = f"small levels {line.small_levels_us:.0f}, packing {line.packing_us:.0f}"
    print(f"    below half of the best level: {slow}; us per step to win: {won}", flush=True)
    return line


if __name__ == "__main__":
    raise SystemExit(main())
