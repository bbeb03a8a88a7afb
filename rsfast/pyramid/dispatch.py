"""From a torch function to what it means for pyramids: the table, and its error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["dispatch", "function", "place_in_network", "plain_function", "spellings"]

Handler = Callable[..., Any]
_TABLE: dict[Any, Handler] = {}


def function(*torch_functions: Any) -> Callable[[Handler], Handler]:
    """Teaches pyramids what torch functions mean for them.

    The decorated function is called instead, with the same arguments, and returns a Pyramid or a
    tensor. In-place variants (`inplace=True`, a name that ends in an underscore, `+=`) are dealt
    with before: it returns a new pyramid, and `inplace` is not among its arguments.

        @rsfast.pyramid.function(torch.special.entr)
        def entr(x):
            return x.map_rows(torch.special.entr)

    `Pyramid.map_rows` computes what works pixel by pixel, `Pyramid.map_levels` what needs whole
    images [N, C, H, W].

    Args:
        torch_functions: as `__torch_function__` gets them: `torch.add`, `torch.Tensor.add`,
            `torch.nn.functional.relu`, and so on. A later registration replaces an earlier one.
    """

    def register(handler: Handler) -> Handler:
        for torch_function in torch_functions:
            _TABLE[torch_function] = handler
        return handler

    return register


def spellings(name: str) -> Iterator[Any]:
    """Every torch function of a name, in-place ones too."""
    for owner in (torch, F, Tensor, torch._C._nn):
        for spelling in (name, f"{name}_"):
            found = getattr(owner, spelling, None)
            if found is not None:
                yield found


def plain_function(name: str) -> Callable[..., Any]:
    """The function that computes it on tensors."""
    return next(getattr(owner, name) for owner in (F, torch, Tensor) if getattr(owner, name, None))


def dispatch(torch_function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls what the table has for a function, and writes in place where the name says so.

    Raises:
        TypeError: if the table does not have it.
    """
    handler = _TABLE.get(torch_function)
    if handler is None:
        raise _unknown(torch_function)
    inplace = kwargs.pop("inplace", False) or _is_inplace(torch_function)
    result = handler(*args, **kwargs)
    return args[0].become(result) if inplace else result


def _is_inplace(torch_function: Any) -> bool:
    name = getattr(torch_function, "__name__", "")
    if name.startswith("__"):
        return name in ("__iadd__", "__isub__", "__imul__", "__itruediv__")
    return name.endswith("_")


def _unknown(torch_function: Any) -> TypeError:
    name = _name_of(torch_function)
    place = place_in_network(sys._getframe())
    return TypeError(
        f"pyramids do not know {name}, which {place or 'no module'} calls; "
        f"@rsfast.pyramid.function({name}) teaches it to them"
    )


def _name_of(torch_function: Any) -> str:
    name = getattr(torch_function, "__name__", str(torch_function))
    owner = getattr(torch_function, "__objclass__", None)
    if owner is not None or getattr(torch_function, "__qualname__", "").startswith("_TensorBase"):
        return f"torch.Tensor.{name}"
    module = getattr(torch_function, "__module__", None) or "torch"
    if name.startswith("special_"):
        return f"torch.special.{name.removeprefix('special_')}"
    return f"{'torch' if module.startswith('torch._C') else module}.{name}"


def place_in_network(frame: FrameType | TracebackType | None) -> str | None:
    """The innermost module under way, as "layer3.0.attention (Attention)"; None outside of any.

    Args:
        frame: where to look from: a frame, outwards, or the traceback of an error, inwards.
    """
    modules: list[nn.Module] = []
    inwards = isinstance(frame, TracebackType)
    while frame is not None:
        local = frame.tb_frame.f_locals if isinstance(frame, TracebackType) else frame.f_locals
        found = local.get("self")
        if isinstance(found, nn.Module):
            modules.append(found)
        frame = frame.tb_next if isinstance(frame, TracebackType) else frame.f_back
    if not modules:
        return None
    return _named(modules[-1], modules[0]) if inwards else _named(modules[0], modules[-1])


def _named(innermost: nn.Module, outermost: nn.Module) -> str:
    names = [name for name, module in outermost.named_modules() if module is innermost]
    path = f"{names[0] if names else ''}.".removeprefix("network.").rstrip(".")
    kind = type(innermost).__name__
    return f"{path} ({kind})" if path else kind
