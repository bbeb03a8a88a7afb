"""Encoded images, read by threads ahead of the loader that decodes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from rsfast.data.index import ImageIndex

__all__ = ["read_ahead"]

_AHEAD = 2  # batches


def read_ahead(
    index: ImageIndex, batches: Iterable[np.ndarray], workers: int
) -> Generator[list[np.ndarray]]:
    """The bytes of the images of each batch, while those of the next batches are being read.

    Args:
        index: where the images are.
        batches: [N] positions each.
        workers: threads that read.

    Yields:
        N arrays of uint8.

    Raises:
        ReadingError: naming the file that cannot be read.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="rsfast-read")
    pending: deque[list[Future[np.ndarray]]] = deque()
    left = iter(batches)
    try:
        while True:
            while len(pending) <= _AHEAD and (images := next(left, None)) is not None:
                pending.append([pool.submit(_read, index, int(image)) for image in images])
            if not pending:
                return
            yield [future.result() for future in pending.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read(index: ImageIndex, position: int) -> np.ndarray:
    return np.frombuffer(index.read(position), dtype=np.uint8)
