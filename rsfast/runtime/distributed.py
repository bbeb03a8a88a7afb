"""Processes under torchrun: NCCL between GPUs, gloo between CPUs, nothing for one process."""

from __future__ import annotations

import gc
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from rsfast.pyramid import moved_by_forward
from rsfast.runtime.vector import as_vector, by_dtype, fill_from_vector

__all__ = [
    "Rank",
    "abandon",
    "agree",
    "average_bn_statistics",
    "first_rank_first",
    "is_first",
    "join",
    "leave",
    "same_everywhere",
    "send_from_first",
    "sum_over_ranks",
]

_PATIENCE_S = 1800  # for the other processes to start
# For what one process does while the others wait on the host: reading the headers of a million
# images over a network, writing a checkpoint. NCCL would give up after ten minutes.
_HOST_PATIENCE = timedelta(hours=6)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among all of them.

    Attributes:
        index: from 0; rank 0 writes files and talks.
        world_size: number of processes.
        device: the one this process trains on.
        host_group: of gloo, for what the hosts agree on; None for one process.
    """

    index: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.index == 0


def join(device: str = "auto") -> Rank:
    """Joins the process group that torchrun describes, if it does.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ValueError: if "cuda" is asked for and absent, or the name is unknown.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that exists: no CUDA device was found")
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        # torchrun keeps one store over its restarts, and what the processes of the start before
        # have left there makes new ones wait for the dead: each start gets a part of its own.
        store, number, _ = next(rendezvous("env://"))
        start = agree_on_start(store, number, world_size)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore(f"rsfast/{start}", store),
            rank=number,
            world_size=world_size,
            device_id=place if cuda else None,
        )
    group = None
    if world_size > 1:
        group = dist.new_group(backend="gloo", timeout=_HOST_PATIENCE)
    return Rank(int(os.environ.get("RANK", 0)), world_size, place, group)


def is_first() -> bool:
    """Whether this is rank 0, or the only process, as torchrun says."""
    return os.environ.get("RANK", "0") == "0"


def agree_on_start(store: dist.Store, number: int, world_size: int) -> str:
    """A name for this start of all processes, through a store with leftovers of earlier ones.

    torchrun's own count of restarts will not do: every machine counts for itself. So each process
    says hello with a name that nobody had before, and rank 0 answers whatever hello it finds until
    all have said that they got its answer; a leftover hello is answered in vain.

    Raises:
        RuntimeError: if the others do not come within half an hour.
    """
    end = time.monotonic() + _PATIENCE_S
    own = uuid.uuid4().hex
    waiting = set(range(1, world_size)) if number == 0 else set()
    if number:
        store.set(f"rsfast/hello/{number}", own)
        while not store.check([f"rsfast/answer/{own}"]):
            _sleep_until(end)
        own = store.get(f"rsfast/answer/{own}").decode()
        store.set(f"rsfast/{own}/got/{number}", "")
    while waiting:
        for other in tuple(waiting):
            if store.check([f"rsfast/{own}/got/{other}"]):
                waiting.remove(other)
            elif store.check([f"rsfast/hello/{other}"]):
                hello = store.get(f"rsfast/hello/{other}").decode()
                store.set(f"rsfast/answer/{hello}", own)
        if waiting:
            _sleep_until(end)
    return own


def _sleep_until(end: float) -> None:
    if time.monotonic() > end:
        raise RuntimeError(f"the other processes did not start within {_PATIENCE_S // 60} minutes")
    time.sleep(0.05)


def abandon(code: int) -> None:
    """Ends this process now if it is in a group: its peers may never come to leave it together."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def leave() -> None:
    """Leaves the process group, if there is one; all ranks do, or it may wait for them."""
    if dist.is_initialized():
        # DistributedDataParallel holds the group and is full of cycles. What is left of it when the
        # interpreter ends makes gloo's threads end the process with an abort, now and then.
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def first_rank_first(rank: Rank) -> Iterator[None]:
    """Rank 0 runs the block before all others: it fills caches that they then find."""
    if rank.world_size > 1 and not rank.is_main:
        dist.barrier(rank.host_group)
    try:
        yield
    finally:
        # Also when rank 0 fails: the others then meet the same error instead of waiting.
        if rank.world_size > 1 and rank.is_main:
            dist.barrier(rank.host_group)


def agree(rank: Rank, find: Callable[[], T]) -> T:
    """What `find` returns on rank 0, or the ValueError or OSError that it raises, on all ranks."""
    if rank.world_size == 1:
        return find()
    box: list[Any] = [None, None]
    if rank.is_main:
        try:
            box[0] = find()
        except (ValueError, OSError) as error:
            box[1] = ValueError(str(error)) if isinstance(error, ValueError) else error
    dist.broadcast_object_list(box, src=0, group=rank.host_group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def same_everywhere(rank: Rank, value: object) -> bool:
    """Whether all ranks have the same; all of them get to know."""
    if rank.world_size == 1:
        return True
    values: list[object] = [None] * rank.world_size
    dist.all_gather_object(values, value, group=rank.host_group)
    return all(other == value for other in values)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Adds a tensor up over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def send_from_first(module: nn.Module) -> None:
    """Gives all ranks the parameters and buffers of rank 0."""
    if not dist.is_initialized():
        return
    for tensors in by_dtype(list(module.state_dict().values())):
        flat = as_vector(tensors)
        dist.broadcast(flat, src=0)
        fill_from_vector(tensors, flat)


@torch.no_grad()
def average_bn_statistics(model: nn.Module) -> None:
    """Gives all ranks the mean of their running statistics, so that they validate one network."""
    if not dist.is_initialized():
        return
    buffers = [tensor for tensor in moved_by_forward(model) if tensor.is_floating_point()]
    flat = as_vector(buffers)
    dist.all_reduce(flat)
    fill_from_vector(buffers, flat / dist.get_world_size())
