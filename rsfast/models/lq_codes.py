"""Weights of quantised convolutions as codes, several to a byte, and back.

A code is the digits of its weight, not its place among the sorted levels: bit j is 1 where the
weight has +basis[j] and 0 where it has -basis[j]. So a weight is a sum of K signed numbers, which
needs no sorted list, and codes are what bitwise kernels take; it does not matter how a basis is
ordered, which signs it has, or whether two of its sums are the same.

    field:  1, 2, 4, 4 bits wide for K = 1, 2, 3, 4: 8, 4, 2, 2 codes in a byte, the first in the
            lowest bits; a bit that no code uses is 0
    row:    the codes of an output channel, [C_in, k_h, k_w] in row-major order, up to a whole
            byte: a channel has its own basis, and can be read alone
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsfast.kernels.common.basis import quantise, sorted_levels, thresholds_of
from rsfast.models.lq import LQConv2d, check_state

__all__ = ["LAYOUT", "codes_shape", "packed_state", "unpacked_state"]

LAYOUT = 1  # raise it when what is above changes
_FIELD = {1: 1, 2: 2, 3: 4, 4: 4}
_BYTE = 8


@torch.no_grad()
def packed_state(network: nn.Module) -> dict[str, Tensor]:
    """A state dict that has codes, [C_out, bytes] uint8, in the place of quantised weights.

    Args:
        network: of float32, on any device; the codes are on the CPU.

    Returns:
        "X.codes" for "X.weight" of every quantised convolution X, and all else as it is.

    Raises:
        ValueError: if no convolution is quantised, or a tensor cannot be packed, which is named.
    """
    convolutions = dict(_convolutions(network))
    if not convolutions:
        raise ValueError(
            "a network in full precision has no codes to be packed: model_best.safetensors holds "
            "it, and --packed is for quantised ones"
        )
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        layer, _, field = name.rpartition(".")
        if layer in convolutions and field == "weight":
            state[f"{layer}.codes"] = _pack(layer, convolutions[layer])
        else:
            state[name] = tensor
    return state


def unpacked_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict for a network, whose quantised weights are then the levels themselves.

    A level that rounding has made equal to the threshold below it, as happens where two levels are
    neighbouring numbers, comes back as the next number: the one that is quantised to it.

    Args:
        network: that the state is for.
        state: of :func:`packed_state`, on the CPU.

    Raises:
        ValueError: naming the tensor that is missing, or not of that network.
    """
    check_state(network, state)
    found = dict(state)
    for name, conv in _convolutions(network):
        codes = found.pop(f"{name}.codes", None)
        if codes is None:
            raise ValueError(f"a packed network must have {name}.codes")
        basis = found[f"{name}.quantizer.basis"].float()
        shape = tuple(conv.weight.shape)
        numbers = _unpack(name, codes, len(basis), shape)
        found[f"{name}.weight"] = _weights(numbers, basis).view(shape)
    return found


def codes_shape(shape: Sequence[int], bits: int) -> tuple[int, int]:
    """[C_out, bytes] of the codes of a weight [C_out, C_in, k_h, k_w]."""
    return shape[0], -(-math.prod(shape[1:]) * _FIELD[bits] // _BYTE)


def _convolutions(network: nn.Module) -> Iterator[tuple[str, LQConv2d]]:
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, LQConv2d):
            yield name, module


def _pack(name: str, conv: LQConv2d) -> Tensor:
    """[C_out, bytes]."""
    weight, basis = conv.weight.detach().cpu().flatten(1), conv.quantizer.basis.cpu()
    for field, tensor in ((f"{name}.weight", weight), (f"{name}.quantizer.basis", basis)):
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"a network must be of float32 to be packed, got {field} of {tensor.dtype}: "
                f"call its float() first"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{field} holds values that are not finite, which have no code")
    levels, digits = sorted_levels(basis, signed=True)
    place = sum((weight > t[:, None]).long() for t in thresholds_of(levels))
    assert isinstance(place, Tensor)  # [C_out, n]
    ones = sum((digits[:, j] > 0).long() << j for j in range(conv.quantizer.bits))
    assert isinstance(ones, Tensor)  # [2^K, C_out]
    return _into_bytes(ones.gather(0, place.t()).t(), conv.quantizer.bits)


def _into_bytes(numbers: Tensor, bits: int) -> Tensor:
    """[C_out, n] int64 -> [C_out, bytes] uint8."""
    width = _FIELD[bits]
    per_byte = _BYTE // width
    padded = F.pad(numbers, (0, -numbers.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    return (padded << width * torch.arange(per_byte)).sum(2).to(torch.uint8)


def _unpack(name: str, codes: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """[C_out, n] int64, of the codes of a weight of that shape."""
    width = _FIELD[bits]
    per_byte = _BYTE // width
    wanted = codes_shape(shape, bits)
    if codes.dtype != torch.uint8 or tuple(codes.shape) != wanted:
        raise ValueError(
            f"{name}.codes must be uint8 {list(wanted)}, of {bits} bits of {list(shape)} weights, "
            f"got {str(codes.dtype).removeprefix('torch.')} {list(codes.shape)}"
        )
    fields = codes.long()[:, :, None] >> width * torch.arange(per_byte)
    numbers = (fields & 2**bits - 1).flatten(1)[:, : math.prod(shape[1:])]
    if not torch.equal(_into_bytes(numbers, bits), codes):
        raise ValueError(f"{name}.codes must have 0 in the bits that no code uses")
    return numbers


def _weights(numbers: Tensor, basis: Tensor) -> Tensor:
    """[C_out, n], of digits and bases: what is quantised to the level of each."""
    total: Tensor | None = None
    for j, row in enumerate(basis):  # in the order of `sorted_levels`, for the same rounding
        part = torch.where(numbers >> j & 1 == 1, row[:, None], -row[:, None])
        total = part if total is None else total + part
    assert total is not None
    levels, _ = sorted_levels(basis, signed=True)
    same = quantise(total, levels[:, :, None]) == total
    return torch.where(same, total, torch.nextafter(total, torch.tensor(torch.inf)))
