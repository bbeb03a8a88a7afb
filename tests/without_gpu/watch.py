"""What a GPU would mind, seen on a CPU: hosts that wait for it, tensors that fused SGD refuses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["FusedSgd", "HostWaits"]

# The host needs something from the device to go on: a value, or how many there are.
_READS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero"),
    *("_unique2", "unique_consecutive", "unique_dim", "repeat_interleave.Tensor"),
}
# A tensor made of numbers of the host is a copy to the device, which a CUDA graph refuses.
_FROM_HOST = {"lift", "lift_fresh", "lift_fresh_copy"}
_COPIES = {"_to_copy", "copy", "copy_", "_foreach_copy_", "_foreach_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# On a CPU these come to no operation.
_READING_METHODS = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__}
# Labels are looked at on a CPU only; a batch comes from the host, on a stream of its own.
_HARMLESS = ("rsfast.kernels.distillation_loss.checks.", "rsfast.data.")


class HostWaits(contextlib.ExitStack):
    """Records what makes the host wait in its block, also within operators of rsfast.

    Attributes:
        found: name of each such operation, and where in rsfast it was called.
        seen: names of all operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.seen: set[str] = set()

    def __enter__(self) -> HostWaits:
        self.enter_context(_Methods(self))
        self.enter_context(_Operations(self))
        return self

    def record(self, name: str) -> None:
        """Adds what is being called, unless it does no harm."""
        place = place_in_rsfast()
        if not place.startswith(_HARMLESS):
            self.found.add((name, place))


class _Operations(TorchDispatchMode):
    def __init__(self, watch: HostWaits) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.watch.seen.add(str(func))
        given = tensors_in((args, kwargs))
        if func.namespace == "rsfast" and not any(isinstance(t, FakeTensor) for t in given):
            with self:  # what is in it: a mode does not see what it calls itself
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        if waits(func.__name__, given) or between_devices(func, given, tensors_in(result)):
            self.watch.record(str(func))
        return result


class _Methods(TorchFunctionMode):
    def __init__(self, watch: HostWaits) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READING_METHODS and not in_triton():
            self.watch.record(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def waits(name: str, given: list[Tensor]) -> bool:
    """Whether an operation of PyTorch, `name.overload`, makes the host wait."""
    packet = name.split(".")[0]
    if packet in _INDEXING:  # by a mask: how many are chosen?
        return any(tensor.dtype == torch.bool for tensor in given[1:])
    return not {name, packet}.isdisjoint(_READS | _FROM_HOST)


def between_devices(func: Any, given: list[Tensor], result: list[Tensor]) -> bool:
    """Whether an operation copies from the host or to it."""
    if func.__name__.split(".")[0] not in _COPIES:  # kernels take the host's scalars as numbers
        given = [tensor for tensor in given if tensor.dim()]
    return len({tensor.device.type for tensor in (*given, *result)}) > 1


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def in_triton() -> bool:
    """Whether Triton's interpreter is at work, which computes on the host."""
    return any(name.startswith("triton.") for name, _ in calls())


def place_in_rsfast() -> str:
    """The innermost function of rsfast that is being run."""
    for module, place in calls():
        if module.startswith("rsfast."):
            return f"{module}.{place}"
    return "not in rsfast"


def calls() -> Iterator[tuple[str, str]]:
    """Module, and function and line in it, of what is being run, from within outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        yield frame.f_globals["__name__"], f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
        frame = frame.f_back


class FusedSgd(TorchDispatchMode):
    """Notes what PyTorch's fused SGD on a GPU would refuse; on a CPU it takes everything.

    Attributes:
        faults: what was wrong, in words.
        tensors: how many parameters were moved, with as many gradients and momenta.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()
        self.tensors = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__.startswith("_fused_sgd_"):
            self._check(*args[:3], kwargs)
            if args[0][0].device.type == "cuda":  # a pretended one
                return None
        return func(*args, **kwargs)

    def _check(
        self, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], options: Any
    ) -> None:
        for name in ("lr", "found_inf", "grad_scale"):
            value = options.get(name)
            if isinstance(value, Tensor) and kind_of(value) != ("float32", params[0].device):
                self.faults.add(f"{name} is {kind_of(value)}")
        for param, grad, momentum in zip(params, grads, momenta, strict=True):
            self.tensors += 1
            for name, tensor in (("gradient", grad), ("momentum", momentum)):
                if layout_of(tensor) != layout_of(param):
                    self.faults.add(f"{name} is {layout_of(tensor)}, weight {layout_of(param)}")


def kind_of(tensor: Tensor) -> tuple[str, torch.device]:
    return str(tensor.dtype).removeprefix("torch."), tensor.device


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """What has to be the same: strides matter where there is more than one."""
    shape = tuple(tensor.shape)
    strides = [
        stride if size > 1 else 0 for size, stride in zip(shape, tensor.stride(), strict=True)
    ]
    return *kind_of(tensor), shape, strides
