"""How DALI decodes, and what it says where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
from nvidia.dali import types
from nvidia.dali.pipeline import Pipeline

from rsfast.data.index import ImageIndex

__all__ = ["OneByOne", "cause", "decoded", "decoded_masks", "first_refused"]


def decoded(encoded, device: str = "cpu", *, start=None, shape=None, **means):
    """Whole images, or the part of each that lies in a region."""
    how = {
        "device": device,
        "adjust_orientation": False,
        # As libjpeg does, on a GPU too: most photographs store colours at half the resolution.
        "jpeg_fancy_upsampling": True,
        **means,
    }
    if start is None:
        return fn.decoders.image(encoded, **how)
    return fn.decoders.image_slice(encoded, axis_names="HW", start=start, shape=shape, **how)


def decoded_masks(paths: Callable[[], list[np.ndarray]], dont_use_mmap: bool) -> Any:
    """[H, W, 1] uint8 on the CPU of files of 8-bit grey.

    Args:
        paths: gives those of the next batch.
        dont_use_mmap: read files plainly.
    """
    encoded = fn.io.file.read(fn.external_source(source=paths), dont_use_mmap=dont_use_mmap)
    return fn.decoders.image(
        encoded, device="cpu", output_type=types.GRAY, adjust_orientation=False
    )


class OneByOne:
    """Decodes files on a CPU, one after the other, as the loader does."""

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None
        self._encoded = b""

    def decode(self, encoded: bytes) -> np.ndarray:
        """[H, W, 3] uint8.

        Raises:
            RuntimeError: with the cause in DALI's words.
        """
        self._encoded = encoded
        if self._pipeline is None:
            self._pipeline = Pipeline(1, 1, None, prefetch_queue_depth=1, exec_async=False)
            with self._pipeline as pipeline:
                pipeline.set_outputs(decoded(fn.external_source(source=self._next)))
        try:
            (images,) = self._pipeline.run()
            return np.array(images[0])
        except RuntimeError as error:
            self._pipeline = None  # nothing can be had from it any more
            raise RuntimeError(cause(error)) from error

    def _next(self) -> list[np.ndarray]:
        return [np.frombuffer(self._encoded, dtype=np.uint8)]


def first_refused(index: ImageIndex, positions: Sequence[int]) -> int | None:
    """The first image that DALI cannot decode on a CPU."""
    decoder = OneByOne()
    for position in positions:
        encoded = index.read(position)
        try:
            decoder.decode(encoded)
        except RuntimeError:
            return position
    return None


def cause(error: RuntimeError) -> str:
    """What DALI says behind the story of where in the pipeline it happened, in one line."""
    return str(error).rpartition("encountered:")[2].strip().partition("\n")[0].strip(" :")
