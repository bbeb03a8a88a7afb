"""The next batch while the step runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rsfast.data.loader import Batch, Loader
from rsfast.runtime.nvtx import nvtx_range

__all__ = ["prefetch"]


def prefetch(loader: Loader, device: torch.device) -> Iterator[Batch]:
    """The batches of a loader; on a GPU each is copied and normalised on a stream of its own.

    That happens while the step before it runs: batches are asked for one ahead. The consumer's
    stream waits for the batch, the host does not.

    Args:
        loader: one iteration of it is yielded.
        device: where its batches are.
    """
    if device.type != "cuda":
        yield from loader
        return
    side = torch.cuda.Stream(device)
    batches = iter(loader)

    def fetch() -> Batch | None:
        with torch.cuda.stream(side), nvtx_range("loader"):
            return next(batches, None)

    ahead = fetch()
    while ahead is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        batch = ahead
        for tensor in (batch.images.rows, batch.labels, *(batch.mix or ()), *(batch.masks or ())):
            tensor.record_stream(current)  # made by the side stream, free when the step is done
        yield batch
        ahead = fetch()
