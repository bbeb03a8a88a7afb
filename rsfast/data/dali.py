"""The NVIDIA DALI loader: one region decode per image, all levels from it. Only DALI import here.

On a GPU the decoder is the "mixed" one and the resizes run on the device; on a CPU the same graph
runs there. Paths, windows and sizes come from the plan through an external source, so that DALI
draws no random number. A flip is a resize whose region of interest runs from right to left: it
costs nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rsfast.data.folder import exclude_command
from rsfast.data.pil import render
from rsfast.data.plan import TrainBatch, TrainPlan, ValBatch, ValPlan

try:
    import nvidia.dali.fn as fn
    from nvidia.dali import types
    from nvidia.dali.pipeline import Pipeline
except ImportError as error:
    raise ImportError(
        "the dali loader needs NVIDIA DALI: pip install 'rsfast[dali-cuda13]' (or dali-cuda12), "
        "or use --loader pil"
    ) from error

__all__ = ["DaliDecoder"]

_PREFETCH = 2  # batches


class _Feed:
    """A pipeline and the steps it has yet to be told about."""

    def __init__(self, plan: TrainPlan | ValPlan, pipeline: Pipeline) -> None:
        self._plan = plan
        self.pipeline = pipeline
        self.pending: Iterator[tuple[int, int]] = iter(())

    def next_train(self) -> list[list[np.ndarray] | np.ndarray]:
        """Paths, corner and shape of the windows, start and end of the resizes."""
        batch = self._plan.batch(*next(self.pending))
        assert isinstance(batch, TrainBatch)
        windows = batch.windows[:1] if batch.shared_window else batch.windows
        # Relative (y, x) at which the region of a resize starts and ends: x from 0 to 1 upright,
        # from 1 to 0 mirrored.
        start = np.zeros((*batch.flips.shape, 2), dtype=np.float32)
        start[:, :, 1] = batch.flips
        end = np.ones_like(start)
        end[:, :, 1] = ~batch.flips
        return [
            self._paths(batch.images),
            *np.ascontiguousarray(windows[:, :, :2]),
            *np.ascontiguousarray(windows[:, :, 2:]),
            *start,
            *end,
        ]

    def next_val(self) -> list[list[np.ndarray] | np.ndarray]:
        """Paths, sizes after the resize, corners of the crops."""
        batch = self._plan.batch(*next(self.pending))
        assert isinstance(batch, ValBatch)
        return [self._paths(batch.images), *batch.resized.astype(np.float32), *batch.corners]

    def _paths(self, images: np.ndarray) -> list[np.ndarray]:
        index = self._plan.index
        return [np.frombuffer(index.path(i).encode(), dtype=np.uint8) for i in images]


class DaliDecoder:
    """Renders the batches of a plan with DALI.

    Args:
        plan: of training or validation.
        resolutions: r of each level.
        workers: decoder threads.
        device: a CPU, or the GPU that decodes and resizes.
    """

    def __init__(
        self,
        plan: TrainPlan | ValPlan,
        resolutions: Sequence[int],
        *,
        workers: int,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._resolutions = tuple(resolutions)
        self._workers = max(1, workers)
        self._device = device
        self._idle: _Feed | None = None

    def rows(self, epoch: int, steps: range) -> Iterator[Tensor]:
        """[M, 3] uint8 of each step, on the device."""
        # A loop that is left early never comes to the end of this function: its pipeline holds
        # batches that nobody wants, and the next loop builds another one.
        feed, self._idle = self._idle or self._build(), None
        feed.pending = iter([(epoch, step) for step in steps])
        copied = torch.cuda.Event() if self._device.type == "cuda" else None
        for step in steps:
            if copied:
                copied.synchronize()  # DALI writes into its outputs again from here on
            try:
                outputs = feed.pipeline.run()
            except RuntimeError as error:
                # DALI reports a sample number at best, and runs ahead of this step.
                self._name_culprit(epoch, range(step, min(step + _PREFETCH + 2, steps.stop)))
                raise RuntimeError(f"DALI failed at epoch {epoch}, step {step}: {error}") from error
            rows = torch.cat([_as_tensor(level).view(-1, 3) for level in outputs])
            if copied:
                copied.record()
            yield rows
        with contextlib.suppress(StopIteration):
            feed.pipeline.run()
        feed.pipeline.reset()
        self._idle = feed

    def _build(self) -> _Feed:
        gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self._plan.batch_size,
            num_threads=self._workers,
            device_id=self._device.index or 0 if gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        feed = _Feed(self._plan, pipeline)
        train = isinstance(self._plan, TrainPlan)
        with pipeline:
            levels = self._train_graph(feed, gpu) if train else self._val_graph(feed, gpu)
            pipeline.set_outputs(*levels)
        pipeline.build()
        return feed

    def _train_graph(self, feed: _Feed, gpu: bool) -> list:
        count = len(self._resolutions)
        windows = 1 if self._plan.crop == "single" else count
        fields = iter(
            fn.external_source(source=feed.next_train, num_outputs=1 + 2 * windows + 2 * count)
        )
        encoded = fn.io.file.read(next(fields))
        starts, shapes = _take(fields, windows), _take(fields, windows)
        left, right = _take(fields, count), _take(fields, count)
        decoding = {"device": "mixed" if gpu else "cpu", "adjust_orientation": False}
        if windows == 1:
            crop = fn.decoders.image_slice(
                encoded, start=starts[0], shape=shapes[0], axis_names="HW", **decoding
            )
            crops = [crop] * count
        else:
            images = fn.decoders.image(encoded, **decoding)
            crops = [
                fn.slice(images, start=start, shape=shape, axis_names="HW")
                for start, shape in zip(starts, shapes, strict=True)
            ]
        return [
            self._resize(crop, size=(r, r), roi_start=start, roi_end=end, roi_relative=True)
            for crop, r, start, end in zip(crops, self._resolutions, left, right, strict=True)
        ]

    def _val_graph(self, feed: _Feed, gpu: bool) -> list:
        count = len(self._resolutions)
        fields = iter(fn.external_source(source=feed.next_val, num_outputs=1 + 2 * count))
        images = fn.decoders.image(
            fn.io.file.read(next(fields)),
            device="mixed" if gpu else "cpu",
            adjust_orientation=False,
        )
        sizes, corners = _take(fields, count), _take(fields, count)
        return [
            fn.slice(self._resize(images, size=size), start=corner, shape=(r, r), axis_names="HW")
            for size, corner, r in zip(sizes, corners, self._resolutions, strict=True)
        ]

    @staticmethod
    def _resize(images, **geometry):
        # Pillow's bilinear: antialiased, and the scale is that of the whole pixels.
        return fn.resize(
            images,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
            subpixel_scale=False,
            **geometry,
        )

    def _name_culprit(self, epoch: int, steps: range) -> None:
        """Raises an error that names the file which cannot be decoded, if one can be found."""
        batches = [self._plan.batch(epoch, step) for step in steps]
        for batch in batches:
            render(self._plan.index, batch, self._resolutions)
        # Pillow reads them all: the file is one that only DALI refuses.
        index = self._plan.index
        paths = iter([index.paths[i] for batch in batches for i in batch.images])
        current = ""

        def next_path() -> list[np.ndarray]:
            nonlocal current
            current = next(paths)
            return [np.frombuffer(os.path.join(index.root, current).encode(), dtype=np.uint8)]

        pipeline = Pipeline(1, 1, None, prefetch_queue_depth=1, exec_async=False)
        with pipeline:
            encoded = fn.io.file.read(fn.external_source(source=next_path))
            pipeline.set_outputs(fn.decoders.image(encoded))
        try:
            while True:
                pipeline.run()
        except StopIteration:
            return
        except RuntimeError as error:
            raise RuntimeError(
                f"DALI cannot decode {os.path.join(index.root, current)}: {_cause(error)}; to "
                f"leave it out: {exclude_command(index.root, current)}"
            ) from error


def _take(fields: Iterator, count: int) -> list:
    return [next(fields) for _ in range(count)]


def _cause(error: RuntimeError) -> str:
    """What DALI says behind the story of where in the pipeline it happened, in one line."""
    return str(error).rpartition("encountered:")[2].strip().partition("\n")[0]


def _as_tensor(level) -> Tensor:
    """A batch of equal images [N, r, r, 3] as a tensor that shares DALI's memory."""
    return torch.from_dlpack(level.as_tensor())
