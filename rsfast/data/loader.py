"""Batches of pyramids: a plan, a decoder that renders it, and the normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rsfast import kernels
from rsfast.data.augment import NOTHING, Augment
from rsfast.data.batch import Batch, Rendered
from rsfast.data.decoding import Decoding, decoding
from rsfast.data.index import SPLITS
from rsfast.data.masks import IGNORE_LABEL
from rsfast.data.mixing import Mix, erase, mixed, shift_colours
from rsfast.data.normalizations import NORMALIZATIONS, normalization
from rsfast.data.opening import BACKENDS, Opening
from rsfast.data.picking import Picking, check_levels
from rsfast.data.pil import PillowDecoder
from rsfast.data.pixel_plan import PixelTrainPlan, PixelValPlan, border_of, label_sizes
from rsfast.data.plan import TrainPlan, ValPlan
from rsfast.data.synthetic import SyntheticDecoder
from rsfast.files.task_names import TASKS
from rsfast.pyramid import Pyramid, check_resolutions

__all__ = ["BACKENDS", "NORMALIZATIONS", "Batch", "Loader", "Mix", "train_loader", "val_loader"]


class Decoder(Protocol):
    """What a backend must be able to do."""

    def rows(self, epoch: int, steps: range) -> Iterator[Tensor | Rendered]:
        """[M, 3] uint8 of each step, on the loader's device; of segmentation with labels."""


