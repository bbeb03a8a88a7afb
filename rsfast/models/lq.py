"""Learned quantisers of weights and activations (LQ-Nets), and the convolution that has them.

Both kinds keep a basis of K numbers and compute with its 2^K sums; see
:mod:`rsfast.kernels.common.basis` for levels, codes, refit and moving average. A training forward
moves the basis once for each level of the pyramid that passes, in the levels' order, and quantises
all of them with the basis that it found: so one launch serves them all, and weights that all levels
share are one tensor. Evaluation moves nothing. Gradients pass straight through; those of
activations above the top level are zero.

Codes and bases are shared by all resolutions: only batch norm is private.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast import kernels
from rsfast.kernels.common.basis import (
    check_bits,
    move_basis,
    quantise,
    quantise_and_sum,
    refit,
    sorted_levels,
)
from rsfast.pyramid import Pyramid
from rsfast.pyramid.content import Content
from rsfast.pyramid.pixelwise import autocast_dtype

__all__ = ["Bits", "FULL_PRECISION", "LQActivation", "LQConv2d", "LQWeight", "check_state"]

FULL_PRECISION = 32
_NORMAL_QUARTILE = 0.6745  # of a standard normal: where the initial basis puts its middle
_WEIGHT_DAMPING = 1e-4


class Bits(NamedTuple):
    """Of a quantised network."""

    weight: int
    """1 to 4."""
    activation: int
    """1 to 4, or 32 for activations that are not quantised."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantised: Tensor) -> Tensor:
        return quantised.view_as(quantised)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class LQWeight(nn.Module):
    """Quantises the weight of a convolution, with a basis for each output channel.

    Args:
        out_channels: C_out.
        kernel_size: k, or (k_h, k_w).
        bits: K, 1 to 4.

    Attributes:
        basis: [K, C_out], digits -1 and 1.
        updates: [] int64, refits taken into the moving average.

    Raises:
        ValueError: if the bits are out of range.
    """

    basis: Tensor
    updates: Tensor
    moved_by_forward = ("basis", "updates")

    def __init__(self, out_channels: int, kernel_size: int | tuple[int, int], bits: int) -> None:
        super().__init__()
        self.bits = check_bits("bits of weights", bits)
        height, width = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
        # Half of the deviation that weights are drawn with (Kaiming, fan out).
        base = _NORMAL_QUARTILE * (2.0 / (height * width * out_channels)) ** 0.5 / 2 ** (bits - 1)
        scale = torch.tensor([base * 2**j for j in range(bits)])
        self.register_buffer("basis", scale[:, None].repeat(1, out_channels))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, weight: Tensor, num_levels: int = 1) -> Tensor:
        """The weight on its levels.

        Args:
            weight: [C_out, C_in, k_h, k_w], floating point.
            num_levels: of the pyramid that it meets: how often a training forward moves the basis,
                each time towards the same refit; 0 to leave it where it is.

        Returns:
            [C_out, C_in, k_h, k_w], of the weight's dtype; its gradient is the weight's.

        Raises:
            ValueError: if the weight has another number of dimensions, or the basis is not of it.
        """
        if weight.dim() != 4:
            raise ValueError(
                f"weight must be [C_out, C_in, k_h, k_w], got shape {tuple(weight.shape)}"
            )
        if self.basis.shape != (self.bits, len(weight)):
            raise ValueError(
                f"basis must be [{self.bits}, {len(weight)}]: bits and output channels of a weight "
                f"of {tuple(weight.shape)}, got shape {tuple(self.basis.shape)}"
            )
        with torch.no_grad():
            levels, digits = sorted_levels(self.basis, signed=True)
            moves = self.training and num_levels > 0
            quantised, by_code = quantise_and_sum(weight, levels, summed=moves)
            if by_code is not None:
                target = refit(self.basis, digits, by_code, _WEIGHT_DAMPING)
                move_basis(self.basis, self.updates, target, num_levels)
        return _StraightThrough.apply(weight, quantised)

    def extra_repr(self) -> str:
        return f"{self.basis.shape[1]}, bits={self.bits}"


