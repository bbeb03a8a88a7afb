"""RSNet: a trunk, one shared classifier, and the choice of batch-norm set per resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rsfast import kernels
from rsfast.models import deploy
from rsfast.models.layers import Conv2d, SwitchableBatchNorm2d, global_avg_pool
from rsfast.models.mobilenetv2 import MobileNetV2
from rsfast.models.resnet import DEPTHS, ResNet
from rsfast.pyramid import Pyramid, check_resolutions

__all__ = ["ARCHITECTURES", "FOLDS", "RSNet", "create_model"]

ARCHITECTURES = (*DEPTHS, "mobilenetv2")
BN_MODES = ("private", "shared")
# Sizes of the convolutions that measure what they write.
FOLDS = {"none": (), "statistics": (1,), "1x1": (1,), "all": (1, 3)}


class RSNet(nn.Module):
    """A resolution switchable network: shared weights, private batch norm per resolution.

    Attributes:
        resolutions: trained resolutions in pixels, descending.
        input_mean, input_std: the normalisation of the input that the weights expect, on values
            in [0, 1], RGB. Loaders apply it; the network does not.
        val_crop: how validation images were cut in training, "center" or "none".
        class_names: names of the classes if known.
        backend: what computes batch norm and pooling, "torch", "triton" or "cuda".
        folded: see :meth:`fold_batch_norm`.
    """

    def __init__(
        self, arch: str, resolutions: Sequence[int], num_classes: int, bn: str = "private"
    ) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {ARCHITECTURES}, got {arch!r}")
        if bn not in BN_MODES:
            raise ValueError(f"bn must be one of {BN_MODES}, got {bn!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.arch = arch
        self.resolutions = check_resolutions(resolutions)
        self.num_classes = num_classes
        self.bn = bn
        self.input_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
        self.input_std: tuple[float, ...] = (1.0, 1.0, 1.0)
        self.val_crop = "center"
        self.class_names: tuple[str, ...] | None = None
        self.backend = "torch"
        self.folded = "none"
        num_banks = len(self.resolutions) if bn == "private" else 1
        self.backbone = MobileNetV2(num_banks) if arch == "mobilenetv2" else ResNet(arch, num_banks)
        self.classifier = nn.Linear(self.backbone.out_channels, num_classes)
        if arch == "mobilenetv2":
            nn.init.normal_(self.classifier.weight, 0.0, 0.01)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Pyramid | Sequence[Tensor]) -> Tensor:
        """Logits of every level.

        Args:
            images: a Pyramid of 3-channel levels (zeros may follow the colours), or a sequence of
                tensors [N, 3, r, r]. Without explicit `banks` each level must have a trained
                resolution, in descending order; levels of one resolution share its set.

        Returns:
            [L, N, K], level by level.

        Raises:
            ValueError: if a level has a resolution that was not trained, or a set is out of range.
        """
        may_be_padded = isinstance(images, Pyramid)
        if not isinstance(images, Pyramid):
            images = Pyramid.pack(images)
        if images.num_channels != 3 and not (may_be_padded and images.num_channels > 3):
            raise ValueError(f"images must have 3 channels (RGB), got {images.num_channels}")
        x = self.backbone(images.with_banks(self._banks_of(images)))
        return self.classifier(global_avg_pool(x, kernels.without_extension(self.backend)))

    def use_backend(self, backend: str) -> RSNet:
        """Chooses what computes batch norm and pooling, and returns the network.

        Args:
            backend: "torch", plain PyTorch on any device; "triton", the fused kernels, for a GPU
                and at most 8 levels; or "cuda", that with training batch norm in CUDA C++, for
                float16 and bfloat16, which cannot be folded.

        Raises:
            ValueError: if there is no such backend, or it cannot be folded and is to be.
        """
        self._check_choice(kernels.check_backend(backend, "cuda"), self.folded)
        self.backend = backend
        for norm in self.batch_norms():
            norm.backend = backend
        for conv in self.convolutions():
            conv.backend = kernels.without_extension(backend)
        return self

    def fold_batch_norm(self, into: str) -> RSNet:
        """Chooses who computes training batch norm, and returns the network.

        Convolutions that take over a part of it save passes over the pixels, in products that are
        Triton's, not the vendor library's (with "statistics" only the forward ones). The stem's
        pooling applies its own then, too. Synced batch norm is not folded.

        Args:
            into: "none"; "statistics", where 1x1 convolutions compute those of what they write;
                "1x1", where they also apply what is pending on what they read; or "all", where 3x3
                convolutions do so as well (not those of the images, and not depthwise ones).

        Raises:
            ValueError: if it is something else.
        """
        if into not in FOLDS:
            raise ValueError(f"into must be one of {tuple(FOLDS)}, got {into!r}")
        self._check_choice(self.backend, into)
        self.folded = into
        synced = any(norm.synced for norm in self.batch_norms())
        sizes = () if synced else FOLDS[into]
        for norm in self.batch_norms():
            norm.deferred = bool(sizes)
        for conv in self.convolutions():
            plain = conv.groups == 1 and conv.in_channels > 3
            conv.measured = plain and conv.kernel_size[0] in sizes
            conv.folded = conv.measured and into != "statistics"
        return self

    def sync_batch_norm(self, synced: bool = True) -> RSNet:
        """Chooses whose statistics normalise in training, and returns the network.

        Args:
            synced: those of all ranks of the default process group, set by set, instead of this
                rank's (the paper's way). For batches too small to have good ones of their own.
        """
        for norm in self.batch_norms():
            norm.synced = synced
        return self.fold_batch_norm(self.folded)

    def at(self, resolution: int, between: str = "interpolate") -> deploy.SingleResolutionNet:
        """A plain, single-resolution copy of the network in eval mode.

        Args:
            resolution: in pixels; any, trained or not.
            between: the batch-norm set of a resolution that was not trained: "interpolate"
                linearly between the two neighbours, or "nearest". Outside the trained range both
                take the nearest set.

        Returns:
            A module of plain torch layers, [N, 3, r, r] -> [N, K], on the network's device.
        """
        return deploy.single_resolution(self, resolution, between)

    def batch_norms(self) -> list[SwitchableBatchNorm2d]:
        """All batch-norm layers, in forward order of construction."""
        return [m for m in self.modules() if isinstance(m, SwitchableBatchNorm2d)]

    def convolutions(self) -> list[Conv2d]:
        """All convolutions, in forward order of construction."""
        return [m for m in self.modules() if isinstance(m, Conv2d)]

    def settings(self) -> dict[str, Any]:
        """The arguments of :func:`create_model` that make this network."""
        return {
            "arch": self.arch,
            "resolutions": self.resolutions,
            "num_classes": self.num_classes,
            "bn": self.bn,
        }

    @staticmethod
    def _check_choice(backend: str, folded: str) -> None:
        if backend == "cuda" and folded != "none":
            raise ValueError(f"batch norm of backend cuda cannot be folded, got {folded!r}")

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
                    f"images of {height}x{width} pixels have no batch-norm set: trained were "
                    f"{self.resolutions}; use at(resolution), or a Pyramid with banks"
                )
            indices.append(self.resolutions.index(height))
        if indices != sorted(indices):
            raise ValueError(
                f"levels must come in descending order of resolution, got {images.sizes}"
            )
        return tuple(indices) if self.bn == "private" else (0,) * len(indices)


def create_model(
    arch: str,
    resolutions: Sequence[int] = (224, 192, 160, 128, 96),
    num_classes: int = 1000,
    bn: str = "private",
    *,
    backend: str = "torch",
) -> RSNet:
    """Builds a randomly initialised RS-Net.

    Args:
        arch: resnet18, resnet34, resnet50, resnet101, resnet152 or mobilenetv2.
        resolutions: in pixels, strictly descending.
        num_classes: K.
        bn: "private" (one set per resolution) or "shared" (one set for all, the paper's ablation).
        backend: see :meth:`RSNet.use_backend`; not part of what a checkpoint holds.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    return RSNet(arch, resolutions, num_classes, bn).use_backend(backend)
