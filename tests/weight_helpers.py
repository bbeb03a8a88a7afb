"""Networks whose layers differ, their files, and how a network that has read one is compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsfast.models import RSNet
from rsfast.models.registry import build

__all__ = ["assert_is", "lively", "plain", "written"]


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics, scales and shifts that no two layers share."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if hasattr(module, "running_var"):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            module.num_batches_tracked.fill_(7)
    return network.eval()


def plain(arch: str, classes: int = 5) -> nn.Module:
    torch.manual_seed(1)
    return lively(build(arch, classes))


def written(path: Path, state: dict[str, Tensor], wrap: Callable[[Any], Any] = lambda s: s) -> Path:
    torch.save(wrap(state), path)
    return path


def assert_is(model: RSNet, network: nn.Module) -> None:
    """At every resolution the converted network is the plain one, tensor by tensor."""
    for resolution in model.resolutions:
        found, expected = model.at(resolution).state_dict(), network.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{resolution} {name}"
