"""Figures of a network at every resolution, trained or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsfast.config.flags import DECODING
from rsfast.data import Loader, prefetch, train_loader, val_loader
from rsfast.data.labels import warn_of_numbers
from rsfast.engine import PRECISIONS
from rsfast.models import RSNet
from rsfast.models.deploy import calibrate, multiply_adds
from rsfast.pyramid.convert import bn_mixture
from rsfast.runtime import distributed
from rsfast.runtime.distributed import Rank
from rsfast.tasks import Accuracy, task_of
from rsfast.training.evaluation import Evaluation, Row
from rsfast.training.validation import validate

__all__ = ["Settings", "dtype_of", "evaluate", "val_batches"]

_RESOLUTIONS_PER_PASS = 6  # one decode serves so many; bounds the memory for resized images


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to evaluate, and on which data."""

    data: str | None
    resolutions: tuple[int, ...]
    between: str
    loader: str
    batch_size: int
    workers: int | None
    hw_decoder_load: float | None
    dont_use_mmap: bool
    val_crop: str
    exif: str
    precision: str | None
    calibration_batches: int
    train_data: str | None = None
    val_data: str | None = None
    val_list: str | None = None
    tolerate_truncated: bool = False
    levels: str = "resize"

    @property
    def train_root(self) -> str | None:
        """Where the training images are."""
        return self.train_data or self.data

    @property
    def loading(self) -> dict[str, Any]:
        """What every loader is told."""
        return {
            "backend": self.loader,
            "exif": self.exif,
            "levels": self.levels,
            **{name: getattr(self, name) for name in DECODING},
        }


def evaluate(model: RSNet, alpha: Tensor, settings: Settings, rank: Rank) -> Evaluation:
    """Accuracy at the trained resolutions, of their ensemble, and at the others asked for.

    Args:
        model: on the rank's device.
        alpha: [R] raw ensemble scores.
        settings: what to evaluate.
        rank: this process; images are shared out over all of them.

    Raises:
        ValueError: if the data set has other classes than the network.
    """
    dtype = dtype_of(settings, rank)
    weights = torch.softmax(alpha, dim=0).to(rank.device)
    with distributed.first_rank_first(rank):
        loader = val_batches(model, model.resolutions, settings, rank)
    accuracy = validate(model, weights, prefetch(loader, rank.device), dtype, loader.num_images)
    found = list(zip(_trained_rows(model, accuracy), accuracy.images, strict=False))
    all_levels = sum(row.multiply_adds for row, _ in found)
    extra = sorted(set(settings.resolutions) - set(model.resolutions), reverse=True)
    for start in range(0, len(extra), _RESOLUTIONS_PER_PASS):
        group = extra[start : start + _RESOLUTIONS_PER_PASS]
        found += _untrained_rows(model, group, settings, rank, dtype)
    found.sort(key=lambda pair: int(pair[0].resolution), reverse=True)
    worth = _figures(model, accuracy.ensemble)
    ensemble = Row("ensemble", True, "all banks", all_levels, _count(model), worth)
    rows, images = zip(*found, (ensemble, accuracy.images[-1]), strict=True)
    return Evaluation(list(rows), torch.stack(images), accuracy.shares, loader.plan.index)


def dtype_of(settings: Settings, rank: Rank) -> torch.dtype | None:
    """Of autocast; None for float32."""
    if settings.precision:
        return PRECISIONS[settings.precision]
    return torch.bfloat16 if rank.device.type == "cuda" else None


