"""The state of a run between two steps: what a checkpoint holds, and how a run continues from it.

Batch-norm statistics, loss sums and random numbers differ between ranks, so each rank's are kept.
Loaders draw no random number: epoch and step say all about them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rsfast.config import TrainConfig, as_flag, completed, rules_of
from rsfast.engine.metrics import EpochMean
from rsfast.models import RSNet
from rsfast.pyramid import moved_by_forward
from rsfast.runtime.distributed import Rank, agree, read_on_first
from rsfast.runtime.vector import as_vector, by_dtype, fill_from_vector
from rsfast.training import checkpoint
from rsfast.training.folder import epochs_logged, left_by_a_run
from rsfast.training.run import Progress, Run

__all__ = [
    "changed_setting",
    "config_hash",
    "find_checkpoint",
    "fixed_settings",
    "restore",
    "restore_rank",
    "save",
]

_LOG = logging.getLogger("rsfast")
_VERSIONED = ("rsfast", "torch", "triton", "numpy", "pillow", "gpu", "cuda", "cudnn")


def save(run: Run, *, is_best: bool = False) -> None:
    """Writes last.pt, and before it model_best.pt and .safetensors if asked to.

    All ranks come here, and go on when it is written.

    Raises:
        OSError: on all ranks, if they cannot be written; last.pt is then what it was.
    """
    ranks = _gather(run.rank, _rank_state(run))
    agree(run.rank, lambda: _write(run, ranks, is_best))
    run.saved = time.monotonic()


def _write(run: Run, ranks: list[dict[str, Any]], is_best: bool) -> None:
    optimizer = run.optimizer.state_dict()
    for group in optimizer["param_groups"]:
        group["lr"] = float(group["lr"])  # a captured step has made a tensor of it
    payload = {
        **checkpoint.model_payload(run.model),
        "loss": run.loss.state_dict(),
        "optimizer": optimizer,
        "scaler": run.step.scaler.state_dict(),
        "skipped": run.step.guard.counts.tolist(),
        "epoch": run.at.epoch,
        "step": run.at.step,
        "logged": run.at.logged,
        "validating": run.at.validating,
        "mean": dataclasses.asdict(run.at.mean),
        "best": run.best,
        "ranks": ranks,
        "config": dataclasses.asdict(run.cfg),
        "config_hash": config_hash(run.cfg),
        "data_set": run.data_set,
        "versions": versions(run),
        "origin": run.origin,
    }
    if run.ema:
        payload["ema"] = run.ema.module.state_dict()
        payload["ema_updates"] = run.ema.updates
    best = []
    if is_best:  # first: a run that ends before last.pt is there does this epoch's end again
        weights = run.folder / "model_best.safetensors"
        checkpoint.save_weights(run.averaged_model, run.loss.scores, weights)
        best.append(run.folder / "model_best.pt")
    checkpoint.save_with_predecessors(payload, run.folder, run.cfg.keep, *best)


def find_checkpoint(cfg: TrainConfig, folder: Path) -> Path | None:
    """What a run continues from; None if it starts.

    Raises:
        ValueError: if the folder holds a run that nobody asked to continue, or another one than the
            checkpoint is of, or no whole checkpoint.
        OSError: if a checkpoint cannot be read.
    """
    if cfg.resume == "auto":
        return checkpoint.newest(folder) or _without_last(folder)
    if cfg.resume:
        path = Path(cfg.resume)
        _check_owner(path, folder)
        return path
    if left := left_by_a_run(folder):
        raise ValueError(
            f"output folder {folder} holds a run already: continue it with --resume auto, or name "
            f"another --output (there are {', '.join(left)})"
        )
    return None


def _check_owner(path: Path, folder: Path) -> None:
    """Refuses a checkpoint from elsewhere that another run than the folder's has written.

    An older copy of the folder's own says where it was written.
    """
    if path.resolve().parent == folder.resolve() or not (left := left_by_a_run(folder)):
        return
    written_in = checkpoint.load_state(path).get("config", {}).get("output")
    if written_in is None or Path(written_in).resolve() != folder.resolve():
        raise ValueError(
            f"output folder {folder} holds a run already, and checkpoint {path} was written in "
            f"{written_in}: name another --output, or, if it is an older checkpoint of that same "
            f"run, copy it into the folder and resume from there (there are {', '.join(left)})"
        )


def _without_last(folder: Path) -> Path | None:
    """What a run continues from that has no last.pt; None where it has lost nothing by that.

    A run that ends while it saves for the first time has logged its first epoch, and its best
    network so far is that epoch's.
    """
    left = left_by_a_run(folder)
    kept = [name for name in left if name.startswith(("model_best", "last"))]
    epochs, best = epochs_logged(folder), folder / "model_best.pt"
    if epochs == 1 and kept == ["model_best.pt", "model_best.safetensors"]:
        _LOG.warning("%s has no last.pt: its first epoch is continued from %s", folder, best)
        return best
    if epochs == 1 and kept == ["model_best.safetensors"]:
        kept = []
    if epochs > 1:
        kept.append(f"a log of {epochs} epochs")
    if kept:
        remedy = f"--resume {best} continues from its best epoch" if best.exists() else "move them"
        raise ValueError(
            f"output folder {folder} holds {', '.join(kept)} but no last.pt to continue from: "
            f"{remedy}, or name another --output"
        )
    if left:
        _LOG.warning("%s holds a run without a checkpoint: it starts anew", folder)
    return None


def restore(run: Run, path: Path) -> None:
    """Puts a run where a checkpoint says. Rank 0 alone reads it: others need not see its folder.

    Raises:
        ValueError: if the checkpoint is damaged, or of a run that this one does not continue.
        OSError: if it cannot be read.
    """
    data = read_on_first(run.rank, lambda: checkpoint.read_state(path))
    content = checkpoint.parse_state(path, data)
    if "optimizer" not in content:
        raise ValueError(f"checkpoint {path} holds no training state to resume from")
    _check_same_run(run, path, content)
    other_batches = _other_batches(run, content)
    if other_batches and not run.cfg.restart_epoch:
        raise ValueError(
            f"checkpoint {path}: {other_batches}, and the batches would change: go back, or "
            f"continue from the start of the epoch with --restart-epoch"
        )
    run.model.load_state_dict(content["model"])
    run.loss.load_state_dict(content["loss"])
    run.optimizer.load_state_dict(content["optimizer"])
    run.step.scaler.load_state_dict(content["scaler"])
    run.step.guard.counts.copy_(torch.tensor(content["skipped"]))
    if run.ema:
        run.ema.module.load_state_dict(content["ema"])
        run.ema.updates = content["ema_updates"]
    run.best = tuple(content["best"])
    run.origin = content.get("origin", {})
    if len(content["ranks"]) == run.rank.world_size:
        restore_rank(run, content["ranks"][run.rank.index])
    if other_batches:
        run.at = Progress(content["epoch"], restarted=True)
        run.meter.sums.zero_()
        if content["step"]:
            _LOG.warning(
                "epoch %d starts again, %d of its steps were done: %s",
                run.at.epoch + 1,
                content["step"],
                other_batches,
            )
    else:
        mean = EpochMean(**content["mean"])
        place = content["step"], content["logged"], content["validating"]
        run.at = Progress(content["epoch"], *place, mean)


def fixed_settings(*, at_an_epoch: bool = False) -> list[str]:
    """Names of the settings that a run's continuation must share with it.

    Args:
        at_an_epoch: if it goes on from the start of an epoch.
    """
    free = {"freely", "at an epoch"} if at_an_epoch else {"freely"}
    return sorted(n for n, rule in rules_of(TrainConfig).items() if rule.on_resume not in free)


def changed_setting(
    before: Mapping[str, Any], cfg: TrainConfig, names: Iterable[str]
) -> tuple[str, Any, Any] | None:
    """The first setting that differs from a checkpoint's: name, its value there, and here.

    Args:
        before: settings of the checkpoint. One that it lacks is younger than the checkpoint, which
            was trained as :func:`rsfast.config.completed` or the default says.
        cfg: of this run.
        names: of the settings to compare.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    before = completed(before)
    for name in names:
        then, now = before.get(name, defaults[name]), getattr(cfg, name)
        if then != now:
            return name, then, now
    return None


