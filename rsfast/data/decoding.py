"""By which means images are decoded; none of it changes a picture."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["TOO_MANY_WORKERS", "Decoding", "check_decoder_load", "decoding", "default_workers"]

TOO_MANY_WORKERS = 1025  # where a system has no more threads, DALI ends the process
_MOST_BY_DEFAULT = 32  # by default: each thread of DALI keeps 16 MB of GPU memory
_FEW_WORKERS = 8  # with fewer threads the GPU's own JPEG decoder takes nearly all images


class Decoding(NamedTuple):
    """The means of a loader; what the Pillow loader has no use for, it leaves.

    Attributes:
        workers: decoder threads (dali) or processes (pil).
        hw_decoder_load: share of the JPEG images that a GPU's own JPEG decoder takes.
        dont_use_mmap: read files plainly instead of mapping them into memory.
    """

    workers: int
    hw_decoder_load: float
    dont_use_mmap: bool


def decoding(
    workers: int | None = None, hw_decoder_load: float | None = None, dont_use_mmap: bool = False
) -> Decoding:
    """Puts defaults in the place of None.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if workers is None:
        workers = default_workers()
    if not 0 <= workers < TOO_MANY_WORKERS:
        raise ValueError(f"workers must be in [0, {TOO_MANY_WORKERS}), got {workers}")
    if hw_decoder_load is None:
        # 0.65 is DALI's default. NVIDIA found 0.9 to be 1.8 % faster from end to end, and the
        # slowest batches to take more than twice as long (DALI's pull request 6366). Nothing of it
        # was timed here.
        hw_decoder_load = 0.9 if workers < _FEW_WORKERS else 0.65
    check_decoder_load(hw_decoder_load)
    return Decoding(workers, hw_decoder_load, dont_use_mmap)


def check_decoder_load(share: float | None) -> None:
    """Refuses what is no share; None is left to :func:`decoding`.

    Raises:
        ValueError: unless it is in [0, 1].
    """
    if share is not None and not 0.0 <= share <= 1.0:
        raise ValueError(f"hw_decoder_load must be in [0, 1], got {share}")


def default_workers() -> int:
    """The cores that belong to this process, at most 32.

    They are those that it may run on, shared with the other processes that torchrun has started on
    this machine. Where torchrun binds each of them to cores of its own, that is too few.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(_MOST_BY_DEFAULT, max(1, len(os.sched_getaffinity(0)) // local_ranks))
