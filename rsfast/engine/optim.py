"""The optimiser of the paper, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Group",
    "build_optimizer",
    "groups_of",
    "lr_at",
    "set_lr",
]

SCHEDULES = ("cosine", "poly", "step")
_POWER = 0.9  # of the schedule poly
_FACTOR = "lr_factor"  # of a group whose rate is another one
DECAY_MODES = ("all", "weights")
OPTIMIZERS = ("sgd", "apex_sgd")


def lr_at(
    step: int,
    total_steps: int,
    lr: float,
    warmup_steps: int = 0,
    *,
    schedule: str = "cosine",
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> float:
    """Cosine or power law to zero per step, or steps, after an optional linear warm-up.

    Args:
        step: from 0; the last one is total_steps - 1, so those that fall to 0 never quite do.
        total_steps: T, warm-up included.
        lr: the highest rate.
        warmup_steps: steps from 0 up to `lr`; cosine and poly span the rest. 0 in the paper.
        schedule: "cosine" (the paper's); "poly", the share of steps that is left to the power of
            0.9, as in DeepLab; or "step".
        milestones: first steps of the next lower rate, of the schedule "step"; one within the
            warm-up lowers the rest of it, too.
        gamma: factor of the rate at each of them.

    Raises:
        ValueError: if the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if schedule == "step":
        lr *= gamma ** sum(step >= milestone for milestone in milestones)
    if step < warmup_steps:
        return lr * step / warmup_steps
    if schedule == "step":
        return lr
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    if schedule == "poly":
        return lr * (1.0 - done) ** _POWER
    return 0.5 * lr * (1.0 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of all groups, times their factor; a tensor rate keeps its place in memory.

    Rounded to float32, as a captured step has it: PyTorch's fused SGD would compute with the
    float64 of an eager one.
    """
    for group in optimizer.param_groups:
        rate = _as_float32(lr * group.get(_FACTOR, 1.0))
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def build_optimizer(
    model: nn.Module,
    loss: nn.Module,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    nesterov: bool = False,
    decay: str = "all",
    decoder: Set[int] = frozenset(),
    decoder_lr: float = 1.0,
    kind: str = "sgd",
) -> torch.optim.Optimizer:
    """SGD over what is to be trained, alpha too; leaves banks that took no part untouched.

    A step trained on some of the resolutions gives the other sets a gradient of zero; weight decay
    and momentum would move them all the same. They are put back after each such step. A module with
    sets says by `num_banks` how many, and by `banks_in_use` which of them took part.

    Args:
        model: the network; parameters that need no gradient are left out.
        loss: its parameters are trained by the same rule.
        lr: learning rate of the first step.
        momentum: of SGD.
        weight_decay: L2 factor.
        nesterov: momentum of that kind.
        decay: "all" parameters (the paper's runs: biases, batch norm and alpha too), or only the
            "weights" of convolutions and classifier.
        decoder: the `id` of each parameter whose rate is
        decoder_lr: times that of the others.
        kind: "sgd" of PyTorch, fused, or "apex_sgd", NVIDIA Apex's.

    Raises:
        ValueError: if `decay` or `kind` is unknown.
        ImportError: if Apex is asked for and absent, or another package has its name.
    """
    if decay not in DECAY_MODES:
        raise ValueError(f"decay must be one of {DECAY_MODES}, got {decay!r}")
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    groups: list[dict[str, Any]] = [
        {
            "params": group.params,
            "weight_decay": weight_decay if group.decayed else 0.0,
            **({_FACTOR: decoder_lr, "lr": _as_float32(lr * decoder_lr)} if group.decoder else {}),
        }
        for group in groups_of(model, loss, decay, frozen, decoder)
    ]
    settings: dict[str, Any] = {"lr": _as_float32(lr), "momentum": momentum, "nesterov": nesterov}
    optimizer: torch.optim.Optimizer
    if kind == "apex_sgd":
        optimizer = _apex_sgd()(groups, **settings)
    elif kind == "sgd":
        optimizer = torch.optim.SGD(groups, **settings, fused=True)
        # Zeros are where momentum starts. PyTorch's fused SGD starts from memory that its first
        # step is to fill, and leaves it unfilled when the gradient scaler skips that step.
        for group in optimizer.param_groups if momentum else []:
            for param in group["params"]:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    else:
        raise ValueError(f"kind must be one of {OPTIMIZERS}, got {kind!r}")
    _keep_idle_banks(optimizer, model)
    return optimizer


class Group(NamedTuple):
    """Parameters that an optimiser treats alike.

    Attributes:
        params: at least one.
        decayed: whether they have weight decay.
        decoder: whether they have the decoder's rate.
    """

    params: list[nn.Parameter]
    decayed: bool
    decoder: bool


def groups_of(
    model: nn.Module,
    loss: nn.Module,
    decay: str,
    frozen: Set[int],
    decoder: Set[int] = frozenset(),
) -> list[Group]:
    """The groups in the optimiser's order: with weight decay, without, then the decoder's.

    Args:
        model, loss, decay, decoder: of :func:`build_optimizer`.
        frozen: the `id` of each parameter that is in none.
    """
    norms = {id(p) for norm in _banked(model) for p in norm.parameters()}
    groups = [Group([], decayed, of) for of in (False, True) for decayed in (True, False)]
    for param in (*model.parameters(), *loss.parameters()):
        if id(param) not in frozen:
            plain = param.dim() < 2 or id(param) in norms
            free = decay == "weights" and plain
            groups[2 * (id(param) in decoder) + free].params.append(param)
    return [group for group in groups if group.params]


def _as_float32(value: float) -> float:
    return float(np.float32(value))


def _apex_sgd() -> type[torch.optim.Optimizer]:
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise ImportError(
            "optimizer apex_sgd needs NVIDIA Apex, built from github.com/NVIDIA/apex with its CUDA "
            f"extensions (the apex of PyPI is another package): {error}"
        ) from error
    return FusedSGD


def _keep_idle_banks(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    saved: list[tuple[Tensor, Tensor]] = []

    def save(*_: object) -> None:
        saved.extend((rows, rows.clone()) for rows in _idle_rows(optimizer, model))

    def restore(*_: object) -> None:
        for rows, before in saved:
            rows.copy_(before)
        saved.clear()

    optimizer.register_step_pre_hook(save)
    optimizer.register_step_post_hook(restore)


def _idle_rows(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[Tensor]:
    """Views of the parameters and momenta of sets that the last training forward did not use."""
    for norm in _banked(model):
        for bank in set(range(norm.num_banks)) - set(norm.banks_in_use):
            for param in norm.parameters(recurse=False):
                if not param.requires_grad:
                    continue
                yield param.detach()[bank]
                momentum = optimizer.state[param].get("momentum_buffer")
                if momentum is not None:
                    yield momentum[bank]


def _banked(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "banks_in_use")]
