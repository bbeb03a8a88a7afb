"""What torch functions of channels and shapes mean for pyramids.

- Functions of channels (concatenation, chunks, softmax) work on the rows' later dimensions.
- Views may split channels into several dimensions and join them again.
- Reductions over height and width give a pyramid of 1x1 maps, or the tensor [L * N, C].

Element-wise functions are in :mod:`rsfast.pyramid.elementwise`, those of whole images in
:mod:`rsfast.pyramid.spatial`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsfast import kernels
from rsfast.pyramid.content import Content
from rsfast.pyramid.dispatch import function, plain_function, spellings
from rsfast.pyramid.extent import Extent
from rsfast.pyramid.pyramid import Pyramid

_ALONG_CHANNELS = ("softmax", "log_softmax", "softmin", "cumsum", "flip")


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
    plain = plain_function(name)

    @function(*spellings(name))
    def along(x: Pyramid, dim: Any = None, *args: Any, **kwargs: Any) -> Pyramid:
        kwargs.pop("_stacklevel", None)
        dim = kwargs.pop("dims", dim)
        place = (
            [_channel_dim(x, d) for d in dim] if isinstance(dim, Sequence) else _channel_dim(x, dim)
        )
        return x.map_rows(lambda rows: plain(rows, place, *args, **kwargs))


for _name in _ALONG_CHANNELS:
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
    missing = x.ndim - sum(place is not None and place is not Ellipsis for place in places)
    at = places.index(Ellipsis) if Ellipsis in places else len(places)
    places[at : at + 1] = [slice(None)] * missing
    images, *channels, rows, cols = places
    if images != slice(None) or not all(isinstance(place, slice) for place in (rows, cols)):
        raise ValueError(f"a pyramid can be indexed by channels and by slices of maps, got {index}")
    if any(place != slice(None) for place in channels):
        x = x.map_rows(lambda r: r[(slice(None), *channels)].contiguous())
    if rows == cols == slice(None):
        return x
    return x.map_levels(lambda level: level[..., rows, cols])


@function(*spellings("transpose"), *spellings("swapaxes"), *spellings("swapdims"))
def _transpose(x: Pyramid, dim0: int, dim1: int) -> Pyramid:
    first, second = _channel_dim(x, dim0), _channel_dim(x, dim1)
    return x.map_rows(lambda rows: rows.transpose(first, second).contiguous())


@function(*spellings("unsqueeze"))
def _unsqueeze(x: Pyramid, dim: int) -> Pyramid:
    place = dim + x.ndim + 1 if dim < 0 else dim
    if not 1 <= place <= x.ndim - 2:
        raise ValueError(f"dim must be among those of channels, got {dim}")
    return x.map_rows(lambda rows: rows.unsqueeze(place))


@function(*spellings("squeeze"))
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
        maps = [f(level, (-2, -1), keepdim=True, **kwargs) for level in x.levels()]
        pooled = x.like(Content(rows=torch.cat(maps).flatten(-3)), [(1, 1)] * x.num_levels)
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
        rows = kernels.global_avg_pool(x.rows, x.level_rows, x.num_images, backend=x.backend)
    else:
        channels = x.channel_shape
        rows = torch.cat([part.view(x.num_images, -1, *channels).mean(1) for part in x.parts])
    return x.like(Content(rows=rows), [(1, 1)] * x.num_levels)


def _register_new(name: str) -> None:
    make = getattr(torch, name.removeprefix("new_"))

    @function(getattr(Tensor, name))
    def new(x: Pyramid, *args: Any, **kwargs: Any) -> Tensor:
        return make(*args, **{"dtype": x.dtype, "device": x.device, **kwargs})


for _name in ("new_empty", "new_zeros", "new_ones", "new_full"):
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
