"""Processes under torchrun: NCCL between GPUs, gloo between CPUs, nothing for one process."""

from __future__ import annotations

import gc
import logging
import os
import socket
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
from torch import nn

from rsfast.kernels.common.ranks import sum_over_ranks
from rsfast.pyramid import moved_by_forward
from rsfast.runtime.vector import as_vector, by_dtype, fill_from_vector

__all__ = [
    "abandon",
    "agree",
    "average_bn_statistics",
    "first_rank_first",
    "is_first",
    "join",
    "leave",
    "Rank",
    "read_on_first",
    "same_everywhere",
    "send_from_first",
    "sum_over_ranks",
]

_LOG = logging.getLogger("rsfast")
_PATIENCE_S = 1800  # for the other processes to start
_FIRST_WORD_S, _NEXT_WORD_S = 10.0, 60.0  # when to say that they are awaited
_MOMENT = timedelta(seconds=10)  # to connect, in which no signal is heard
# For what one process does while the others wait on the host: reading the headers of a million
# images over a network, writing a checkpoint. NCCL would give up after ten minutes.
_HOST_PATIENCE = timedelta(hours=6)
_PIECE = 2**26  # bytes that are sent at once
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
        RuntimeError: if the other processes do not come, or the port to meet at is taken.
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
    _warn_of_tasks_apart()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        # torchrun keeps one store over its restarts, and what the processes of the start before
        # have left there makes new ones wait for the dead: each start gets a part of its own.
        number = int(os.environ.get("RANK", 0))
        store = meet(number, world_size)
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
    patience = _Patience()
    own = uuid.uuid4().hex
    waiting = set(range(1, world_size)) if number == 0 else set()
    if number:
        store.set(f"rsfast/hello/{number}", own)
        while not store.check([f"rsfast/answer/{own}"]):
            patience.wait(world_size, [0])
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
            patience.wait(world_size, sorted(waiting))
    return own


def meet(number: int, world_size: int) -> dist.TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT, which rank 0 opens unless torchrun has.

    PyTorch's own rendezvous waits for all processes without a word, and hears no signal while it
    does. This waits for the store alone, a moment at a time.

    Raises:
        RuntimeError: if there is no store within half an hour, or another program has its port.
        ValueError: if the environment does not say where it is.
    """
    place = _place()
    opens = number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    patience = _Patience()
    while not opens and not _listens(*place):
        patience.wait(world_size, [0])
    try:
        store = dist.TCPStore(
            *place,
            world_size,
            is_master=opens,
            wait_for_workers=False,
            timeout=_MOMENT,
            multi_tenant=True,  # a process may leave a group and join another
        )
    except dist.DistNetworkError as error:
        raise RuntimeError(
            f"process {number} finds no place to meet at {place[0]}:{place[1]} ({_reason(error)}): "
            f"give MASTER_ADDR the name of process 0's machine, and MASTER_PORT (torchrun "
            f"--master-port) a port of it that is free"
        ) from error
    store.set_timeout(timedelta(seconds=_PATIENCE_S))
    return store


def _listens(host: str, port: int) -> bool:
    """PyTorch's own attempts to connect end in lines that only its developers understand."""
    try:
        socket.create_connection((host, port), _MOMENT.total_seconds()).close()
    except OSError:
        return False
    return True


def _place() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or "RANK" not in os.environ:
        raise ValueError(
            "WORLD_SIZE is above 1, and RANK, MASTER_ADDR and MASTER_PORT must say where the "
            "processes meet: start them with torchrun, which sets all of them"
        )
    return host, int(port)


def _reason(error: Exception) -> str:
    """The system's own words, out of PyTorch's sentence around them."""
    return str(error).splitlines()[0].rpartition("message: ")[2].strip(" .")


class _Patience:
    """Waits for other processes for half an hour in all, and says now and then for which."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _PATIENCE_S
        self._say = time.monotonic() + _FIRST_WORD_S

    def wait(self, world_size: int, missing: list[int]) -> None:
        """A moment; `missing` are the ranks that have not come.

        Raises:
            RuntimeError: after half an hour.
        """
        clock = time.monotonic()
        ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        text = f"{len(missing)} of {world_size} processes at {':'.join(map(str, _place()))}"
        if clock > self._end:
            raise RuntimeError(
                f"{text} did not start within {_PATIENCE_S // 60} minutes: rank {ranks}"
            )
        if clock > self._say:
            self._say = clock + _NEXT_WORD_S
            print(f"waiting for {text}: rank {ranks}", file=sys.stderr, flush=True)
        time.sleep(0.05)


def _warn_of_tasks_apart() -> None:
    """Says it where Slurm has started processes that do not know of each other."""
    tasks = os.environ.get("SLURM_NTASKS", "")
    if "WORLD_SIZE" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        _LOG.warning(
            "Slurm has %s tasks (SLURM_NTASKS) and WORLD_SIZE is not set: each task that srun "
            "starts works for itself, on all of the data; let each node's one task start torchrun",
            tasks,
        )


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


def read_on_first(rank: Rank, read: Callable[[], bytes]) -> bytes:
    """As :func:`agree` for many bytes, which travel between the hosts in pieces."""
    if rank.world_size == 1:
        return read()
    data = bytearray()

    def keep() -> int:
        data.extend(read())
        return len(data)

    length = agree(rank, keep)
    if not rank.is_main:
        data = bytearray(length)
    whole = torch.frombuffer(data, dtype=torch.uint8)
    for start in range(0, length, _PIECE):
        dist.broadcast(whole[start : start + _PIECE], src=0, group=rank.host_group)
    return bytes(data)


def same_everywhere(rank: Rank, value: object) -> bool:
    """Whether all ranks have the same; all of them get to know."""
    if rank.world_size == 1:
        return True
    values: list[object] = [None] * rank.world_size
    dist.all_gather_object(values, value, group=rank.host_group)
    return all(other == value for other in values)


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