class Loader:
    """An iterable of batches; each iteration is one epoch, and the next one follows it.

    Attributes:
        plan: which images and windows each step has.
        resolutions: r of each level, in pixels.
        class_names: names of the labels.
        mean, std: the normalisation applied.
        epoch: the epoch that the next iteration yields; set it to jump.
        first_step: where in that epoch it starts, by default at 0; set it to continue one.
        dtype: of the images.
        channels: of the images; above 3, zeros follow the colours.
        backend: what normalises them, "torch" or "triton".
    """

    def __init__(
        self,
        plan: TrainPlan | ValPlan,
        decoder: Decoder,
        picking: Picking,
        normalization: tuple[Sequence[float], Sequence[float]],
        device: torch.device,
        max_steps: int = 0,
    ) -> None:
        self.plan = plan
        self.resolutions = picking.resolutions
        self.class_names = plan.index.class_names
        self.mean, self.std = (tuple(part) for part in normalization)
        self.epoch = 0
        self.first_step = 0
        self.dtype = torch.float32
        self.channels = 3
        self.backend = "torch"
        self._decoder = decoder
        self._picking = picking
        self._device = device
        self._steps = min(plan.steps, max_steps or plan.steps)

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return self._steps

    @property
    def num_images(self) -> int:
        """Images in the data set, over all ranks."""
        return len(self.plan.index)

    def feed(self, dtype: torch.dtype, channels: int, backend: str) -> Loader:
        """Chooses what a network is fed, and returns the loader.

        Args:
            dtype: of the images; float32 unless the first convolution would cast it anyway.
            channels: of the images, at least 3.
            backend: "torch", or "triton" for the fused kernel on a GPU.

        Raises:
            ValueError: if there is no such backend.
        """
        self.dtype, self.channels = dtype, channels
        self.backend = kernels.check_backend(backend)
        return self

    def __iter__(self) -> Iterator[Batch]:
        epoch, steps = self.epoch, range(self.first_step, len(self))
        self.first_step = 0
        for step, rendered in zip(
            steps, self._decoder.rows(epoch, steps) if steps else (), strict=True
        ):
            indices = self.plan.images(epoch, step)
            if isinstance(rendered, Rendered):
                rows, labels = rendered
            else:
                rows, labels = rendered, torch.from_numpy(self.plan.index.labels[indices])
            rows = self._picking(rows, len(indices))
            blends = self.plan.blends(epoch, step) if isinstance(self.plan, TrainPlan) else None
            mix = None
            if blends is not None:
                rows, mix = mixed(rows, self.resolutions, labels.numpy(), blends)
            if self._device.type == "cuda":  # a copy of other memory waits for the stream
                labels = labels.pin_memory()
            rows = kernels.normalize(
                rows,
                self.mean,
                self.std,
                dtype=self.dtype,
                channels=self.channels,
                backend=self.backend,
            )
            if isinstance(self.plan, TrainPlan):
                shifts = self.plan.colour_shifts(epoch, step)
                shift_colours(rows, self.resolutions, shifts, self.std)
                erase(rows, self.resolutions, self.plan.erasures(epoch, step))
            labels, masks = self._shaped(labels.to(self._device, non_blocking=True), indices)
            yield Batch(
                images=Pyramid(
                    rows=rows,
                    sizes=tuple((r, r) for r in self.resolutions),
                    num_images=len(indices),
                ),
                labels=labels,
                indices=torch.from_numpy(indices),
                mix=mix,
                masks=masks,
            )
        self.epoch = epoch + 1

    def _shaped(
        self, labels: Tensor, indices: np.ndarray
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Labels and masks as a batch has them, of the labels on the device."""
        if isinstance(self.plan, PixelTrainPlan):
            return labels.view(len(indices), self.plan.resolution, self.plan.resolution), None
        if not isinstance(self.plan, PixelValPlan):
            return labels, None
        sizes = label_sizes(self.plan, indices)
        parts = labels.split([height * width for height, width in sizes])
        masks = (part.view(size) for part, size in zip(parts, sizes, strict=True))
        return labels[:0], tuple(masks)


def train_loader(
    root: str | Path | None,
    resolutions: Sequence[int],
    batch_size: int,
    *,
    task: str = "classification",
    scale: tuple[float, float] = (0.5, 2.0),
    ignore_label: int = IGNORE_LABEL,
    backend: str = "dali",
    copies: int = 1,
    crop: str = "single",
    flip: str = "shared",
    levels: str = "resize",
    picked_from: int | None = None,
    normalize: str | tuple[Sequence[float], Sequence[float]] = "imagenet",
    seed: int = 0,
    crop_area: tuple[float, float] = (0.08, 1.0),
    augment: Augment = NOTHING,
    exif: str = "ignore",
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
    hw_decoder_load: float | None = None,
    dont_use_mmap: bool = False,
    device: torch.device | str = "cpu",
    max_steps: int = 0,
    limit: int = 0,
    num_images: int = 1_281_167,
    num_classes: int | None = None,
    strict: bool = False,
    tolerate_truncated: bool = False,
) -> Loader:
    """Shuffled training batches: one decode, one window and one flip per image, R resizes.

    Args:
        root: folder with train/ (one sub-folder per class, or archives), or a pattern of archives,
            as :func:`rsfast.data.open_split` takes them; for segmentation a folder with train/ and
            trainannot/, as :func:`rsfast.data.open_pairs` does; ignored by "synthetic".
        resolutions: r of each level in pixels, strictly descending.
        batch_size: N per rank; every batch is full.
        task: "classification", or "segmentation", whose windows are squashed to r x r and may reach
            beyond the image, where pixels have the mean colour of the normalisation and labels are
            ignored.
        scale: range of the scale of windows of segmentation, which is log-uniform: 1 shows the
            image whole, 2 a half of each side, and 0.5 as much around it as it has itself.
        ignore_label: of pixels that do not count, from 0 to 255.
        backend: "dali", "pil" or "synthetic" (the same random batch at every step).
        copies: levels of each resolution, one after the other.
        crop: "single" window for all levels, or "multi": an independent one for each.
        flip: horizontal, p = 0.5: "shared" by the levels, "independent", or "none".
        levels: "resize" the window to each, or "nearest": to the largest only, from whose pixels
            smaller ones are picked; for one window and one flip.
        picked_from: resolution that "nearest" picks from; None for the largest of these.
        normalize: "imagenet", "none" (plain [0, 1]), or (mean, std) of RGB values in [0, 1].
        seed: of order, windows and flips.
        crop_area: range of the window's share of the image's area.
        augment: what else happens to the images.
        exif: "ignore" the orientation that EXIF has, or "honour" it, and turn images so.
        rank, world_size: which part of each step this process gets.
        workers: decoder threads (dali) or processes (pil; 0 decodes in this one); None for
            the cores of this process, at most 32.
        hw_decoder_load: share of the JPEG images that a GPU's own JPEG decoder takes (dali); None
            for 0.65, or 0.9 with fewer than 8 workers.
        dont_use_mmap: read files plainly instead of mapping them into memory (dali): better on most
            network file systems.
        device: where batches are wanted; on a GPU, DALI decodes there.
        max_steps: end epochs after so many batches; 0 for whole epochs.
        limit: take so many images only, evenly spaced over the data set; 0 for all.
        num_images: size of the synthetic data set.
        num_classes: of the synthetic data set, by default 1000, or 40 of segmentation; of any other
            of segmentation, as :func:`rsfast.data.open_pairs` takes it.
        strict, tolerate_truncated: as in :func:`rsfast.data.index_folder`.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: with the install command, if DALI is asked for and absent.
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    check_levels(levels, crop, flip)
    if _is_segmentation(task):
        _refuse_picking(levels)
    resolutions = [r for r in check_resolutions(resolutions) for _ in range(copies)]
    picking = Picking(levels, resolutions, picked_from, device)
    if max_steps < 0:
        raise ValueError(f"max_steps must be at least 0, got {max_steps}")
    opening = Opening(
        root=root,
        split="train",
        backend=backend,
        limit=limit,
        num_images=num_images,
        num_classes=num_classes,
        exif=exif,
        strict=strict,
        tolerate_truncated=tolerate_truncated,
    )
    common: dict[str, Any] = {
        "num_levels": len(picking.resized),
        "batch_size": batch_size,
        "rank": rank,
        "world_size": world_size,
        "seed": seed,
        "crop": crop,
        "flip": flip,
        "crop_area": crop_area,
        "augment": augment,
    }
    if _is_segmentation(task):
        index, masks = opening.pairs(ignore_label)
        border = border_of(normalization(normalize)[0])
        common |= {"resolution": max(resolutions), "scale": scale, "ignore_label": ignore_label}
        plan: TrainPlan = PixelTrainPlan(index=index, masks=masks, border=border, **common)
    else:
        plan = TrainPlan(index=opening.images(), **common)
    means = decoding(workers, hw_decoder_load, dont_use_mmap)
    return _loader(plan, picking, backend, normalize, means, torch.device(device), max_steps)


def val_loader(
    root: str | Path | None,
    resolutions: Sequence[int],
    batch_size: int,
    *,
    task: str = "classification",
    ignore_label: int = IGNORE_LABEL,
    backend: str = "dali",
    normalize: str | tuple[Sequence[float], Sequence[float]] = "imagenet",
    crop: str = "center",
    levels: str = "resize",
    picked_from: int | None = None,
    split: str = "val",
    exif: str = "ignore",
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
    hw_decoder_load: float | None = None,
    dont_use_mmap: bool = False,
    device: torch.device | str = "cpu",
    limit: int = 0,
    num_images: int = 50_000,
    num_classes: int | None = None,
    strict: bool = False,
    tolerate_truncated: bool = False,
    labels: str | None = None,
) -> Loader:
    """Validation batches: every image exactly once over all ranks, the last batch may be smaller.

    Args:
        root: folder with val/ (one sub-folder per class, or archives), or a pattern of archives, as
            :func:`rsfast.data.open_split` takes them; for segmentation a folder with val/ and
            valannot/; ignored by "synthetic".
        resolutions: r of each level in pixels, in any order.
        batch_size: N per rank at most.
        task, ignore_label: as in :func:`train_loader`. Segmentation squashes the whole image to
            r x r, whatever `crop` says, and leaves masks as they are.
        backend: as in :func:`train_loader`.
        normalize: "imagenet", "none", or (mean, std) of RGB values in [0, 1].
        crop: "center" (shorter side to int(r / 0.875), then r x r) or "none" (straight to r x r).
        levels, picked_from: as in :func:`train_loader`; what is picked is the whole crop.
        split: "val", or "train" for training images prepared like these.
        exif, rank, world_size, workers, hw_decoder_load, dont_use_mmap, device, limit: as in
            :func:`train_loader`.
        num_images, num_classes: as in :func:`train_loader`.
        strict, tolerate_truncated: as in :func:`rsfast.data.index_folder`.
        labels: list of the labels of a folder without class folders.

    Raises:
        ValueError: naming the argument, the rule and the value.
        ImportError: with the install command, if DALI is asked for and absent.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if _is_segmentation(task):
        _refuse_picking(levels)
    picking = Picking(levels, resolutions, picked_from, device)
    opening = Opening(
        root=root,
        split=split,
        backend=backend,
        limit=limit,
        num_images=num_images,
        num_classes=num_classes,
        exif=exif,
        strict=strict,
        tolerate_truncated=tolerate_truncated,
    )
    common: dict[str, Any] = {
        "resolutions": tuple(picking.resized),
        "batch_size": batch_size,
        "rank": rank,
        "world_size": world_size,
    }
    if _is_segmentation(task):
        if labels is not None:
            raise ValueError(f"labels of segmentation are masks and no list, got {labels}")
        index, masks = opening.pairs(ignore_label)
        plan: ValPlan = PixelValPlan(index=index, masks=masks, **common)
    else:
        plan = ValPlan(index=opening.images(labels), crop=crop, **common)
    means = decoding(workers, hw_decoder_load, dont_use_mmap)
    return _loader(plan, picking, backend, normalize, means, torch.device(device))


def _is_segmentation(task: str) -> bool:
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    return task == "segmentation"


def _refuse_picking(levels: str) -> None:
    if levels != "resize":
        raise ValueError(f"levels must be resize for segmentation, got {levels!r}")


def _loader(
    plan: TrainPlan | ValPlan,
    picking: Picking,
    backend: str,
    normalize: str | tuple[Sequence[float], Sequence[float]],
    means: Decoding,
    device: torch.device,
    max_steps: int = 0,
) -> Loader:
    decoder: Decoder
    if backend == "synthetic":
        decoder = SyntheticDecoder(plan, picking.resized, device=device)
    elif backend == "pil":
        decoder = PillowDecoder(plan, picking.resized, workers=means.workers, device=device)
    elif isinstance(plan, PixelTrainPlan | PixelValPlan):
        from rsfast.data.dali_pixels import DaliPixelDecoder

        decoder = DaliPixelDecoder(plan, picking.resized, device=device, **means._asdict())
    else:
        from rsfast.data.dali import DaliDecoder  # the only optional package

        decoder = DaliDecoder(plan, picking.resized, device=device, **means._asdict())
    return Loader(plan, decoder, picking, normalization(normalize), device, max_steps)