def config_hash(cfg: TrainConfig) -> str:
    """A short name for all settings."""
    return hashlib.sha256(cfg.to_toml().encode()).hexdigest()[:16]


def _check_same_run(run: Run, path: Path, content: dict[str, Any]) -> None:
    changed = changed_setting(content["config"], run.cfg, fixed_settings(at_an_epoch=True))
    if changed:
        name, then, now = changed
        raise ValueError(
            f"checkpoint {path} was trained with {name} = {then!r}, this run has {now!r}: "
            f"resume with the same settings{as_flag(name, then)}, or start another --output"
        )
    if content["class_names"] != run.model.class_names:
        raise ValueError(
            f"checkpoint {path} was trained on other classes than those of {run.cfg.images}"
        )
    for name, version in versions(run).items():
        if content["versions"].get(name) != version:
            _LOG.warning(
                "resumed with %s %s instead of %s: results may differ in their last digits",
                name,
                version,
                content["versions"].get(name),
            )


def _other_batches(run: Run, content: dict[str, Any]) -> str | None:
    """Why the batches of the checkpoint's epoch would not be those that this run makes."""
    names = sorted(set(fixed_settings()) - set(fixed_settings(at_an_epoch=True)))
    if changed := changed_setting(content["config"], run.cfg, names):
        name, then, now = changed
        return f"it was trained with {name} = {then!r}, this run has {now!r}"
    if len(content["ranks"]) != run.rank.world_size:
        processes = len(content["ranks"])
        return f"it was trained by {processes} processes, this run has {run.rank.world_size}"
    if content["data_set"] != run.data_set:
        what = "images or masks" if run.cfg.task == "segmentation" else "images"
        return f"it was trained on other {what} than those of {run.cfg.images}"
    return None


