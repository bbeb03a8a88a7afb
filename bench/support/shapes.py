"""The shapes that the operations really meet: observed where the networks call them."""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.support.timing import ON_GPU
from rsfast import Pyramid, RSNet, create_model, kernels

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "NUM_IMAGES",
    "PAPER_ARCHITECTURES",
    "PAPER_RESOLUTIONS",
    "PASSES",
    "RESOLUTIONS",
    "StridedMap",
    "BatchNormLayer",
    "Call",
    "ConvLayer",
    "FeatureMap",
    "QuantisedMap",
    "batch_norm_layers",
    "batch_norm_of",
    "calls",
    "conv_layers",
    "hollow",
    "observe",
    "pooled_map",
    "quantised_maps",
    "short_name",
    "strided_maps",
]

PAPER_ARCHITECTURES = ("resnet50", "resnet18", "mobilenetv2")
ARCHITECTURES = (*PAPER_ARCHITECTURES, "resnext50_32x4d")
PAPER_RESOLUTIONS = (224, 192, 160, 128, 96)
PASSES = ("forward", "forward_backward")
# What operations are timed on: a CPU only shows that everything runs.
NUM_IMAGES, RESOLUTIONS = (256, PAPER_RESOLUTIONS) if ON_GPU else (2, (64, 48, 32))
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float32,)

Sizes = tuple[tuple[int, int], ...]
_OBSERVED = (
    *("switchable_bn_act", "bn_act_max_pool", "conv2d", "global_avg_pool", "subsample"),
    "lq_activation",
)


