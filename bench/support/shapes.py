"""The shapes that the operations really meet: read off the networks, not written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.timing import ON_GPU
from rsfast import Pyramid, RSNet, create_model
from rsfast.models.layers import Conv2d, SwitchableBatchNorm2d

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "NUM_IMAGES",
    "PAPER_RESOLUTIONS",
    "PASSES",
    "RESOLUTIONS",
    "BatchNormLayer",
    "ConvLayer",
    "batch_norm_layers",
    "conv_layers",
    "pointwise_layers",
    "pooled_map",
    "short_name",
    "walk",
]

ARCHITECTURES = ("resnet50", "resnet18", "mobilenetv2")
PAPER_RESOLUTIONS = (224, 192, 160, 128, 96)
PASSES = ("forward", "forward_backward")
# What operations are timed on: a CPU only shows that everything runs.
NUM_IMAGES, RESOLUTIONS = (256, PAPER_RESOLUTIONS) if ON_GPU else (2, (64, 48, 32))
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float32,)


def short_name(dtype: torch.dtype) -> str:
    """As in the names of rows: bf16, fp16 or fp32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


class BatchNormLayer(NamedTuple):
    """What one or several batch-norm layers of a network work on.

    Attributes:
        sizes: (H, W) of each level.
        channels: C.
        activation: None, "relu" or "relu6".
        residual: whether a shortcut is added.
    """

    sizes: tuple[tuple[int, int], ...]
    channels: int
    activation: str | None
    residual: bool

    def __str__(self) -> str:
        added = "-add" if self.residual else ""
        activated = f"-{self.activation}" if self.activation else ""
        return f"{self.sizes[0][0]}px-C{self.channels}{added}{activated}"

    def level_rows(self, num_images: int) -> tuple[int, ...]:
        """Rows of each level."""
        return tuple(num_images * height * width for height, width in self.sizes)


class ConvLayer(NamedTuple):
    """What one or several k x k convolutions of a network work on.

    Attributes:
        sizes: (H, W) of each level of the input.
        c_in, c_out: channels.
        kernel: k.
        stride: s.
        groups: 1, or c_in for a depthwise one.
    """

    sizes: tuple[tuple[int, int], ...]
    c_in: int
    c_out: int
    kernel: int
    stride: int
    groups: int

    def __str__(self) -> str:
        depthwise = "-depthwise" if self.groups > 1 else ""
        return (
            f"{self.sizes[0][0]}px-C{self.c_in}-C{self.c_out}-"
            f"k{self.kernel}s{self.stride}{depthwise}"
        )

    @property
    def out_sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) of each level of the output."""
        return tuple((-(-h // self.stride), -(-w // self.stride)) for h, w in self.sizes)

    def rows(self, num_images: int) -> tuple[int, int]:
        """Rows of all levels, in and out."""
        return (
            num_images * sum(h * w for h, w in self.sizes),
            num_images * sum(h * w for h, w in self.out_sizes),
        )


def walk(
    arch: str, resolutions: Sequence[int], visit: Callable[[Any, tuple[Pyramid, ...], Any], None]
) -> RSNet:
    """Shows every module of a network, with its inputs and output, to `visit`, for one image.

    Nothing is computed: the network and its tensors are on the meta device.
    """
    with torch.device("meta"):
        model = create_model(arch, resolutions).eval()
        images: list[Tensor] = [torch.empty(1, 3, r, r) for r in resolutions]
    for module in model.modules():
        module.register_forward_hook(visit)
    model(images)
    return model


def batch_norm_layers(
    arch: str, resolutions: Sequence[int] = PAPER_RESOLUTIONS
) -> Counter[BatchNormLayer]:
    """The batch-norm layers of a network, and how many there are of each."""
    found: Counter[BatchNormLayer] = Counter()

    def record(norm: Any, inputs: tuple[Pyramid, ...], _: Any) -> None:
        if not isinstance(norm, SwitchableBatchNorm2d):
            return
        residual = len(inputs) > 1 and inputs[1] is not None
        layer = BatchNormLayer(inputs[0].sizes, norm.num_features, norm.activation, residual)
        found[layer] += 1

    walk(arch, resolutions, record)
    return found


def conv_layers(arch: str, resolutions: Sequence[int] = PAPER_RESOLUTIONS) -> Counter[ConvLayer]:
    """The convolutions of a network that are not 1x1, and how many there are of each.

    That of the images has the channels of the padded ones, 4, on a GPU.
    """
    found: Counter[ConvLayer] = Counter()

    def record(conv: Any, inputs: tuple[Pyramid, ...], _: Any) -> None:
        if isinstance(conv, Conv2d) and conv.kernel_size != (1, 1):
            c_in = 4 if ON_GPU and conv.in_channels == 3 else conv.in_channels
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            shape = c_in, conv.out_channels, kernel, stride, conv.groups
            found[ConvLayer(inputs[0].sizes, *shape)] += 1

    walk(arch, resolutions, record)
    return found


def pointwise_layers(
    arch: str, resolutions: Sequence[int] = PAPER_RESOLUTIONS
) -> Counter[ConvLayer]:
    """The 1x1 convolutions of a network, and how many there are of each.

    One with a stride is one without, of the pixels that it keeps.
    """
    found: Counter[ConvLayer] = Counter()

    def record(conv: Any, _: Any, output: Pyramid) -> None:
        if isinstance(conv, Conv2d) and conv.kernel_size == (1, 1):
            found[ConvLayer(output.sizes, conv.in_channels, conv.out_channels, 1, 1, 1)] += 1

    walk(arch, resolutions, record)
    return found


def pooled_map(arch: str, resolutions: Sequence[int] = PAPER_RESOLUTIONS) -> BatchNormLayer:
    """The feature map before pooling: the smallest and widest one."""
    return min(batch_norm_layers(arch, resolutions), key=lambda norm: (norm.sizes, -norm.channels))