def versions(run: Run) -> dict[str, Any]:
    """Of what the numbers depend on; known to rank 0."""
    return {name: run.facts[name] for name in _VERSIONED if name in run.facts}


def _rank_state(run: Run) -> dict[str, Any]:
    models = [run.model, *([run.averaged_model] if run.ema else [])]
    _, numpy_keys, *numpy_rest = np.random.get_state()
    version, python_keys, gauss = random.getstate()
    state = {
        "moved": [[as_vector(part).cpu() for part in _moved(model)] for model in models],
        "meter": run.meter.sums.cpu(),
        "rng": torch.get_rng_state(),
        "numpy_rng": [torch.from_numpy(np.asarray(numpy_keys).astype(np.int64)), *numpy_rest],
        "python_rng": [version, list(python_keys), gauss],
    }
    if run.rank.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(run.rank.device)
    return state


def _moved(model: RSNet) -> list[list[Tensor]]:
    """What each rank's own forwards have moved, by type."""
    return by_dtype(moved_by_forward(model))


def restore_rank(run: Run, state: dict[str, Any]) -> None:
    """Puts back what belongs to this rank: statistics, loss sums and random numbers."""
    models = [run.model, *([run.averaged_model] if run.ema else [])]
    for model, vectors in zip(models, state["moved"], strict=True):
        for tensors, vector in zip(_moved(model), vectors, strict=True):
            fill_from_vector(tensors, vector.to(run.rank.device))
    run.meter.sums.copy_(state["meter"])
    torch.set_rng_state(state["rng"])
    keys, *rest = state["numpy_rng"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, python_keys, gauss = state["python_rng"]
    random.setstate((version, tuple(python_keys), gauss))
    if "cuda_rng" in state and run.rank.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], run.rank.device)


def _gather(rank: Rank, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Of all ranks, on rank 0."""
    if rank.world_size == 1:
        return [own]
    everyone: list[Any] = [None] * rank.world_size
    dist.gather_object(own, everyone if rank.is_main else None, group=rank.host_group)
    return everyone