def short_name(dtype: torch.dtype) -> str:
    """As in the names of rows: bf16, fp16 or fp32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


class FeatureMap(NamedTuple):
    """Maps of all levels.

    Attributes:
        sizes: (H, W) of each level.
        channels: C.
    """

    sizes: Sizes
    channels: int

    def level_rows(self, num_images: int) -> tuple[int, ...]:
        """Rows of each level."""
        return tuple(num_images * height * width for height, width in self.sizes)


class BatchNormLayer(NamedTuple):
    """What one or several batch-norm layers of a network work on.

    Attributes:
        sizes: (H, W) of each level.
        channels: C.
        activation: None, "relu" or "relu6".
        residual: whether a shortcut is added.
        pooled: whether 3x3 max pooling comes last; `bn_act_max_pool` computes these.
    """

    sizes: Sizes
    channels: int
    activation: str | None
    residual: bool
    pooled: bool = False

    def __str__(self) -> str:
        added = "-add" if self.residual else ""
        activated = f"-{self.activation}" if self.activation else ""
        return f"{self.sizes[0][0]}px-C{self.channels}{added}{activated}"

    def level_rows(self, num_images: int) -> tuple[int, ...]:
        """Rows of each level."""
        return FeatureMap(self.sizes, self.channels).level_rows(num_images)


class ConvLayer(NamedTuple):
    """What one or several k x k convolutions of a network work on.

    Attributes:
        sizes: (H, W) of each level of the input.
        c_in, c_out: channels.
        kernel: k; k // 2 zeros are at every side.
        stride: s.
        groups: 1, c_in for a depthwise one, or in between.
    """

    sizes: Sizes
    c_in: int
    c_out: int
    kernel: int
    stride: int
    groups: int

    def __str__(self) -> str:
        groups = "-depthwise" if self.groups == self.c_in else f"-g{self.groups}"
        return (
            f"{self.sizes[0][0]}px-C{self.c_in}-C{self.c_out}-"
            f"k{self.kernel}s{self.stride}{groups if self.groups > 1 else ''}"
        )

    @property
    def geometry(self) -> dict[str, int]:
        """Keyword arguments of `conv2d`, rsfast's and PyTorch's."""
        return {"stride": self.stride, "padding": self.kernel // 2, "groups": self.groups}

    @property
    def out_sizes(self) -> Sizes:
        """(H, W) of each level of the output."""
        return kernels.conv2d_sizes(self.sizes, self.kernel, self.stride, self.kernel // 2)

    def rows(self, num_images: int) -> tuple[int, int]:
        """Rows of all levels, in and out."""
        return (
            num_images * sum(h * w for h, w in self.sizes),
            num_images * sum(h * w for h, w in self.out_sizes),
        )


class StridedMap(NamedTuple):
    """What one or several strided 1x1 convolutions of a network read.

    Attributes:
        sizes: (H, W) of each level.
        channels: C.
        stride: down and to the right.
    """

    sizes: Sizes
    channels: int
    stride: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.sizes[0][0]}px-C{self.channels}-s{self.stride[0]}"


class QuantisedMap(NamedTuple):
    """What one or several quantisers of activations work on.

    Attributes:
        sizes: (H, W) of each level.
        channels: C.
    """

    sizes: Sizes
    channels: int

    def __str__(self) -> str:
        return f"{self.sizes[0][0]}px-C{self.channels}"


class Call(NamedTuple):
    """A call of an operation by a network.

    Attributes:
        op: its name in `rsfast.kernels`.
        arguments: by name.
        layer: of the network whose weight is among them; "" if it is no layer's own.
    """

    op: str
    arguments: dict[str, Any]
    layer: str


@functools.cache
def hollow(arch: str, resolutions: tuple[int, ...]) -> RSNet:
    """A network on the meta device, which computes nothing, on the backend of a GPU.

    Whoever asks gets the same one.
    """
    with torch.device("meta"):
        return create_model(arch, resolutions, backend="triton").eval()


def observe(model: RSNet, channels: int = 3) -> list[Call]:
    """The operations that a hollow network calls for one image of each resolution, in order.

    Args:
        model: of :func:`hollow`.
        channels: of the images, zeros behind the colours included.
    """
    found: list[Call] = []
    names = {
        id(m.weight): name for name, m in model.network.named_modules() if hasattr(m, "weight")
    }

    def observed(op: str) -> Any:
        function = getattr(kernels, op)

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = inspect.signature(function).bind(*args, **kwargs).arguments
            found.append(Call(op, arguments, names.get(id(arguments.get("weight")), "")))
            return function(*args, **kwargs)

        return mock.patch.object(kernels, op, call)

    rows = torch.empty(sum(r * r for r in model.resolutions), channels, device="meta")
    images = Pyramid(rows, [(r, r) for r in model.resolutions], 1)
    with ExitStack() as patches, torch.no_grad():
        for op in _OBSERVED:
            patches.enter_context(observed(op))
        model(images)
    return found


@functools.cache
def calls(arch: str, resolutions: tuple[int, ...], channels: int = 3) -> tuple[Call, ...]:
    """As :func:`observe`, of a network by its name."""
    return tuple(observe(hollow(arch, resolutions), channels))


def batch_norm_layers(
    arch: str, resolutions: Sequence[int] = PAPER_RESOLUTIONS
) -> Counter[BatchNormLayer]:
    """The batch-norm layers of a network, and how many there are of each."""
    found = (batch_norm_of(call) for call in calls(arch, tuple(resolutions)))
    return Counter(layer for layer in found if layer is not None)


def batch_norm_of(call: Call) -> BatchNormLayer | None:
    """What a call normalises; None if it is not one of batch norm."""
    x, activation = (call.arguments.get(name) for name in ("x", "activation"))
    if call.op == "bn_act_max_pool":
        return BatchNormLayer(call.arguments["sizes"], x.shape[1], activation, False, pooled=True)
    if call.op != "switchable_bn_act":
        return None
    residual = call.arguments["residual"] is not None
    return BatchNormLayer(_sizes(call.arguments["level_rows"]), x.shape[1], activation, residual)


def _sizes(level_rows: Sequence[int]) -> Sizes:
    """Of the maps of one image: they are square, like the images."""
    sides = [math.isqrt(rows) for rows in level_rows]
    assert [side * side for side in sides] == list(level_rows)
    return tuple((side, side) for side in sides)


def conv_layers(arch: str, resolutions: Sequence[int] = PAPER_RESOLUTIONS) -> Counter[ConvLayer]:
    """The convolutions of a network that are not 1x1, and how many there are of each.

    That of the images has the channels of the padded ones, 4, on a GPU.
    """
    found: Counter[ConvLayer] = Counter()
    for call in calls(arch, tuple(resolutions), 4 if ON_GPU else 3):
        if call.op == "conv2d":
            given = call.arguments
            c_out, _, kernel, _ = given["weight"].shape
            shape = given["x"].shape[1], c_out, kernel, given["stride"][0], given["groups"]
            assert given["padding"] == (kernel // 2, kernel // 2)
            found[ConvLayer(given["sizes"], *shape)] += 1
    return found


def strided_maps(arch: str, resolutions: Sequence[int] = PAPER_RESOLUTIONS) -> Counter[StridedMap]:
    """What the strided 1x1 convolutions of a network read, and how many there are of each."""
    found = (c.arguments for c in calls(arch, tuple(resolutions)) if c.op == "subsample")
    return Counter(StridedMap(c["sizes"], c["x"].shape[1], c["stride"]) for c in found)


def pooled_map(arch: str, resolutions: Sequence[int] = PAPER_RESOLUTIONS) -> FeatureMap:
    """The map that global average pooling reads."""
    (given,) = (c.arguments for c in calls(arch, tuple(resolutions)) if c.op == "global_avg_pool")
    return FeatureMap(_sizes(given["level_rows"]), given["x"].shape[1])


def quantised_maps(
    arch: str, resolutions: Sequence[int] = PAPER_RESOLUTIONS
) -> Counter[QuantisedMap]:
    """The maps that a network with activations of 2 bits quantises, and how many of each."""
    with torch.device("meta"):
        model = create_model(arch, resolutions, activation_bits=2, backend="triton").eval()
    found = (c.arguments for c in observe(model) if c.op == "lq_activation")
    return Counter(QuantisedMap(_sizes(c["level_rows"]), c["x"].shape[1]) for c in found)
