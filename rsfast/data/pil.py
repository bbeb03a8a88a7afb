"""The Pillow loader: works everywhere, and is the oracle of what the transforms mean."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rsfast.data.batch import Rendered
from rsfast.data.index import ImageIndex, decode
from rsfast.data.masks import decode_mask
from rsfast.data.pil_operations import operated
from rsfast.data.pixel_plan import (
    PixelPlan,
    PixelTrainPlan,
    PixelValPlan,
    labels_of,
    most_labels,
)
from rsfast.data.plan import TrainBatch, TrainPlan, ValBatch, ValPlan
from rsfast.data.sharing import PREFETCHED, check_shared_memory
from rsfast.files.pictures import BILINEAR, cut
from rsfast.runtime.interrupt import ignore_in_worker

__all__ = ["PillowDecoder", "render"]

_FLIP = Image.Transpose.FLIP_LEFT_RIGHT


def render(
    index: ImageIndex, batch: TrainBatch | ValBatch, resolutions: Sequence[int]
) -> np.ndarray:
    """Decodes and resizes one batch.

    Args:
        index: where the images are.
        batch: what to make of them.
        resolutions: r of each level.

    Returns:
        [M, 3] uint8, the rows of a Pyramid with these levels.

    Raises:
        RuntimeError: naming the file that cannot be decoded, and how to leave it out.
    """
    count = len(batch.images)
    levels = [np.empty((count, r, r, 3), dtype=np.uint8) for r in resolutions]
    for n, position in enumerate(batch.images):
        image = decode(index, position)
        if isinstance(batch, TrainBatch):
            pictures = _train_levels(image, batch, n, resolutions)
        else:
            pictures = _val_levels(image, batch, n, resolutions)
        for level, picture in zip(levels, pictures, strict=True):
            level[n] = np.asarray(picture)
    return np.concatenate([level.reshape(-1, 3) for level in levels])


def _train_levels(
    image: Image.Image, batch: TrainBatch, n: int, resolutions: Sequence[int]
) -> Iterator[Image.Image]:
    crop = None
    for level, r in enumerate(resolutions):
        if crop is None or not batch.shared_window:
            top, left, height, width = batch.windows[level, n].tolist()
            crop = _window(image, (left, top, left + width, top + height), batch.border)
            if batch.operations is not None:
                crop = operated(crop, batch.operations, n)
        picture = crop.resize((r, r), BILINEAR)
        yield picture.transpose(_FLIP) if batch.flips[level, n] else picture


def _window(
    image: Image.Image, box: tuple[int, int, int, int], border: tuple[int, int, int] | None
) -> Image.Image:
    """The part of a picture in a box of left, top, right, bottom, and the border beyond it."""
    if border is None:
        return image.crop(box)
    left, top, right, bottom = box
    window = Image.new("RGB", (right - left, bottom - top), border)
    window.paste(image, (-left, -top))
    return window


def _val_levels(
    image: Image.Image, batch: ValBatch, n: int, resolutions: Sequence[int]
) -> Iterator[Image.Image]:
    for level, r in enumerate(resolutions):
        yield cut(image, batch.resized[level, n], batch.corners[level, n], r)


class _Batches(Dataset):
    """(epoch, step) to the uint8 rows of that batch; one worker renders a whole batch.

    An error about a file is an item, too: torch would hide its sentence in a worker's traceback.
    """

    def __init__(self, plan: TrainPlan | ValPlan, resolutions: Sequence[int]) -> None:
        self.plan = plan
        self.resolutions = resolutions

    def __getitem__(self, at: tuple[int, int]) -> Tensor | Rendered | RuntimeError:
        batch = self.plan.batch(*at)
        try:
            rows = torch.from_numpy(render(self.plan.index, batch, self.resolutions))
            if not isinstance(self.plan, PixelTrainPlan | PixelValPlan):
                return rows
            return Rendered(rows, torch.from_numpy(_labels(self.plan, batch)))
        except RuntimeError as error:
            return error


def _labels(plan: PixelPlan, batch: TrainBatch | ValBatch) -> np.ndarray:
    assert plan.masks is not None
    images = batch.images.tolist()
    return labels_of(plan, batch, (decode_mask(plan.index, plan.masks, n) for n in images))


class PillowDecoder:
    """Renders the batches of a plan in worker processes.

    Args:
        plan: of training or validation.
        resolutions: r of each level.
        workers: processes; 0 renders in this one.
        device: where the rows are wanted; page-locked memory is used on the way to a GPU.

    Raises:
        ValueError: if the batches of the workers do not fit into shared memory.
    """

    def __init__(
        self,
        plan: TrainPlan | ValPlan,
        resolutions: Sequence[int],
        *,
        workers: int,
        device: torch.device,
    ) -> None:
        self._batches = _Batches(plan, tuple(resolutions))
        self._workers = min(workers, plan.steps)
        self._device = device
        pixels = plan.batch_size * sum(r * r for r in resolutions)
        check_shared_memory(self._workers, 3 * pixels + most_labels(plan), plan.steps)

    def rows(self, epoch: int, steps: range) -> Iterator[Tensor | Rendered]:
        """[M, 3] uint8 of each step, on the device; of segmentation with labels on the CPU."""
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=[(epoch, step) for step in steps],
            num_workers=min(self._workers, len(steps)),
            prefetch_factor=PREFETCHED if self._workers else None,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=ignore_in_worker,
            generator=torch.Generator(),  # it draws a seed, which nobody uses, from here
        )
        # What workers inherit is not theirs to clean up: a DALI pipeline among it would wait for
        # threads that a forked process does not have.
        gc.freeze()
        try:
            batches = iter(loader)
        finally:
            gc.unfreeze()
        for rows in batches:
            if isinstance(rows, RuntimeError):
                raise rows
            if isinstance(rows, Rendered):
                yield rows._replace(rows=rows.rows.to(self._device, non_blocking=True))
            else:
                yield rows.to(self._device, non_blocking=True)
