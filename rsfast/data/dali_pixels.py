"""The NVIDIA DALI loader of segmentation: the graph of classification, and masks beside it.

Masks are decoded by DALI's threads on the CPU, also where a GPU decodes the images: they are PNG
files, which no GPU decodes. They are resized here, by the integers of `rsfast.data.masks`, because
DALI's own nearest neighbour computes places in float32, on a GPU in another way than on a CPU. That
takes the main thread 0.1 ms per image at 352 x 352.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rsfast.data.batch import Rendered
from rsfast.data.dali import DaliDecoder, Feed, as_bytes
from rsfast.data.dali_decoding import cause, decoded_masks, first_refused
from rsfast.data.index import ImageIndex, check_size, exclude_command
from rsfast.data.masks import decode_mask
from rsfast.data.pixel_plan import PixelPlan, PixelTrainPlan, PixelValPlan, labels_of
from rsfast.data.plan import TrainPlan, ValPlan

__all__ = ["DaliPixelDecoder"]


class _PixelFeed(Feed):
    """Also says which masks belong to the images."""

    def __init__(self, plan: TrainPlan | ValPlan, workers: int = 1) -> None:
        super().__init__(plan, workers)
        self._steps: Iterator[tuple[int, int]] = iter(())

    def start(self, epoch: int, steps: range) -> None:
        super().start(epoch, steps)
        self._steps = iter([(epoch, step) for step in steps])

    def next_masks(self) -> list[np.ndarray]:
        """Paths of the masks of the next batch."""
        masks = _masks(self._plan)
        images = self._plan.images(*next(self._steps)).tolist()
        return [as_bytes(masks.path(position)) for position in images]


class DaliPixelDecoder(DaliDecoder):
    """Renders the batches of a segmentation plan with DALI; arguments as of `DaliDecoder`."""

    _feed = _PixelFeed

    def __init__(self, plan: PixelPlan, resolutions: Sequence[int], **means: Any) -> None:
        super().__init__(plan, resolutions, **means)
        if isinstance(plan, PixelTrainPlan):
            self._whole_images = True  # a decoder cannot go beyond an image, a slice of it can
            self._beyond = {
                "out_of_bounds_policy": "pad",
                "fill_values": [float(value) for value in plan.border],
            }

    def _more_outputs(self, feed: Feed) -> Sequence:
        assert isinstance(feed, _PixelFeed)
        return (decoded_masks(feed.next_masks, self._dont_use_mmap),)

    def _result(self, pictures: Sequence, epoch: int, step: int, stream: object) -> Rendered:
        *levels, decoded = pictures
        labels = labels_of(
            _pixel_plan(self._plan),
            self._plan.batch(epoch, step),
            self._sized(decoded, epoch, step),
        )
        rows = super()._result(levels, epoch, step, stream)
        assert isinstance(rows, torch.Tensor)
        return Rendered(rows, torch.from_numpy(labels))

    def _sized(self, decoded: Sequence, epoch: int, step: int) -> Iterator[np.ndarray]:
        """[H, W] uint8 of each mask, which must be of the size that is known."""
        masks = _masks(self._plan)
        for position, mask in zip(self._images(epoch, step), decoded, strict=True):
            labels = np.asarray(mask)[:, :, 0]
            check_size(masks, position, labels.shape)
            yield labels

    def _reads_now(self, epoch: int, step: int) -> bool:
        masks = _masks(self._plan)
        are_there = all(masks.read(position) for position in self._images(epoch, step))
        return super()._reads_now(epoch, step) and are_there

    def _explained(self, error: RuntimeError, epoch: int, step: int) -> RuntimeError:
        index, masks = self._plan.index, _masks(self._plan)
        for position in (images := self._images(epoch, step)):
            decode_mask(index, masks, position)  # names what is wrong with it
        if (refused := first_refused(masks, images)) is not None:
            return RuntimeError(
                f"DALI cannot decode mask {masks.name(refused)}: {cause(error)}; to leave its "
                f"image out: {exclude_command(index.known_as, index.name(refused))}"
            )
        return super()._explained(error, epoch, step)


def _pixel_plan(plan: TrainPlan | ValPlan) -> PixelPlan:
    assert isinstance(plan, PixelTrainPlan | PixelValPlan)
    return plan


def _masks(plan: TrainPlan | ValPlan) -> ImageIndex:
    masks = _pixel_plan(plan).masks
    assert masks is not None
    return masks
