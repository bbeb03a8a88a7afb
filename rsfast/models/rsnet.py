"""RSNet: any network made switchable, and the choice of batch-norm bank per resolution."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsfast import kernels
from rsfast.files.task_names import TASKS
from rsfast.models import lq, registry
from rsfast.pyramid import Pyramid, SwitchableBatchNorm2d, check_resolutions
from rsfast.pyramid.content import Content
from rsfast.pyramid.convert import bn_mixture, to_single, to_switchable
from rsfast.pyramid.dispatch import place_in_network
from rsfast.pyramid.spatial import PaddedImages

__all__ = ["BN_MODES", "RSNet", "convert", "create_model"]

BN_MODES = ("private", "shared")
_COLOURS = 3


class RSNet(nn.Module):
    """A resolution switchable network: shared weights, a private batch-norm bank per resolution.

    Made by :func:`convert` and :func:`create_model`.

    Attributes:
        network: the user's own modules, batch norms swapped; names are theirs.
        resolutions: trained resolutions in pixels, descending.
        num_classes: K.
        bn: "private" or "shared" (one bank for all).
        arch: the name that :func:`create_model` knows it by; None if there is none.
        task: "classification", or "segmentation" for a network whose logits are maps.
        bits: of weights and activations of a quantised network; None in full precision.
        input_mean, input_std: the normalisation of the input that the weights expect, on values
            in [0, 1], RGB. Loaders apply it; the network does not.
        val_crop: how validation images were cut in training, "center" or "none".
        exif: whether images were turned as their EXIF says, "honour", or not, "ignore".
        levels: "resize", or "nearest" where smaller resolutions were picked from the pixels of a
            larger one.
        picked_from: that one, in pixels; None for the largest of `resolutions`.
        class_names: names of the classes if known.
        ignore_label: of pixels that do not count (segmentation).
        backend: what computes batch norm and pooling, "torch", "triton" or "cuda".
    """

    def __init__(
        self,
        network: nn.Module,
        resolutions: Sequence[int],
        num_classes: int,
        bn: str = "private",
        arch: str | None = None,
        task: str = "classification",
    ) -> None:
        super().__init__()
        self.network = network
        self.resolutions = check_resolutions(resolutions)
        self.num_classes = num_classes
        self.bn = bn
        self.arch = arch
        self.task = task
        self.bits: lq.Bits | None = None
        self.input_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
        self.input_std: tuple[float, ...] = (1.0, 1.0, 1.0)
        self.val_crop = "center"
        self.exif = "ignore"
        self.levels = "resize"
        self.picked_from: int | None = None
        self.class_names: tuple[str, ...] | None = None
        self.ignore_label = 255
        self.backend = "torch"

    def forward(self, images: Pyramid | Sequence[Tensor]) -> Any:
        """Logits of every level.

        Args:
            images: a Pyramid of 3-channel levels (zeros may follow the colours), or a sequence of
                tensors [N, 3, r, r]. Without explicit `banks` each level must have a trained
                resolution, in descending order; levels of one resolution share its bank.

        Returns:
            [L, N, K], level by level; for segmentation a Pyramid of levels [N, K, h, w].

        Raises:
            ValueError: if a level has a resolution that was not trained, or a bank is out of range.
        """
        may_be_padded = isinstance(images, Pyramid)
        if not isinstance(images, Pyramid):
            images = Pyramid.pack(images)
        padded = may_be_padded and images.num_channels > _COLOURS
        if images.num_channels != _COLOURS and not padded:
            raise ValueError(f"images must have 3 channels (RGB), got {images.num_channels}")
        x = images.with_banks(self._banks_of(images)).on_backend(self.backend)
        if padded:
            x = x.like(Content(pending=PaddedImages(x, _COLOURS)))
        if self.backend == "torch" and x.device.type == "cpu":
            x = x.by_level()
        logits = self.network(x)
        if self.task == "segmentation":
            if not isinstance(logits, Pyramid):
                raise ValueError(_unlike("[N, K, h, w]", logits))
            return logits
        if isinstance(logits, Pyramid) and logits.is_pooled:
            logits = logits.rows
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ValueError(_unlike("[N, K]", logits))
        return logits.unflatten(0, (images.num_levels, images.num_images))

    def use_backend(self, backend: str) -> RSNet:
        """Chooses what computes batch norm and pooling, and returns the network.

        Args:
            backend: "torch", plain PyTorch on any device; "triton", the fused kernels, for a GPU
                and at most 8 levels; or "cuda", that with training batch norm in CUDA C++, for
                float16 and bfloat16.

        Raises:
            ValueError: if there is no such backend.
        """
        kernels.check_backend(backend)
        self.backend = backend
        return self

    def sync_batch_norm(self, synced: bool = True) -> RSNet:
        """Chooses whose statistics normalise in training, and returns the network.

        Args:
            synced: those of all ranks of the default process group, bank by bank, instead of this
                rank's (the paper's way). For batches too small to have good ones of their own.
        """
        for norm in self.batch_norms():
            norm.synced = synced
        return self

    def at(self, resolution: int, between: str = "interpolate") -> nn.Module:
        """The network for one resolution, in eval mode, with plain batch norms: a copy.

        It is of the class that was converted, and its state dict loads into that class without
        rsfast.

        Args:
            resolution: in pixels; any, trained or not.
            between: the bank of a resolution that was not trained: "interpolate" linearly between
                the two neighbours, or "nearest". Outside the trained range both take the nearest.

        Returns:
            [N, 3, r, r] -> [N, K], or [N, K, h, w] for segmentation, on the network's device.
        """
        mixture = bn_mixture(self.resolutions, resolution, between)
        return to_single(self.network, ((0, 1.0),) if self.bn == "shared" else mixture).eval()

    def fix_activation_basis(self, fixed: bool = True) -> RSNet:
        """Chooses which levels move the bases of quantised activations, and returns the network.

        Args:
            fixed: the largest only, instead of all in turn.
        """
        for module in self.modules():
            if isinstance(module, lq.LQActivation):
                module.largest_only = fixed
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of any module.

        Raises:
            ValueError: if the state is of a network with weights or activations of other bits.
            RuntimeError: if names or shapes do not fit otherwise.
        """
        lq.check_state(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def batch_norms(self) -> list[SwitchableBatchNorm2d]:
        """All batch-norm layers, in the order of the modules."""
        return [m for m in self.modules() if isinstance(m, SwitchableBatchNorm2d)]

    def settings(self) -> dict[str, Any]:
        """The arguments of :func:`create_model` that make this network."""
        settings = {
            "arch": self.arch,
            "resolutions": self.resolutions,
            "num_classes": self.num_classes,
            "bn": self.bn,
        }
        if self.task != "classification":
            settings["task"] = self.task
        if self.bits is not None:
            settings |= {"weight_bits": self.bits.weight, "activation_bits": self.bits.activation}
        return settings

    def _banks_of(self, images: Pyramid) -> tuple[int, ...]:
        num_banks = 1 if self.bn == "shared" else len(self.resolutions)
        if images.banks is not None:
            banks = tuple(0 for _ in images.banks) if self.bn == "shared" else images.banks
            if not all(0 <= bank < num_banks for bank in banks):
                raise ValueError(f"banks must be in [0, {num_banks}), got {images.banks}")
            return banks
        indices = []
        for height, width in images.sizes:
            if height != width or height not in self.resolutions:
                raise ValueError(
                    f"images of {height}x{width} pixels have no batch-norm bank: trained were "
                    f"{self.resolutions}; use at(resolution), or a Pyramid with banks"
                )
            indices.append(self.resolutions.index(height))
        if indices != sorted(indices):
            raise ValueError(
                f"levels must come in descending order of resolution, got {images.sizes}"
            )
        return tuple(indices) if self.bn == "private" else (0,) * len(indices)


def _unlike(wanted: str, logits: Any) -> str:
    shown = getattr(logits, "shape", type(logits).__name__)
    maps = isinstance(logits, Pyramid) and wanted == "[N, K]"
    hint = '; maps are of task="segmentation"' if maps else ""
    return f"network must return logits {wanted} for images, got {shown}{hint}"


def convert(
    module: nn.Module,
    resolutions: Sequence[int],
    bn: str = "private",
    backend: str = "torch",
    *,
    task: str = "classification",
) -> RSNet:
    """Makes any CNN with batch norm a resolution switchable network.

    Every `nn.BatchNorm2d` (and `SyncBatchNorm`, and timm's with activation inside) is swapped for
    one with a bank per resolution, weights and statistics copied into each; the rest stays the
    module's own code, and its parameters are taken over, not copied. The network is tried on
    images without content before it is returned.

    Args:
        module: images [N, 3, r, r] -> logits [N, K], or [N, K, h, w] for segmentation.
        resolutions: in pixels, strictly descending.
        bn: "private" (one bank per resolution) or "shared" (one bank for all, the paper's
            ablation).
        backend: see :meth:`RSNet.use_backend`.
        task: "classification", or "segmentation".

    Raises:
        ValueError: in one sentence with the module's name, if the network cannot be converted.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    return _convert(module, resolutions, bn, backend, task=task)


def _convert(
    module: nn.Module,
    resolutions: Sequence[int],
    bn: str,
    backend: str,
    arch: str | None = None,
    num_classes: int | None = None,
    task: str = "classification",
) -> RSNet:
    """Tries the network out unless it is known how many classes it has."""
    resolutions = check_resolutions(resolutions)
    if bn not in BN_MODES:
        raise ValueError(f"bn must be one of {BN_MODES}, got {bn!r}")
    kernels.check_backend(backend)
    num_banks = len(resolutions) if bn == "private" else 1
    if num_classes is None:
        # On a copy first: a network that is refused stays as it was.
        trial = RSNet(to_switchable(_hollow(module), num_banks), resolutions, 0, bn, task=task)
        num_classes = _try_out(trial)
    network = to_switchable(module, num_banks)
    for param in network.parameters():
        if param.dim() == 4:  # as convolutions of channels-last pixels read it
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    return RSNet(network, resolutions, num_classes, bn, arch, task).use_backend(backend)


def _hollow(module: nn.Module) -> nn.Module:
    """A copy on the meta device: nothing is copied, and nothing is computed with it."""
    memo: dict[int, Any] = {id(t): t.to("meta") for t in module.buffers()}
    memo |= {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _try_out(model: RSNet) -> int:
    """Runs a network of the meta device; returns the number of classes."""
    dtype = next(model.parameters()).dtype
    images = [torch.empty(2, _COLOURS, r, r, dtype=dtype, device="meta") for r in model.resolutions]
    try:
        with torch.no_grad():
            logits = model.train()(images)
            return logits.num_channels if isinstance(logits, Pyramid) else logits.shape[-1]
    except Exception as error:
        place = place_in_network(error.__traceback__)
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"network cannot be converted for {model.resolutions} pixels: {reason} (in {place})"
        ) from error


def create_model(
    arch: str,
    resolutions: Sequence[int] = (224, 192, 160, 128, 96),
    num_classes: int = 1000,
    bn: str = "private",
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    zero_init_residual: bool | None = None,
    task: str | None = None,
    backend: str = "torch",
) -> RSNet:
    """Builds a randomly initialised RS-Net.

    Args:
        arch: resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d,
            resnext101_32x8d, mobilenetv2; resnet18_lq, resnet50_lq, which are quantised (LQ-Nets);
            refinenet18, refinenet50, refinenet101, refinenet152, for segmentation;
            torchvision/NAME or timm/NAME where those are installed; or MODULE:FUNCTION, which is
            called with `num_classes`.
        resolutions: in pixels, strictly descending.
        num_classes: K.
        bn: "private" (one bank per resolution) or "shared" (one bank for all, the paper's
            ablation).
        weight_bits: of a quantised network, 1 to 4, by default 2.
        activation_bits: of a quantised network, 1 to 4 (pre-activation blocks), or 32, the default,
            for activations in full precision (post-activation blocks).
        zero_init_residual: whether gamma of the last batch norm of each residual block begins at 0,
            so that blocks begin as identities, or at 1, for ResNets and RefineNets with activations
            in full precision; None, the default, for 0 in quantised ones and 1 in all others.
        task: "classification" or "segmentation"; by default what the architecture is for, and
            "classification" for networks that are not rsfast's.
        backend: see :meth:`RSNet.use_backend`; not part of what a checkpoint holds.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: if the package of the network is absent.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    task = registry.check_task(arch, task)
    bits = registry.bits_of(arch, weight_bits, activation_bits)
    network = registry.build(arch, num_classes, bits, zero_init_residual)
    # Tests say that rsfast's own convert; to try it out takes seconds at the start of a process.
    known = num_classes if arch in registry.ARCHITECTURES else None
    model = _convert(network, resolutions, bn, backend, arch, known, task)
    if model.num_classes != num_classes:
        raise ValueError(
            f"arch {arch} must make a network with as many outputs as there are classes, "
            f"{num_classes}, got one with {model.num_classes}"
        )
    model.bits = bits
    return model
