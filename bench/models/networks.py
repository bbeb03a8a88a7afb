"""Which CNNs of torchvision and timm convert, and why others do not.

    python -m bench.models.networks --output docs/networks.md

Needs torchvision and timm. Networks are built and converted on the meta device, for the paper's
five resolutions; the smallest of each family is also compared with copies for each resolution, in
float64: logits, gradients, and the way back to the plain network.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rsfast
from rsfast import Pyramid
from rsfast.models import registry

__all__ = ["Differences", "compare", "main"]

PAPER_RESOLUTIONS = (224, 192, 160, 128, 96)
COMPARED = (96, 64)  # pixels; larger ones where a network's maps would vanish
_COMPARED_LARGE = (128, 96)
_MOST_PARAMETERS = 100e6  # of a network that is compared
_BOUND = 1e-9


class Differences(NamedTuple):
    """Between a converted network and copies for each resolution, against the largest value.

    Attributes:
        by_level, packed: of the logits, in the two layouts.
        gradients: of all parameters.
        back: of the logits of the plain network that `RSNet.at` gives.
    """

    by_level: float
    packed: float
    gradients: float
    back: float


def compare(arch: str, resolutions: Sequence[int] = COMPARED) -> Differences:
    """Converts a network in float64 and compares it; what is drawn at random is switched off.

    The state dict of the way back is loaded into the network as it was before.
    """
    torch.manual_seed(0)
    plain = _without_chance(registry.build(arch, 10).double().train())
    copies = [copy.deepcopy(plain) for _ in resolutions]
    original = copy.deepcopy(plain).eval()
    model = rsfast.convert(plain, resolutions).train()
    images = [torch.randn(2, 3, r, r, dtype=torch.float64) for r in resolutions]
    exact = torch.stack([net(x) for net, x in zip(copies, images, strict=True)])
    scale = exact.detach().abs().max()
    logits = model(images)
    with torch.no_grad():
        packed = model.network(Pyramid.pack(images))
    packed = packed.rows if isinstance(packed, Pyramid) else packed
    dy = torch.randn_like(exact)
    (logits * dy).sum().backward()
    (exact * dy).sum().backward()
    model.eval()
    original.load_state_dict(model.at(resolutions[0]).state_dict())
    with torch.no_grad():
        back = original(images[0]) - model([images[0]])[0]
    return Differences(
        _largest(logits - exact) / scale,
        _largest(packed.view_as(exact) - exact) / scale,
        _gradient_difference(model.network, copies),
        _largest(back) / _largest(model([images[0]])),
    )


def _largest(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item()


def _without_chance(network: nn.Module) -> nn.Module:
    for module in network.modules():
        for name in ("p", "drop_prob", "drop_rate"):  # dropout, stochastic depth
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return network


def _gradient_difference(network: nn.Module, copies: Sequence[nn.Module]) -> float:
    difference = largest = 0.0
    by_copy = [dict(net.named_parameters()) for net in copies]
    for name, param in network.named_parameters():
        grads = [parameters[name].grad for parameters in by_copy]
        if param.grad is None or any(grad is None for grad in grads):
            assert param.grad is None or not param.grad.any(), name
            continue
        exact = torch.stack(grads) if param.dim() > grads[0].dim() else sum(grads)
        difference = max(difference, _largest(param.grad - exact))
        largest = max(largest, _largest(exact))
    return difference / largest


class Found(NamedTuple):
    """A network with batch norm."""

    arch: str
    family: str
    parameters: int
    reason: str  # why it cannot be converted; empty if it can


def survey() -> Iterator[Found]:
    """Every classifier of torchvision and timm that has a batch norm of images."""
    import timm
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        yield from _try(f"torchvision/{name}", f"torchvision/{family}")
    for name in timm.list_models():
        family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        yield from _try(f"timm/{name}", f"timm/{family}")


def _try(arch: str, family: str) -> Iterator[Found]:
    try:
        with torch.device("meta"):
            network = registry.build(arch, 10)
    except (RuntimeError, ValueError):  # it reads what it has computed: not on this device
        network = registry.build(arch, 10)
    if not any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        return
    parameters = sum(param.numel() for param in network.parameters())
    reason = ""
    try:
        rsfast.convert(network, PAPER_RESOLUTIONS)
    except ValueError as error:
        reason = _short(str(error))
    yield Found(arch, family, parameters, reason)


def _short(reason: str) -> str:
    reason = re.sub(r"^network cannot be converted(?: for \([\d, ]*\) pixels)?:? ?", "", reason)
    return re.sub(r"; @rsfast.*teaches it to them", "", reason).replace("|", "\\|")


def _row_of_family(family: str, networks: Sequence[Found]) -> str:
    """One line of the first table."""
    converted = [found for found in networks if not found.reason]
    checked = ""
    if converted:
        smallest = min(converted, key=lambda found: found.parameters)
        if smallest.parameters < _MOST_PARAMETERS:
            worst = _compare_somewhere(smallest.arch)
            checked = f"{smallest.arch.partition('/')[2]}: {worst:.0e}"
    return f"| {family} | {len(converted)} of {len(networks)} | {checked} |"


def _compare_somewhere(arch: str) -> float:
    """At small resolutions, if maps do not vanish there.

    Statistics of one pixel of two images, which may be left of them, have no digits.
    """
    worst = float("inf")
    for resolutions in (COMPARED, _COMPARED_LARGE, PAPER_RESOLUTIONS[:2]):
        try:
            worst = min(worst, max(compare(arch, resolutions)))
        except ValueError:
            continue
        if worst < _BOUND:
            break
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.models.networks", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/networks.md"))
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    import timm
    import torchvision

    families: dict[str, list[Found]] = defaultdict(list)
    for found in survey():
        families[found.family].append(found)
        print(found.arch, found.reason or "converted", flush=True)
    total = sum(map(len, families.values()))
    refused = [found for networks in families.values() for found in networks if found.reason]
    lines = [
        "# Networks of torchvision and timm",
        "",
        f"Every classifier of torchvision {torchvision.__version__} and timm {timm.__version__} "
        f"that has an `nn.BatchNorm2d`, with torch {torch.__version__}: {total - len(refused)} of "
        f"{total} convert for {PAPER_RESOLUTIONS} pixels. Made by `make networks`.",
        "",
        "Conversions are tried on images without content. Of each family the smallest network is "
        "also compared in float64 with copies for each resolution: the number is the largest "
        "difference of logits, gradients, and logits on the way back, against the largest value.",
        "",
        "| family | converted | compared |",
        "|---|---|---|",
        *(_row_of_family(family, networks) for family, networks in families.items()),
        "",
        "## Converted",
        "",
        *_lists(families),
        "## Refused",
        "",
        "| network | why |",
        "|---|---|",
        *(f"| {found.arch} | {found.reason} |" for found in refused),
    ]
    args.output.write_text("\n".join(lines) + "\n")
    return 0


def _lists(families: dict[str, list[Found]]) -> Iterator[str]:
    for family, networks in families.items():
        names = [found.arch.partition("/")[2] for found in networks if not found.reason]
        if names:
            yield f"**{family}**: {', '.join(names)}"
            yield ""


if __name__ == "__main__":
    sys.exit(main())
