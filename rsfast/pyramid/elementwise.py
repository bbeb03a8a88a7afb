"""Torch functions that work element by element, and what a pending norm takes along of them.

They work on the rows, all at once. With a tensor, or a pyramid of 1x1 maps, as the other operand
they broadcast as torch does for [L * N, C, H, W].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast.pyramid.content import Content
from rsfast.pyramid.dispatch import function, plain_function, spellings
from rsfast.pyramid.per_image import combine_per_image
from rsfast.pyramid.pyramid import Pyramid

_ELEMENTWISE = (
    *("abs", "acos", "asin", "atan", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos"),
    *("elu", "erf", "exp", "expm1", "gelu", "hardshrink", "hardsigmoid", "leaky_relu", "log"),
    *("log1p", "logsigmoid", "mish", "nan_to_num", "neg", "prelu", "reciprocal", "round", "rrelu"),
    *("rsqrt", "selu", "sigmoid", "sign", "sin", "softplus", "softshrink", "softsign", "sqrt"),
    *("square", "tanh", "tanhshrink", "threshold"),
    *("bfloat16", "clone", "contiguous", "detach", "double", "float", "half", "to", "type_as"),
)
# Names of one function, that of what computes it first.
_BINARY = (
    *(("sub", "subtract"), ("mul", "multiply"), ("div", "divide", "true_divide")),
    *(("maximum",), ("minimum",), ("pow",)),
)


def _register_elementwise(name: str) -> None:
    plain = plain_function(name)

    @function(*spellings(name))
    def elementwise(x: Pyramid, *args: Any, **kwargs: Any) -> Pyramid:
        return x.map_rows(lambda rows: plain(rows, *args, **kwargs))


def _register_activation(name: str) -> None:
    """One that a pending norm takes along."""
    plain = getattr(F, name)

    @function(*spellings(name))
    def activation(x: Pyramid, *args: Any, **kwargs: Any) -> Pyramid:
        joined = _join(x, "with_activation", name)
        return joined or x.map_rows(lambda rows: plain(rows, *args, **kwargs))


def _join(x: Pyramid, how: str, what: Any) -> Pyramid | None:
    """A pyramid whose pending norm has taken something along; None where none can."""
    pending = x.content.pending
    if pending is None or not hasattr(pending, how):
        return None
    joined = getattr(pending, how)(x.content, what)
    return None if joined is None else x.like(Content(pending=joined))


for _name in _ELEMENTWISE:
    _register_elementwise(_name)
for _name in ("relu", "relu6", "silu", "hardswish"):
    _register_activation(_name)


@function(*spellings("hardtanh"))
def _hardtanh(x: Pyramid, min_val: float = -1.0, max_val: float = 1.0) -> Pyramid:
    joined = _join(x, "with_activation", "relu6") if (min_val, max_val) == (0.0, 6.0) else None
    return joined or x.map_rows(lambda rows: F.hardtanh(rows, min_val, max_val))


def _register_binary(*names: str) -> None:
    plain = plain_function(names[0])

    @function(*(spelling for name in names for spelling in spellings(name)))
    def binary(a: Any, b: Any, **kwargs: Any) -> Pyramid:
        return _combine(plain, a, b, **kwargs)


def _register_operator(name: str, *, reflected: bool = False) -> None:
    plain = getattr(torch, "div" if name.endswith("truediv") else name)

    def binary(a: Any, b: Any) -> Pyramid:
        return _combine(plain, a, b)

    def turned(a: Any, b: Any) -> Pyramid:
        return _combine(plain, b, a)

    function(getattr(Tensor, f"__{name}__"))(binary)
    if hasattr(Tensor, f"__i{name}__"):
        function(getattr(Tensor, f"__i{name}__"))(binary)
    function(getattr(Tensor, f"__r{name}__"))(turned)


for _names in _BINARY:
    _register_binary(*_names)
for _name in ("sub", "mul", "truediv", "pow"):
    _register_operator(_name)


@function(*spellings("add"), Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _add(a: Any, b: Any, *, alpha: float = 1) -> Pyramid:
    if alpha != 1:
        return _combine(torch.add, a, b, alpha=alpha)
    if isinstance(a, Pyramid) and isinstance(b, Pyramid) and a.sizes == b.sizes:
        for pending, other in ((a, b), (b, a)):
            joined = _join(pending, "with_residual", other)
            if joined is not None:
                return joined
    return _combine(torch.add, a, b)


@function(Tensor.__neg__)
def _negative(x: Pyramid) -> Pyramid:
    return x.map_rows(torch.neg)


def _combine(f: Callable[..., Tensor], a: Any, b: Any, **kwargs: Any) -> Pyramid:
    """An element-wise function of two operands, at least one of them a pyramid."""
    if kwargs:
        f = functools.partial(f, **kwargs)
    x = a if isinstance(a, Pyramid) else b
    if not isinstance(x, Pyramid):
        raise TypeError(f"one operand must be a pyramid, got {type(a)} and {type(b)}")
    if isinstance(a, Pyramid) and isinstance(b, Pyramid):
        if a.sizes == b.sizes:
            if a.is_packed and b.is_packed:
                return a.with_rows(f(a.rows, b.rows))
            return a.like(Content(parts=[f(p, q) for p, q in zip(a.parts, b.parts, strict=True)]))
        if b.is_pooled:
            return combine_per_image(f, a, b.rows)
        if a.is_pooled:
            return combine_per_image(lambda p, q: f(q, p), b, a.rows)
        raise ValueError(f"pyramids of sizes {a.sizes} and {b.sizes} do not go together")
    other = b if x is a else a
    if isinstance(other, Tensor) and other.dim():
        return _combine_with_tensor(f, x, other, first=x is a)
    return x.map_rows(lambda rows: f(rows, other) if x is a else f(other, rows))


def _combine_with_tensor(
    f: Callable[..., Tensor], x: Pyramid, other: Tensor, *, first: bool
) -> Pyramid:
    """With a tensor that broadcasts over height and width: [*C, 1, 1] or [L * N, *C, 1, 1]."""

    def ordered(p: Tensor, q: Tensor) -> Tensor:
        return f(p, q) if first else f(q, p)

    shape = (1,) * (x.ndim - other.dim()) + tuple(other.shape)
    if len(shape) == x.ndim and other.numel() == 1:
        return x.map_rows(lambda rows: ordered(rows, other.reshape(())))
    if len(shape) != x.ndim or shape[-2:] != (1, 1) or shape[0] not in (1, len(x)):
        raise ValueError(
            f"a tensor of shape {tuple(other.shape)} does not go with a pyramid of {x.shape}: it "
            f"must broadcast over height and width"
        )
    if shape[0] == 1:
        return x.map_rows(lambda rows: ordered(rows, other.view(shape[1:-2])))
    return combine_per_image(ordered, x, other.reshape(shape[:-2]))


@function(F.dropout, torch.dropout)
def _dropout(x: Pyramid, p: float = 0.5, training: bool = True) -> Pyramid:
    if not training or p == 0.0:
        return x
    return x.map_rows(lambda rows: F.dropout(rows, p))


@function(F.dropout2d)
def _dropout2d(x: Pyramid, p: float = 0.5, training: bool = True) -> Pyramid:
    if not training or p == 0.0:
        return x
    return x.map_levels(lambda level: F.dropout2d(level, p))
