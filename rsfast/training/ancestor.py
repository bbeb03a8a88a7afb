"""A run that goes on where another one has ended, with other settings: a run of its own.

It takes weights, momentum, averaged weights, statistics, random numbers and the epoch from the
ancestor's checkpoint, and everything else from its settings. Its schedule counts from the beginning
of the ancestor: with `epochs` = 200 after 120, its first rate is that of epoch 121 of 200.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import torch

from rsfast.config import rules_of
from rsfast.engine.optim import groups_of
from rsfast.models.parts import decoder_of, frozen_by
from rsfast.runtime.distributed import agree, read_on_first
from rsfast.training import checkpoint
from rsfast.training.resume import changed_setting, restore_rank
from rsfast.training.run import Progress, Run

__all__ = ["FIXED", "continue_from"]

_LOG = logging.getLogger("rsfast")
# Without these an ancestor's weights, or the ensemble's, have no place; nor without its classes.
FIXED = ("arch", "task", "weight_bits", "activation_bits", "resolutions", "bn", "copies")
_IMAGES = "name its images by --data DIR or --config RUN/config.toml; "


def continue_from(run: Run, path: Path) -> None:
    """Puts a run that is about to start where another one has ended.

    Args:
        run: with `path` as its setting.
        path: the other run's folder, or a checkpoint of it that was written after an epoch.

    Raises:
        ValueError: if there is no such checkpoint, it is of another network, or no epoch is left.
    """
    # Rank 0 alone looks: others need not see that folder.
    path = agree(run.rank, lambda: path / "last.pt" if path.is_dir() else path)
    data = read_on_first(run.rank, lambda: checkpoint.read_state(path))
    content = checkpoint.parse_state(path, data)
    _check(run, path, content)
    run.model.load_state_dict(content["model"])
    run.loss.load_state_dict(content["loss"])
    _take_momentum(run, content)
    if run.step.scaler.is_enabled() and content["scaler"]:
        run.step.scaler.load_state_dict(content["scaler"])
    run.step.guard.counts.copy_(torch.tensor(content["skipped"]))
    had_average = "ema" in content
    if run.ema and had_average:
        run.ema.module.load_state_dict(content["ema"])
        run.ema.updates = content["ema_updates"]
    same_ranks = len(content["ranks"]) == run.rank.world_size
    if same_ranks and had_average == (run.ema is not None):
        restore_rank(run, content["ranks"][run.rank.index])
    # Its log and model_best.pt are its own: no epoch of the ancestor is its best.
    run.at, run.best = Progress(content["epoch"]), ()
    changed = _changed(run, content["config"])
    run.origin = {
        "continued_from": str(path),
        "continued_from_config_hash": content["config_hash"],
        "continued_from_epoch": content["epoch"],
        "changed": changed,
        "ancestor_origin": content.get("origin", {}),
    }
    _LOG.info("continues %s after its epoch %d", path, content["epoch"])
    for name, (then, now) in changed.items():
        _LOG.info("%s is %r instead of %r", name, now, then)


def _check(run: Run, path: Path, content: dict[str, Any]) -> None:
    if "optimizer" not in content:
        raise ValueError(f"checkpoint {path} holds no training state to continue from")
    if changed := changed_setting(content["config"], run.cfg, FIXED):
        name, then, now = changed
        bits = name.endswith("_bits")  # bases are of their bits, wherever they go
        remedy = "" if bits else "; --pretrained takes its weights into another network"
        raise ValueError(
            f"continue_from {path} was trained with {name} = {then!r}, this run has {now!r}: a run "
            f"that continues another has its {', '.join(FIXED)} and classes{remedy}"
        )
    pretrained, theirs = run.cfg.pretrained, content["config"].get("pretrained")
    if pretrained not in (None, theirs):
        raise ValueError(
            f"pretrained {pretrained} must be left out, or be what the run of continue_from {path} "
            f"has begun with ({theirs}): a run that continues another has its weights"
        )
    if content["class_names"] != run.model.class_names:
        remedy = _IMAGES if run.cfg.is_builtin else ""
        raise ValueError(
            f"continue_from {path} was trained on other classes than those of {run.cfg.images}: "
            f"{remedy}--pretrained takes its weights to other classes"
        )
    if content["step"] or content["validating"]:
        raise ValueError(
            f"continue_from {path} was written within epoch {content['epoch'] + 1}: finish that "
            f"run with --resume auto, or name a checkpoint from the end of an epoch"
        )
    if run.cfg.epochs <= content["epoch"]:
        raise ValueError(
            f"epochs must be more than the {content['epoch']} that {path} has done, "
            f"got {run.cfg.epochs}"
        )


def _take_momentum(run: Run, content: dict[str, Any]) -> None:
    """By parameter: `decay`, `freeze` and `decoder_lr` say which place each has in an optimiser."""
    before = content["config"]
    names = frozen_by(run.model, before.get("freeze") or ())
    frozen = {id(p) for name, p in run.model.network.named_parameters() if name in names}
    decoder = decoder_of(run.model) if before.get("decoder_lr", 1.0) != 1.0 else set()
    groups = groups_of(run.model, run.loss, before["decay"], frozen, decoder)
    state = content["optimizer"]["state"]
    for place, param in enumerate(itertools.chain(*(group.params for group in groups))):
        theirs = state.get(place, {}).get("momentum_buffer")
        if theirs is None or not param.requires_grad or not run.cfg.momentum:
            continue
        ours = run.optimizer.state[param]
        ours.setdefault("momentum_buffer", torch.zeros_like(param)).copy_(theirs)


def _changed(run: Run, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> value there and here, of the settings that training depends on."""
    found = {}
    for name, rule in rules_of(run.cfg).items():
        starts = ("pretrained", "calibrate_first", "continue_from")
        if rule.on_resume == "freely" or name in starts:
            continue
        if changed := changed_setting(before, run.cfg, [name]):
            found[name] = changed[1:]
    return found
