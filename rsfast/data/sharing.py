"""Whether the batches of worker processes fit into the shared memory through which they come."""

from __future__ import annotations

import os
import shutil

__all__ = ["PREFETCHED", "check_shared_memory"]

PREFETCHED = 2  # batches per worker that wait to be taken
_FOLDER = "/dev/shm"


def check_shared_memory(workers: int, batch_bytes: int, steps: int) -> None:
    """Refuses workers whose batches do not fit; they would wait for room for ever, or be killed.

    Args:
        workers: processes of this rank that render batches.
        batch_bytes: of one batch.
        steps: batches that there are.

    Raises:
        ValueError: if they do not fit into what is free in shared memory, or those of all ranks of
            this machine into the whole of it.
    """
    if not workers:
        return
    try:
        total, _, free = shutil.disk_usage(_FOLDER)
    except OSError:  # another system, which shares memory in another way
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = min(workers * PREFETCHED + 1, steps) * batch_bytes  # one is in use
    if need <= free and ranks * need <= total:
        return
    everyone = f", times {ranks} processes of torchrun" if ranks > 1 else ""
    raise ValueError(
        f"workers of the pil loader must fit their batches into the shared memory {_FOLDER}: "
        f"{workers} workers prefetch {PREFETCHED} batches of {_mib(batch_bytes)} each, "
        f"{_mib(need)} with the one in use{everyone}, got {_mib(free)} free of {_mib(total)}; give "
        "the container more (docker run --ipc=host or --shm-size=8g), or use fewer --workers, "
        "--workers 0, a smaller batch, or --loader dali"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
