"""The NVIDIA DALI loader: one decode per image, all levels from it.

On a GPU the decoder is the "mixed" one and the resizes run on the device; on a CPU the same graph
runs there. Paths, windows and sizes come from the plan through an external source, so that DALI
draws no random number. A flip is a resize whose region of interest runs from right to left: it
costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsfast.data.ahead import read_ahead
from rsfast.data.batch import Rendered
from rsfast.data.index import check_size, decode, exclude_command, size_now
from rsfast.data.plan import TrainBatch, TrainPlan, ValBatch, ValPlan
from rsfast.data.reading import ReadingError
from rsfast.files.pictures import thin_parts

_OLDEST = (2, 2)  # before it, decoders do not know adjust_orientation
_INSTALL = "pip install -e '.[dali-cuda13]' (or dali-cuda12) in the clone, or use --loader pil"

try:
    import nvidia.dali as dali
    import nvidia.dali.fn as fn
    from nvidia.dali import types
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.plugin.pytorch import feed_ndarray

    from rsfast.data.dali_decoding import OneByOne, cause, decoded, first_refused
    from rsfast.data.dali_operations import fields_of, num_fields, operated
except ImportError as error:
    raise ImportError(f"the dali loader needs NVIDIA DALI: {_INSTALL}") from error

if tuple(map(int, re.findall(r"\d+", dali.__version__)[:2])) < _OLDEST:
    raise ImportError(
        f"the dali loader needs NVIDIA DALI {'.'.join(map(str, _OLDEST))} or later, "
        f"{dali.__version__} is installed: {_INSTALL}"
    )

__all__ = ["DaliDecoder", "Feed", "OneByOne", "as_bytes"]

_PREFETCH = 2  # batches
# What DALI says when a file is the culprit: that a sample could not be decoded, or a status of
# nvImageCodec that readers of headers have. All else, such as a lack of memory, has other causes.
_SAMPLE = re.compile(r"Failed to decode sample #(\d+)")
_HEADER = re.compile(r"nvImageCodec failure: '#(2|3|4|8|9|13|14|17|18|19)'")
_READ = re.compile("Error in CPU operator `nvidia.dali.fn.io.file.read`")
_READ_TRIES = 3  # of a step whose files DALI could not read, and we can


class Feed:
    """What a pipeline has yet to be told of a plan.

    The pipeline refers to it, and it does not refer back: a pipeline that a loop leaves behind ends
    at once, and its threads and memory do not wait for the garbage collector.
    """

    def __init__(self, plan: TrainPlan | ValPlan, workers: int = 1) -> None:
        self._plan = plan
        self._workers = workers
        self._pending: Iterator[tuple[int, int]] = iter(())
        self._encoded: Generator[list[np.ndarray]] | None = None

    def start(self, epoch: int, steps: range) -> None:
        """Says which batches are next; images in archives are read ahead of them."""
        self._pending = iter([(epoch, step) for step in steps])
        if self._plan.index.archive is not None:
            images = (self._plan.images(epoch, step) for step in steps)
            self._encoded = read_ahead(self._plan.index, images, self._workers)

    def stop(self) -> None:
        """Ends the threads that read ahead, and lets go of what they have read."""
        if self._encoded is not None:
            self._encoded.close()
            self._encoded = None

    def next_train(self) -> list[list[np.ndarray] | np.ndarray]:
        """Images, corner and shape of the windows, start and end of the resizes, operations."""
        batch = self._plan.batch(*next(self._pending))
        assert isinstance(batch, TrainBatch)
        windows = batch.windows[:1] if batch.shared_window else batch.windows
        # Relative (y, x) at which the region of a resize starts and ends: x from 0 to 1 upright,
        # from 1 to 0 mirrored.
        start = np.zeros((*batch.flips.shape, 2), dtype=np.float32)
        start[:, :, 1] = batch.flips
        end = np.ones_like(start)
        end[:, :, 1] = ~batch.flips
        return [
            self._images(batch.images),
            *np.ascontiguousarray(windows[:, :, :2]),
            *np.ascontiguousarray(windows[:, :, 2:]),
            *start,
            *end,
            *(fields_of(batch.operations, windows[:, :, 2:]) if batch.operations else ()),
        ]

    def next_val(self) -> list[list[np.ndarray] | np.ndarray]:
        """Images, start and end of the resizes, sizes after them, corners of the crops."""
        plan, batch = self._plan, self._plan.batch(*next(self._pending))
        assert isinstance(plan, ValPlan)
        assert isinstance(batch, ValBatch)
        sizes = plan.index.sizes[batch.images]
        resized, corners = batch.resized.astype(np.float32), batch.corners.copy()
        starts, ends = np.empty_like(resized), np.empty_like(resized)
        for level, r in enumerate(plan.resolutions):
            thin, starts[level], ends[level] = thin_parts(
                sizes, batch.resized[level], batch.corners[level], r
            )
            resized[level, thin], corners[level, thin] = r, 0
        return [self._images(batch.images), *starts, *ends, *resized, *corners]

    def _images(self, images: np.ndarray) -> list[np.ndarray]:
        """Paths of the images; the images themselves if they lie in an archive."""
        index = self._plan.index
        if index.archive is not None:
            assert self._encoded is not None
            return next(self._encoded)
        return [as_bytes(index.path(i)) for i in images]


class _UnreadError(RuntimeError):
    """DALI could not read a file."""


class _Running(NamedTuple):
    """A pipeline and what feeds it."""

    pipeline: Pipeline
    feed: Feed


class DaliDecoder:
    """Renders the batches of a plan with DALI.

    Args:
        plan: of training or validation.
        resolutions: r of each level.
        workers: decoder threads.
        device: a CPU, or the GPU that decodes and resizes.
        hw_decoder_load: share of the JPEG images that the GPU's own JPEG decoder takes; the threads
            decode the others.
        dont_use_mmap: read files plainly instead of mapping them into memory.
    """

    _feed = Feed

    def __init__(
        self,
        plan: TrainPlan | ValPlan,
        resolutions: Sequence[int],
        *,
        workers: int,
        device: torch.device,
        hw_decoder_load: float,
        dont_use_mmap: bool,
    ) -> None:
        self._plan = plan
        self._resolutions = tuple(resolutions)
        self._workers = max(1, workers)
        self._device = device
        self._on_gpu = device.type == "cuda"
        # nvImageCodec 0.9, which DALI 2.3 and 2.4 bring, crashes when a GPU decodes regions (its
        # issue 55), and a GPU's own JPEG decoder decodes whole images anyway.
        self._whole_images = self._on_gpu
        self._beyond: dict[str, Any] = {}  # what a window has that reaches beyond its image
        self._hw_decoder_load = hw_decoder_load
        self._dont_use_mmap = dont_use_mmap
        self._idle: _Running | None = None

    def rows(self, epoch: int, steps: range) -> Iterator[Tensor | Rendered]:
        """[M, 3] uint8 of each step, on the device; of segmentation with labels on the CPU."""
        # A loop that is left early never comes to the end of this function: its pipeline holds
        # batches that nobody wants, and the next loop builds another one.
        running, self._idle = self._idle or self._build(), None
        try:
            running.feed.start(epoch, steps)
            for place, step in enumerate(steps):
                for tries_left in reversed(range(_READ_TRIES)):
                    try:
                        rows = self._render(running.pipeline, epoch, step)
                        break
                    except _UnreadError as error:  # nothing can be had from this pipeline any more
                        if not (tries_left and self._reads_now(epoch, step)):
                            raise self._explained(error, epoch, step) from error
                        running.feed.stop()
                        running = self._build()
                        running.feed.start(epoch, steps[place:])
                yield rows
            with contextlib.suppress(StopIteration):
                running.pipeline.run()
            running.pipeline.reset()
            self._idle = running
        finally:
            # DALI holds the feed in a cycle, and the threads would wait for the garbage collector.
            running.feed.stop()

    def _render(self, pipeline: Pipeline, epoch: int, step: int) -> Tensor | Rendered:
        stream = torch.cuda.current_stream(self._device) if self._on_gpu else None
        try:
            *pictures, shapes = pipeline.run(stream)
        except ReadingError:
            raise
        except RuntimeError as error:
            if _READ.search(str(error)):
                raise _UnreadError(*error.args) from error
            raise self._explained(error, epoch, step) from error
        # The shapes are those of the files' headers, and lie on the host: nothing is waited for.
        for position, size in zip(
            self._images(epoch, step), np.asarray(shapes.as_tensor()), strict=True
        ):
            check_size(self._plan.index, position, tuple(size[:2].tolist()))
        return self._result(pictures, epoch, step, stream)

    def _result(
        self, pictures: Sequence, epoch: int, step: int, stream: object
    ) -> Tensor | Rendered:
        """What one step yields, of what the graph has put out before the shapes."""
        return _packed(pictures, self._resolutions, self._device, stream)

    def _build(self) -> _Running:
        feed = self._feed(self._plan, self._workers)
        pipeline = self._define(feed)
        try:
            pipeline.build()
        except RuntimeError as error:
            raise RuntimeError(
                f"DALI cannot start on {self._device} with {self._workers} threads: "
                f"{cause(error)}; --loader pil does without DALI"
            ) from error
        return _Running(pipeline, feed)

    def _define(self, feed: Feed) -> Pipeline:
        """The graph; nothing of it runs yet, and no GPU is needed."""
        gpu = self._device.index
        if self._on_gpu and gpu is None:
            gpu = torch.cuda.current_device()
        pipeline = Pipeline(
            batch_size=self._plan.batch_size,
            num_threads=self._workers,
            device_id=gpu if self._on_gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        train = isinstance(self._plan, TrainPlan)
        with pipeline:
            levels, encoded = self._train_graph(feed) if train else self._val_graph(feed)
            turns = self._plan.index.exif == "honour"
            shapes = fn.peek_image_shape(encoded, adjust_orientation=turns)
            pipeline.set_outputs(*levels, *self._more_outputs(feed), shapes)
        return pipeline

    def _more_outputs(self, feed: Feed) -> Sequence:
        """Of the graph, besides the pictures of each level."""
        return ()

    def _train_graph(self, feed: Feed) -> tuple[list, Any]:
        """The pictures of each level, and the files that they are decoded from."""
        count = len(self._resolutions)
        assert isinstance(self._plan, TrainPlan)
        windows = 1 if self._plan.crop == "single" else count
        number, magnitude = self._plan.augment.rand_augment or (0, 0)
        told = 1 + 2 * windows + 2 * count + num_fields(number, windows)
        fields = iter(fn.external_source(source=feed.next_train, num_outputs=told))
        encoded = self._read(next(fields))
        starts, shapes = _take(fields, windows), _take(fields, windows)
        left, right = _take(fields, count), _take(fields, count)
        if windows == 1 and not self._whole_images:
            regions = [self._decode(encoded, start=starts[0], shape=shapes[0])]
        else:
            images = self._decode(encoded)
            regions = [
                fn.slice(images, start=start, shape=shape, axis_names="HW", **self._beyond)
                for start, shape in zip(starts, shapes, strict=True)
            ]
        if number:
            regions = operated(regions, list(fields), magnitude, self._on_gpu)
        crops = regions * count if windows == 1 else regions
        levels = [
            self._resize(crop, size=(r, r), roi_start=start, roi_end=end, roi_relative=True)
            for crop, r, start, end in zip(crops, self._resolutions, left, right, strict=True)
        ]
        return levels, encoded

    def _val_graph(self, feed: Feed) -> tuple[list, Any]:
        """The pictures of each level, and the files that they are decoded from."""
        count = len(self._resolutions)
        fields = iter(fn.external_source(source=feed.next_val, num_outputs=1 + 4 * count))
        encoded = self._read(next(fields))
        images = self._decode(encoded)
        starts, ends = _take(fields, count), _take(fields, count)
        sizes, corners = _take(fields, count), _take(fields, count)
        pictures = [
            self._resize(images, size=size, roi_start=start, roi_end=end)
            for size, start, end in zip(sizes, starts, ends, strict=True)
        ]
        levels = [
            fn.slice(picture, start=corner, shape=(r, r), axis_names="HW")
            for picture, corner, r in zip(pictures, corners, self._resolutions, strict=True)
        ]
        return levels, encoded

    def _read(self, images):
        """Encoded images, of their paths; those of an archive are there already."""
        if self._plan.index.archive is not None:
            return images
        return fn.io.file.read(images, dont_use_mmap=self._dont_use_mmap)

    def _decode(self, encoded, **region):
        """Whole images, or the part of each that lies in a region."""
        device = "mixed" if self._on_gpu else "cpu"
        load, turns = self._hw_decoder_load, self._plan.index.exif == "honour"
        return decoded(encoded, device, hw_decoder_load=load, adjust_orientation=turns, **region)

    def _resize(self, images, **geometry):
        # Pillow's bilinear: antialiased, and the scale is that of the whole pixels.
        return fn.resize(
            images,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
            subpixel_scale=False,
            # A GPU resizes so many images at a time, with two copies and two kernels. The default,
            # 32, would make 160 launches of five levels of 256 images; the whole batch makes 20,
            # and holds 12 * r bytes for each row of pixels of its images meanwhile.
            minibatch_size=self._plan.batch_size,
            **geometry,
        )

    def _images(self, epoch: int, step: int) -> list[int]:
        return self._plan.images(epoch, step).tolist()

    def _reads_now(self, epoch: int, step: int) -> bool:
        """Reads the files of a step, with patience; whether there is something in each.

        Raises:
            RuntimeError: naming the file that cannot be read.
        """
        return all(self._plan.index.read(position) for position in self._images(epoch, step))

    def _explained(self, error: RuntimeError, epoch: int, step: int) -> RuntimeError:
        """Names the file that is to blame, where DALI says that one is, or one has changed."""
        index, images = self._plan.index, self._images(epoch, step)
        failed = f"DALI failed at epoch {epoch}, step {step}: {cause(error)}"
        for position in images:  # a window may lie outside of an image that has shrunk
            if (size := size_now(index, position)) is not None:
                check_size(index, position, size)
        if sample := _SAMPLE.search(str(error)):
            images = images[int(sample[1]) :][:1]
        elif not (_HEADER.search(str(error)) or _READ.search(str(error))):
            return RuntimeError(failed)
        for position in images:
            decode(index, position)  # Pillow knows the reason, and names the file
        # Pillow reads them all: the file is one that only DALI refuses.
        culprit = images[0] if sample else first_refused(index, images)
        if culprit is None:
            mapped = _READ.search(str(error)) and not self._dont_use_mmap
            remedy = "; --dont-use-mmap does not map files into memory" if mapped else ""
            return RuntimeError(failed + remedy)
        return RuntimeError(
            f"DALI cannot decode {index.name(culprit)}: {cause(error)}; to leave it out: "
            f"{exclude_command(index.known_as, index.name(culprit))}"
        )


def _take(fields: Iterator, count: int) -> list:
    return [next(fields) for _ in range(count)]


def as_bytes(path: str) -> np.ndarray:
    """A path as DALI reads it, whatever bytes its names have."""
    return np.frombuffer(os.fsencode(path), dtype=np.uint8)


def _packed(
    levels: Sequence, resolutions: Sequence[int], device: torch.device, stream: object
) -> Tensor:
    """[M, 3] rows, which batches of equal images [N, r, r, 3] are copied into.

    On a GPU the copies wait on the stream for the pictures, and DALI waits on a stream of its own
    for the copies before it uses the memory of the pictures again, so the host waits for neither.
    (DALI would free a tensor that it has handed over by DLPack behind a wait for the whole device.)
    """
    count = len(levels[0])
    pixels = [count * r * r for r in resolutions]
    rows = torch.empty(sum(pixels), 3, dtype=torch.uint8, device=device)
    for level, part, r in zip(levels, rows.split(pixels), resolutions, strict=True):
        feed_ndarray(level.as_tensor(), part.view(count, r, r, 3), cuda_stream=stream)
    return rows
