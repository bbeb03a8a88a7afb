"""Processes under torchrun: NCCL between GPUs, gloo between CPUs, nothing for one process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from rsfast.models import RSNet

__all__ = [
    "Rank",
    "agree",
    "average_bn_statistics",
    "first_rank_first",
    "join",
    "leave",
    "same_everywhere",
    "sum_over_ranks",
]

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
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore(f"rsfast/{attempt}", store),
            rank=number,
            world_size=world_size,
            device_id=place if cuda else None,
        )
    group = dist.new_group(backend="gloo") if world_size > 1 else None
    return Rank(int(os.environ.get("RANK", 0)), world_size, place, group)


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        # DistributedDataParallel holds the group and is full of cycles. What is left of it when the
        # interpreter ends makes gloo's threads end the process with an abort, now and then.
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def first_rank_first(rank: Rank) -> Iterator[None]:
    """Rank 0 runs the block before all others: it fills caches that they then find."""
    if rank.world_size > 1 and not rank.is_main:
        dist.barrier()
    try:
        yield
    finally:
        # Also when rank 0 fails: the others then meet the same error instead of waiting.
        if rank.world_size > 1 and rank.is_main:
            dist.barrier()


def agree(rank: Rank, find: Callable[[], T]) -> T:
    """What `find` returns on rank 0, or the ValueError that it raises there, on all ranks."""
    if rank.world_size == 1:
        return find()
    box: list[Any] = [None, None]
    if rank.is_main:
        try:
            box[0] = find()
        except ValueError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=rank.host_group)
    if box[1] is not None:
        raise ValueError(box[1])
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
def average_bn_statistics(model: RSNet) -> None:
    """Gives all ranks the mean of their running statistics, so that they validate one network."""
    if not dist.is_initialized():
        return
    buffers = [b for norm in model.batch_norms() for b in (norm.running_mean, norm.running_var)]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
