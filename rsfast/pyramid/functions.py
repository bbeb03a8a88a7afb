"""What torch functions mean for pyramids: the table behind `Pyramid.__torch_function__`.

- Element-wise functions work on the rows, all at once. With a tensor, or a pyramid of 1x1 maps,
  as the other operand they broadcast as torch does for [L * N, C, H, W].
- Functions of channels (concatenation, chunks, softmax) work on the rows' later dimensions.
- Reductions over height and width give a pyramid of 1x1 maps, or the tensor [L * N, C].
- What needs whole images is in :mod:`rsfast.pyramid.spatial`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast import kernels
from rsfast.pyramid.dispatch import function
from rsfast.pyramid.extent import Extent
from rsfast.pyramid.per_image import combine_per_image
from rsfast.pyramid.pyramid import Content, Pyramid

_ELEMENTWISE = [
    "abs",
    "acos",
    "asin",
    "atan",
    "celu",
    "clamp",
    "clamp_max",
    "clamp_min",
    "clip",
    "cos",
    "elu",
    "erf",
    "exp",
    "expm1",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "leaky_relu",
    "log",
    "log1p",
    "logsigmoid",
    "mish",
    "neg",
    "nan_to_num",
    "reciprocal",
    "relu",
    "relu6",
    "round",
    "rsqrt",
    "rrelu",
    "selu",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "softplus",
    "softshrink",
    "softsign",
    "sqrt",
    "square",
    "tanh",
    "tanhshrink",
    "threshold",
    "hardswish",
    "prelu",
    "clone",
    "contiguous",
    "detach",
    "to",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
]
_BINARY = "add sub mul div true_divide maximum minimum pow"
_ALONG_CHANNELS = "softmax log_softmax softmin cumsum flip roll"


def _spellings(name: str) -> Iterator[Any]:
    """Every torch function of a name, in-place ones too."""
    for owner in (torch, F, Tensor, torch._C._nn):
        for spelling in (name, f"{name}_"):
            found = getattr(owner, spelling, None)
            if found is not None:
                yield found


def _plain(name: str) -> Callable[..., Any]:
    """The function that computes it on tensors."""
    return next(getattr(owner, name) for owner in (F, torch, Tensor) if getattr(owner, name, None))


def _register_elementwise(name: str) -> None:
    plain = _plain(name)

    @function(*_spellings(name))
    def elementwise(x: Pyramid, *args: Any, **kwargs: Any) -> Pyramid:
        return x.map_rows(lambda rows: plain(rows, *args, **kwargs))


def _register_activation(name: str, elementwise: str, *spellings: Any) -> None:
    """One that a pending norm takes along."""
    plain = getattr(F, elementwise)

    @function(*_spellings(elementwise), *spellings)
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
    _register_activation(_name, _name)


@function(*_spellings("hardtanh"))
def _hardtanh(x: Pyramid, min_val: float = -1.0, max_val: float = 1.0) -> Pyramid:
    joined = _join(x, "with_activation", "relu6") if (min_val, max_val) == (0.0, 6.0) else None
    return joined or x.map_rows(lambda rows: F.hardtanh(rows, min_val, max_val))


def _register_binary(*names: str) -> None:
    plain = _plain(names[0])

    @function(*(spelling for name in names for spelling in _spellings(name)))
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


for _name in _BINARY.split():
    _register_binary(_name)
_register_binary("sub", "subtract")
_register_binary("mul", "multiply")
_register_binary("div", "divide")
for _name in ("sub", "mul", "truediv", "pow"):
    _register_operator(_name)


@function(*_spellings("add"), Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _add(a: Any, b: Any, *, alpha: float = 1) -> Pyramid:
    if alpha != 1:
        return _combine(lambda p, q: torch.add(p, q, alpha=alpha), a, b)
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
        plain = f

        def f(p: Any, q: Any) -> Tensor:
            return plain(p, q, **kwargs)

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


@function(F.feature_dropout if hasattr(F, "feature_dropout") else F.dropout2d, F.dropout2d)
def _dropout2d(x: Pyramid, p: float = 0.5, training: bool = True) -> Pyramid:
    if not training or p == 0.0:
        return x
    return x.map_levels(lambda level: F.dropout2d(level, p))


def _channel_dim(x: Pyramid, dim: int) -> int:
    """A dimension of channels, counted as the rows have it."""
    place = dim + x.ndim if dim < 0 else dim
    if not 1 <= place <= x.ndim - 3:
        raise ValueError(
            f"dim must be one of channels, 1 to {x.ndim - 3}, for levels of different sizes, "
            f"got {dim}"
        )
    return place


def _register_along_channels(name: str) -> None:
    plain = _plain(name)

    @function(*_spellings(name))
    def along(x: Pyramid, dim: Any = None, *args: Any, **kwargs: Any) -> Pyramid:
        kwargs.pop("_stacklevel", None)
        dim = kwargs.pop("dims", dim)
        place = (
            [_channel_dim(x, d) for d in dim] if isinstance(dim, Sequence) else _channel_dim(x, dim)
        )
        return x.map_rows(lambda rows: plain(rows, place, *args, **kwargs))


for _name in _ALONG_CHANNELS.split():
    if _name != "roll":
        _register_along_channels(_name)


@function(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Sequence[Any], dim: int = 0) -> Pyramid:
    return _join_channels(torch.cat, tensors, _channel_dim(_first_pyramid(tensors), dim))


@function(torch.stack)
def _stack(tensors: Sequence[Any], dim: int = 0) -> Pyramid:
    first = _first_pyramid(tensors)
    place = dim + first.ndim + 1 if dim < 0 else dim
    if not 1 <= place <= first.ndim - 2:
        raise ValueError(f"dim must be among those of channels, got {dim}")
    return _join_channels(torch.stack, tensors, place)


def _first_pyramid(tensors: Sequence[Any]) -> Pyramid:
    return next(x for x in tensors if isinstance(x, Pyramid))


def _join_channels(f: Callable[..., Tensor], tensors: Sequence[Any], place: int) -> Pyramid:
    first = _first_pyramid(tensors)
    if not all(isinstance(x, Pyramid) and x.sizes == first.sizes for x in tensors):
        raise ValueError(
            f"only pyramids of the same sizes can be joined, got {[x.shape for x in tensors]}"
        )
    if all(x.is_packed for x in tensors):
        return first.with_rows(f([x.rows for x in tensors], place))
    parts = zip(*(x.parts for x in tensors), strict=True)
    return first.like(Content(parts=[f(list(level), place) for level in parts]))


def _register_parting(name: str) -> None:
    plain = getattr(torch, name)

    @function(plain, getattr(Tensor, name))
    def parted(x: Pyramid, sections: Any = 0, dim: int = 0, **kwargs: Any) -> tuple[Pyramid, ...]:
        sections = next(iter(kwargs.values()), sections)
        if name == "unbind":  # whose only argument is the dimension
            pieces = _pieces(x, lambda rows: plain(rows, _channel_dim(x, sections)))
        else:
            pieces = _pieces(x, lambda rows: plain(rows, sections, _channel_dim(x, dim)))
        return tuple(pieces)


def _pieces(x: Pyramid, f: Callable[[Tensor], Sequence[Tensor]]) -> list[Pyramid]:
    if x.is_packed:
        return [x.with_rows(piece.contiguous()) for piece in f(x.rows)]
    by_level = [f(part) for part in x.parts]
    return [
        x.like(Content(parts=[piece.contiguous() for piece in pieces]))
        for pieces in zip(*by_level, strict=True)
    ]


for _name in ("chunk", "split", "tensor_split", "unbind"):
    _register_parting(_name)


@function(Tensor.__getitem__)
def _getitem(x: Pyramid, index: Any) -> Any:
    places = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in places:
        at = places.index(Ellipsis)
        places[at : at + 1] = [slice(None)] * (x.ndim - len(places) + 1)
    places += [slice(None)] * (x.ndim - len(places))
    images, *channels, rows, cols = places
    if (
        images != slice(None)
        or None in places
        or not all(isinstance(place, slice) for place in (rows, cols))
    ):
        raise ValueError(f"a pyramid can be indexed by channels and by slices of maps, got {index}")
    if any(place != slice(None) for place in channels):
        x = x.map_rows(lambda r: r[(slice(None), *channels)].contiguous())
    if rows == cols == slice(None):
        return x
    return x.map_levels(lambda level: level[..., rows, cols])


@function(*_spellings("transpose"), *_spellings("swapaxes"), *_spellings("swapdims"))
def _transpose(x: Pyramid, dim0: int, dim1: int) -> Pyramid:
    first, second = _channel_dim(x, dim0), _channel_dim(x, dim1)
    return x.map_rows(lambda rows: rows.transpose(first, second).contiguous())


@function(*_spellings("unsqueeze"))
def _unsqueeze(x: Pyramid, dim: int) -> Pyramid:
    place = dim + x.ndim + 1 if dim < 0 else dim
    if not 1 <= place <= x.ndim - 2:
        raise ValueError(f"dim must be among those of channels, got {dim}")
    return x.map_rows(lambda rows: rows.unsqueeze(place))


@function(*_spellings("squeeze"))
def _squeeze(x: Pyramid, *dims: int) -> Any:
    if len(dims) == 1 and 1 <= dims[0] <= x.ndim - 3:
        return x.map_rows(lambda rows: rows.squeeze(dims[0]))
    return x.as_tensor().squeeze(*dims)


@function(torch.flatten, Tensor.flatten)
def _flatten(x: Pyramid, start_dim: int = 0, end_dim: int = -1) -> Any:
    last = end_dim + x.ndim if end_dim < 0 else end_dim
    if 1 <= start_dim <= last <= x.ndim - 3:
        return x.map_rows(lambda rows: rows.flatten(start_dim, last))
    if x.is_pooled and start_dim == 1 and last == x.ndim - 1:
        return x.rows.flatten(1)
    return x.as_tensor().flatten(start_dim, end_dim)


@function(Tensor.view, Tensor.reshape, torch.reshape)
def _view(x: Pyramid, *shape: Any) -> Any:
    if len(shape) == 1 and isinstance(shape[0], list | tuple):
        shape = tuple(shape[0])
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        return x.map_rows(lambda rows: rows.view(shape[0]))
    # An extent may stand anywhere in the shape: it is compared by identity of values, not asked.
    ends = [_values(part, x.num_levels) for part in shape[-2:]]
    own = [_values(part, x.num_levels) for part in x.shape[-2:]]
    if len(shape) > 3 and shape[0] in (len(x), -1) and ends == own:
        return x.map_rows(lambda rows: rows.reshape(len(rows), *shape[1:-2]))
    if any(isinstance(part, Extent) for part in shape):
        raise ValueError(
            f"a pyramid of {x.shape} can be split and joined in its channels only, got {shape}"
        )
    if x.is_pooled:
        return x.rows.reshape(shape)
    return x.as_tensor().reshape(shape)


def _values(part: Any, num_levels: int) -> tuple[Any, ...]:
    return part.values if isinstance(part, Extent) else (part,) * num_levels


@function(Tensor.expand_as)
def _expand_as(x: Any, other: Any) -> Any:
    """As it is: whoever combines it with `other` broadcasts it."""
    return x


@function(torch.mean, Tensor.mean)
def _mean(x: Pyramid, dim: Any = None, keepdim: bool = False) -> Any:
    if _is_over_maps(x, dim):
        pooled = _global_avg_pool(x)
        return pooled if keepdim else pooled.rows
    return _reduce(torch.mean, x, dim, keepdim)


def _register_reduction(name: str) -> None:
    plain = getattr(torch, name)

    @function(plain, getattr(Tensor, name))
    def reduced(x: Pyramid, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
        return _reduce(plain, x, dim, keepdim, **kwargs)


for _name in ("sum", "amax", "amin", "std", "var", "max", "min", "argmax"):
    _register_reduction(_name)


def _is_over_maps(x: Pyramid, dim: Any) -> bool:
    if not isinstance(dim, list | tuple):
        return False
    return sorted(d + x.ndim if d < 0 else d for d in dim) == [x.ndim - 2, x.ndim - 1]


def _reduce(f: Callable[..., Any], x: Pyramid, dim: Any, keepdim: bool, **kwargs: Any) -> Any:
    if _is_over_maps(x, dim):
        places = (-2, -1)
        made = torch.cat([f(level, places, keepdim=True, **kwargs) for level in x.levels()])
        pooled = x.like(Content(rows=made.flatten(-3)), [(1, 1)] * x.num_levels)
        return pooled if keepdim else pooled.rows
    if dim is None:
        raise ValueError(f"{f.__name__} over all of a pyramid would mix its images")
    dims = dim if isinstance(dim, list | tuple) else (dim,)
    channels = [_channel_dim(x, d) for d in dims]
    place: Any = channels if isinstance(dim, list | tuple) else channels[0]
    made = [f(rows, place, keepdim=keepdim, **kwargs) for rows in _stored(x)]
    if isinstance(made[0], Tensor):
        return _stored_like(x, made)
    # max and min over one dimension: values and indices
    return type(made[0])([_stored_like(x, list(parts)) for parts in zip(*made, strict=True)])


def _stored(x: Pyramid) -> tuple[Tensor, ...]:
    return (x.rows,) if x.is_packed else x.parts


def _stored_like(x: Pyramid, made: list[Tensor]) -> Pyramid:
    return x.like(Content(rows=made[0]) if x.is_packed else Content(parts=made))


@function(F.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(x: Pyramid, output_size: Any) -> Pyramid:
    if output_size in (1, (1, 1), [1, 1]):
        return _global_avg_pool(x)
    return x.map_levels(lambda level: F.adaptive_avg_pool2d(level, output_size))


def _global_avg_pool(x: Pyramid) -> Pyramid:
    if x.is_pooled:
        return x
    if x.is_packed:
        backend = kernels.without_extension(x.backend)
        rows = kernels.global_avg_pool(x.rows, x.level_rows, x.num_images, backend=backend)
    else:
        channels = x.channel_shape
        rows = torch.cat([part.view(x.num_images, -1, *channels).mean(1) for part in x.parts])
    return x.like(Content(rows=rows), [(1, 1)] * x.num_levels)


def _register_new(name: str) -> None:
    make = getattr(torch, name.removeprefix("new_"))

    @function(getattr(Tensor, name))
    def new(x: Pyramid, *args: Any, **kwargs: Any) -> Tensor:
        return make(*args, **{"dtype": x.dtype, "device": x.device, **kwargs})


for _name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
    if _name != "new_tensor":
        _register_new(_name)


@function(torch.numel, Tensor.numel)
def _numel(x: Pyramid) -> int:
    return sum(x.level_rows) * math.prod(x.channel_shape)


@function(torch.is_floating_point, Tensor.is_floating_point)
def _is_floating_point(x: Pyramid) -> bool:
    return x.dtype.is_floating_point


@function(Tensor.is_contiguous)
def _is_contiguous(x: Pyramid, memory_format: Any = None) -> bool:
    return True