class LQActivation(nn.Module):
    """Quantises activations, which should not be negative, with one basis for all channels.

    Args:
        bits: K, 1 to 4.

    Attributes:
        basis: [K], digits 0 and 1.
        updates: [] int64, refits taken into the moving average.
        largest_only: whether the first level alone moves the basis.
        synced: whether the basis is fitted to the values of all ranks, so that they have one.

    Raises:
        ValueError: if the bits are out of range.
    """

    basis: Tensor
    updates: Tensor
    moved_by_forward = ("basis", "updates")

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits("bits of activations", bits)
        self.largest_only = False
        self.synced = True
        base = _NORMAL_QUARTILE * 2.0 / (2**bits - 1)
        self.register_buffer("basis", torch.tensor([base * 2**j for j in range(bits)]))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Any) -> Any:
        """The activations on their levels.

        Args:
            x: a Pyramid, or a tensor of any shape, which is one level.

        Returns:
            Like `x`.

        Raises:
            ValueError: if the basis has another number of bits.
        """
        if self.basis.shape != (self.bits,):
            raise ValueError(
                f"basis must be [{self.bits}], one number per bit, got {tuple(self.basis.shape)}"
            )
        num_levels = x.num_levels if isinstance(x, Pyramid) else 1
        state = self.basis, self.updates
        options: dict[str, Any] = {"moving": 0, "synced": self.synced}
        if self.training:
            options["moving"] = 1 if self.largest_only else num_levels
        if not isinstance(x, Pyramid):
            return kernels.lq_activation_levels([x], *state, **options)[0]
        if x.is_packed:
            options["backend"] = x.backend
            return x.with_rows(kernels.lq_activation(x.rows, *state, x.level_rows, **options))
        return x.like(Content(parts=kernels.lq_activation_levels(x.parts, *state, **options)))

    def as_plain_module(self) -> nn.Module:
        """Without state that moves, of plain torch operations, for one resolution."""
        return _FixedLevels(sorted_levels(self.basis, signed=False)[0])

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class _FixedLevels(nn.Module):
    """The level of each value."""

    levels: Tensor

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)

    def forward(self, x: Tensor) -> Tensor:
        return quantise(x, self.levels).to(x.dtype)


class LQConv2d(nn.Conv2d):
    """A convolution without bias whose weight is quantised.

    Where the weight is frozen, its basis is, too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: of `nn.Conv2d`.
        bits: of the weight.

    Attributes:
        quantizer: its LQWeight.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        bits: int,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.quantizer = LQWeight(out_channels, kernel_size, bits)

    def forward(self, x: Any) -> Any:
        """Images, a Pyramid or a tensor [N, C, H, W]."""
        num_levels = x.num_levels if isinstance(x, Pyramid) else 1
        weight = self.quantizer(self.weight, num_levels if self.weight.requires_grad else 0)
        # Once for all levels: autocast keeps the casts of parameters only.
        weight = weight.to(autocast_dtype(x))
        return F.conv2d(x, weight, None, self.stride, self.padding)

    @torch.no_grad()
    def as_plain_module(self) -> nn.Conv2d:
        """The ordinary convolution that it is in evaluation."""
        shape = self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding
        conv = nn.Conv2d(*shape, bias=False, device="meta")  # type: ignore[arg-type]
        levels, _ = sorted_levels(self.quantizer.basis, signed=True)
        weight = quantise(self.weight, levels[:, :, None, None, None]).to(self.weight.dtype)
        conv.weight = nn.Parameter(weight, self.weight.requires_grad)
        return conv.train(self.training)


def check_state(network: nn.Module, state: Mapping[str, Any], prefix: str = "") -> None:
    """Refuses weights of another number of bits than a network's.

    Args:
        network: that is to load them, quantised or not.
        state: a state dict.
        prefix: of the network's names in it.

    Raises:
        ValueError: saying which bits each has.
    """
    own = set(_bases(network.state_dict(prefix=prefix)))
    odd = next((name for name in _bases(state) if name not in own), None)
    for name, module in network.named_modules():
        if not isinstance(module, LQWeight | LQActivation):
            continue
        kind = "weights" if isinstance(module, LQWeight) else "activations"
        found = state.get(f"{prefix}{name}.basis")
        if found is None and odd is not None:
            raise ValueError(
                f"a network with {kind} of {module.bits} bits cannot take the state of one with "
                f"other bits, which has {odd} and no {prefix}{name}.basis: make it with the bits "
                f"of that one (--weight-bits, --activation-bits)"
            )
        if found is None:
            raise ValueError(
                f"a network with {kind} of {module.bits} bits cannot take the state of one that "
                f"has them in full precision: it has no {prefix}{name}.basis"
            )
        if found.dim() == module.basis.dim() and len(found) != module.bits:
            raise ValueError(
                f"a network with {kind} of {module.bits} bits cannot take the state of one with "
                f"{len(found)} bits ({prefix}{name}.basis)"
            )
        if found.shape != module.basis.shape:
            raise ValueError(
                f"{prefix}{name}.basis must be {list(module.basis.shape)}, "
                f"got shape {list(found.shape)}"
            )
    if odd is not None:
        raise ValueError(
            f"a network without {odd} cannot take the state of a quantised one: it has other bits, "
            f"or is in full precision"
        )


def _bases(state: Mapping[str, Any]) -> Iterator[str]:
    """Of quantisers: other modules may have something of that name."""
    paths = (name.removesuffix(".basis") for name in state if name.endswith(".basis"))
    return (f"{path}.basis" for path in paths if f"{path}.updates" in state)
