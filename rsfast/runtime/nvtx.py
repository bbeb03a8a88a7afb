"""Names for what happens, as Nsight Systems shows them.

Ranges cost nothing until they are switched on. In a captured step they appear once, while it is
captured: profile with `--no-graph` to see every layer.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ProfileWindow", "enable_ranges", "name_all_reduces", "name_layers", "nvtx_range"]

_enabled = False


def enable_ranges() -> None:
    """Switches ranges on, for the rest of the process."""
    global _enabled
    _enabled = True
    # The package's name for the module is taken by the function in it.
    conv2d: Any = importlib.import_module("rsfast.kernels.conv2d.op")
    conv2d.level_range = nvtx_range


def name_all_reduces(ddp: DistributedDataParallel) -> None:
    """A range around the launch of every bucket's reduction, if ranges are on."""
    if _enabled:
        ddp.register_comm_hook(None, _all_reduce)


def _all_reduce(group, bucket):  # without annotations: DDP does not read postponed ones
    with nvtx_range(f"all-reduce of bucket {bucket.index()}"):
        return allreduce_hook(group, bucket)


@contextlib.contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """A range around a block."""
    if not _enabled:
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def name_layers(model: nn.Module) -> None:
    """A range around the forward of every layer, with its name in the network."""

    # range_push and range_pop return a depth; what a hook returns takes the place of its layer's
    # inputs or output.
    def push(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            torch.cuda.nvtx.range_push(name)

        return hook

    def pop(*_: object) -> None:
        torch.cuda.nvtx.range_pop()

    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_pre_hook(push(f"{type(module).__name__} {name}"))
            module.register_forward_hook(pop, always_call=True)


class ProfileWindow:
    """Tells a profiler that waits for the CUDA profiler API which steps to record.

    Args:
        first: step, counted from 0 over the whole run, before which recording starts.
        last: step before which it stops.
    """

    def __init__(self, first: int, last: int) -> None:
        self._first = first
        self._last = last
        self._open = False

    def before(self, step: int) -> None:
        """To be called before every step."""
        if step == self._first:
            torch.cuda.profiler.start()
            self._open = True
        elif self._open and step >= self._last:
            self.close()

    def close(self) -> None:
        """Stops recording, if it has started."""
        if self._open:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            self._open = False