def val_batches(
    model: RSNet, resolutions: Sequence[int], settings: Settings, rank: Rank, limit: int = 0
) -> Loader:
    """The validation images at these resolutions, as the network wants them.

    Args:
        model: whose images they are.
        resolutions: in pixels, descending.
        settings: what to evaluate, and on which data.
        rank: this process, which gets its share of the images.
        limit: take so many images only, evenly spaced; 0 for all.

    Raises:
        ValueError: if the data set has other classes than the network.
    """
    loader = val_loader(
        settings.val_data or settings.data,
        resolutions,
        settings.batch_size,
        normalize=(model.input_mean, model.input_std),
        crop=settings.val_crop,
        picked_from=model.picked_from or model.resolutions[0],
        labels=settings.val_list,
        rank=rank.index,
        world_size=rank.world_size,
        device=rank.device,
        limit=limit,
        **_of_masks(model),
        **settings.loading,
    )
    names, known = loader.class_names, model.class_names
    if len(names) != model.num_classes or (known and names != known):
        wanted = f" ({', '.join(known[:3])}, ...)" if known else ""
        raise ValueError(
            f"data folder {settings.val_data or settings.data} must have the {model.num_classes} "
            f"classes of the checkpoint{wanted}, got {len(names)} ({', '.join(names[:3])}, ...)"
        )
    warn_of_numbers(settings.val_data or settings.data, () if known else names)
    return loader


def _trained_rows(model: RSNet, accuracy: Accuracy) -> list[Row]:
    singles = {r: model.at(r) for r in model.resolutions}
    origin = "own bank" if model.bn == "private" else "shared bank"
    return [
        Row(r, True, origin, multiply_adds(net, r), _count(net), _figures(model, values))
        for (r, net), values in zip(singles.items(), accuracy.levels, strict=True)
    ]


@torch.no_grad()
def _untrained_rows(
    model: RSNet,
    resolutions: Sequence[int],
    settings: Settings,
    rank: Rank,
    dtype: torch.dtype | None,
) -> list[tuple[Row, Tensor]]:
    between = "nearest" if settings.between == "nearest" else "interpolate"
    nets = [model.at(r, between) for r in resolutions]
    if settings.between == "calibrate":
        for net, resolution in zip(nets, resolutions, strict=True):
            calibrate(net, _calibration_images(model, resolution, settings, rank))
    loader = val_batches(model, resolutions, settings, rank)
    scores = task_of(model).scores_of(model, len(nets), rank.device, num_images=loader.num_images)
    for batch in prefetch(loader, rank.device):
        levels = zip(nets, batch.images.levels(), strict=True)
        with torch.autocast(rank.device.type, dtype, enabled=dtype is not None):
            logits = [net(level) for net, level in levels]
        scores.add(logits, batch)
    accuracy = scores.read()
    rows = [
        Row(
            resolution,
            False,
            _origin(model, resolution, settings.between),
            multiply_adds(net, resolution),
            _count(net),
            _figures(model, values),
        )
        for resolution, net, values in zip(resolutions, nets, accuracy.levels, strict=True)
    ]
    return list(zip(rows, accuracy.images, strict=True))


def _calibration_images(
    model: RSNet, resolution: int, settings: Settings, rank: Rank
) -> Iterator[Tensor]:
    """The same training images on every rank, so that all ranks end with one network."""
    if settings.train_root is None:
        raise ValueError("--between calibrate needs training images: add --data or --train-data")
    loader = train_loader(
        settings.train_root,
        (resolution,),
        settings.batch_size,
        device=rank.device,
        normalize=(model.input_mean, model.input_std),
        picked_from=model.picked_from or model.resolutions[0],
        max_steps=settings.calibration_batches,
        **_of_masks(model),
        **settings.loading,
    )
    return (batch.images.level(0) for batch in loader)


def _of_masks(model: RSNet) -> dict[str, Any]:
    """What a loader has to know of segmentation."""
    if model.task == "classification":
        return {}
    names = ("task", "ignore_label", "num_classes")
    return {name: getattr(model, name) for name in names}


def _origin(model: RSNet, resolution: int, between: str) -> str:
    if between == "calibrate":
        return "calibrated"
    if model.bn == "shared":
        return "shared bank"
    mixture = bn_mixture(model.resolutions, resolution, between)
    if len(mixture) == 1:
        return f"bank of {model.resolutions[mixture[0][0]]}"
    return " + ".join(f"{share:.2f} x {model.resolutions[bank]}" for bank, share in mixture)


def _figures(model: RSNet, values: Sequence[float]) -> dict[str, float]:
    return dict(zip(task_of(model).figures, values, strict=True))


def _count(net: torch.nn.Module) -> int:
    return sum(param.numel() for param in net.parameters())
