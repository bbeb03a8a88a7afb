"""Networks of checkpoints that an older rsfast wrote: format 2, before networks became torch's own.

Layers were the same and had other names: `backbone.*` and `classifier`; those of a MobileNetV2 were
not torchvision's.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["FORMAT", "is_old", "renamed"]

FORMAT = 2
_OUTSIDE_BLOCKS = {
    "stem": "features.0.0",
    "stem_bn": "features.0.1",
    "head": "features.18.0",
    "head_bn": "features.18.1",
}
# Of blocks with an expansion, in front of the others; the first block has none.
_EXPANSION = {"expand.0": "0.0", "expand.1": "0.1"}


def is_old(state: dict[str, Tensor]) -> bool:
    """Whether a state dict has the names of format 2."""
    return any(name.startswith("backbone.") for name in state)


def renamed(state: dict[str, Tensor], arch: str) -> dict[str, Tensor]:
    """A state dict of format 2 with the names that the network of this `arch` has.

    What has no other name keeps its own, for `load_state_dict` to complain about.
    """
    new_name = _mobilenetv2_name if arch == "mobilenetv2" else _resnet_name
    found = {}
    for name, tensor in state.items():
        layer, _, field = name.rpartition(".")
        found[f"{new_name(layer)}.{field}"] = tensor
    return found


def _resnet_name(layer: str) -> str:
    if layer == "classifier":
        return "network.fc"
    return layer.replace("backbone.", "network.", 1)


def _mobilenetv2_name(layer: str) -> str:
    if layer == "classifier":
        return "network.classifier.1"
    inner = layer.removeprefix("backbone.")
    if inner in _OUTSIDE_BLOCKS:
        return f"network.{_OUTSIDE_BLOCKS[inner]}"
    blocks, _, rest = inner.partition(".")
    number, _, part = rest.partition(".")
    if blocks != "blocks" or not number.isdecimal():
        return layer
    first = 0 if number == "0" else 1  # position of the depthwise convolution
    names = {
        **_EXPANSION,
        "depthwise": f"{first}.0",
        "depthwise_bn": f"{first}.1",
        "project": f"{first + 1}",
        "project_bn": f"{first + 2}",
    }
    return f"network.features.{int(number) + 1}.conv.{names[part]}" if part in names else layer
