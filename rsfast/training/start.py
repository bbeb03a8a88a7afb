"""The start of a run: every side effect of it, once."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsfast.config import TrainConfig, profiled_steps
from rsfast.data import ImageIndex, Loader, default_workers, train_loader, val_loader
from rsfast.data.builtin import builtin_root
from rsfast.data.labels import warn_of_numbers
from rsfast.engine import PRECISIONS, TrainStep
from rsfast.engine.ema import AveragedModel
from rsfast.engine.optim import build_optimizer
from rsfast.kernels import MAX_LEVELS, choose_backend
from rsfast.models import RSNet, create_model
from rsfast.models.parts import decoder_of, freeze
from rsfast.runtime import environment
from rsfast.runtime.distributed import Rank, agree, first_rank_first, same_everywhere
from rsfast.runtime.nvtx import ProfileWindow, enable_ranges, name_layers
from rsfast.tasks import settings_of, task_of
from rsfast.training import checkpoint
from rsfast.training.ancestor import continue_from
from rsfast.training.origin import start_from_weights
from rsfast.training.resume import config_hash, find_checkpoint, restore
from rsfast.training.run import Run
from rsfast.training.runlog import RunLog
from rsfast.training.smallest_map import check_map_sizes

__all__ = ["build"]

_LOG = logging.getLogger("rsfast")
_PADDED_CHANNELS = 4


def build(cfg: TrainConfig, rank: Rank) -> Run:
    """Makes a run out of its settings, continued from a checkpoint if they say so.

    Raises:
        ValueError: naming the setting, the rule and the value.
    """
    cfg = _resolve(cfg, rank)
    folder = cfg.folder
    resume_from = agree(rank, lambda: find_checkpoint(cfg, folder))
    _prepare_process(cfg)
    loaders = _loaders(cfg, rank)
    if rank.device.type == "cuda":
        # What autocast would cast to, and the channels that tensor cores take.
        dtype = PRECISIONS[cfg.precision or "fp32"] or torch.float32
        for loader in loaders:
            loader.feed(dtype, _PADDED_CHANNELS, cfg.kernels)
    model = _network(cfg, rank, loaders[0])
    origin = {} if resume_from else start_from_weights(cfg, rank, model, loaders[0])
    freeze(model, cfg.freeze or ())
    task = task_of(cfg)
    of_task = settings_of(cfg, task.loss_settings)
    loss = task.loss(len(cfg.resolutions), cfg.distill, backend=cfg.kernels, **of_task)
    loss.to(rank.device)
    optimizer = build_optimizer(
        model,
        loss,
        lr=cfg.lr,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
        nesterov=cfg.nesterov,
        decay=cfg.decay,
        decoder=decoder_of(model) if cfg.decoder_lr != 1.0 else frozenset(),
        decoder_lr=cfg.decoder_lr,
        kind=cfg.optimizer,
    )
    profile = _profile(cfg, model, rank)  # first: the step asks whether it has names to give
    run = Run(
        cfg=cfg,
        rank=rank,
        folder=folder,
        train_loader=loaders[0],
        val_loader=loaders[1],
        model=model,
        loss=loss,
        optimizer=optimizer,
        step=TrainStep(model, loss, optimizer, precision=cfg.precision or "fp32", graph=cfg.graph),
        ema=AveragedModel(model, cfg.ema_decay, cfg.ema_warmup) if cfg.ema_decay else None,
        facts=environment.describe(rank.device) if rank.is_main else {},
        data_set={"train": loaders[0].plan.digest, "val": loaders[1].plan.digest},
        profile=profile,
        origin=origin,
    )
    if not same_everywhere(rank, run.data_set):
        raise ValueError(
            f"all processes must see the same images in {cfg.images}, and do not: run "
            f"python -m rsfast.data check on every machine, or share one RSFAST_CACHE"
        )
    if resume_from:
        restore(run, resume_from)
    elif cfg.continue_from:
        continue_from(run, Path(cfg.continue_from))
    agree(rank, lambda: _open_folder(run))
    return run


def _resolve(cfg: TrainConfig, rank: Rank) -> TrainConfig:
    """Fills in the settings whose default depends on the machine."""
    precision = cfg.precision or ("bf16" if rank.device.type == "cuda" else "fp32")
    output = str(cfg.folder)
    kernels = choose_backend(cfg.kernels, rank.device)
    levels = cfg.copies * len(cfg.resolutions)
    if kernels != "torch" and levels > MAX_LEVELS:
        raise ValueError(
            f"resolutions times copies must be at most {MAX_LEVELS} for {kernels}, got {levels}"
        )
    return dataclasses.replace(cfg, precision=precision, output=output, kernels=kernels)


def _prepare_process(cfg: TrainConfig) -> None:
    torch.manual_seed(cfg.seed)
    random.seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    torch.backends.cudnn.benchmark = not cfg.deterministic  # sizes never change within a run
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    # Gradients of a run that diverges are denormal, which x86 computes a hundred times slower.
    torch.set_flush_denormal(True)


def _network(cfg: TrainConfig, rank: Rank, loader: Loader) -> RSNet:
    """On the device, and knowing what images it gets."""
    num_classes = len(loader.class_names)
    model = create_model(
        cfg.arch,
        cfg.resolutions,
        num_classes,
        cfg.bn,
        weight_bits=cfg.weight_bits,
        activation_bits=cfg.activation_bits,
        zero_init_residual=cfg.zero_init_residual,
        task=cfg.task,
        backend=cfg.kernels,
    )
    if rank.index:  # all ranks drew the same weights; each drops units of its own
        torch.manual_seed(cfg.seed + rank.index)
    model.to(rank.device)
    model.fix_activation_basis(cfg.fix_activation_basis)
    model.sync_batch_norm(cfg.sync_bn and rank.world_size > 1)
    check_map_sizes(model, cfg.batch_size, rank.world_size if cfg.sync_bn else 1)
    model.input_mean, model.input_std = loader.mean, loader.std
    model.val_crop, model.class_names = cfg.val_crop, loader.class_names
    model.exif, model.ignore_label = cfg.exif, cfg.ignore_label
    model.levels, model.picked_from = cfg.levels, cfg.picked_from
    return model


def _profile(cfg: TrainConfig, model: RSNet, rank: Rank) -> ProfileWindow | None:
    if cfg.profile is None:
        return None
    if rank.device.type != "cuda":
        raise ValueError(f"profile marks steps for Nsight and needs a GPU, got {rank.device}")
    enable_ranges()
    name_layers(model)
    return ProfileWindow(*profiled_steps(cfg.profile))


def _loaders(cfg: TrainConfig, rank: Rank) -> tuple[Loader, Loader]:
    common: dict[str, Any] = {
        "backend": cfg.loader,
        "rank": rank.index,
        "world_size": rank.world_size,
        "workers": cfg.workers,
        "hw_decoder_load": cfg.hw_decoder_load,
        "dont_use_mmap": cfg.dont_use_mmap,
        "strict": cfg.strict,
        "exif": cfg.exif,
        "levels": cfg.levels,
        "picked_from": cfg.picked_from,
        "tolerate_truncated": cfg.tolerate_truncated,
        "device": rank.device,
    }
    task = task_of(cfg)
    with first_rank_first(rank):
        root = cfg.data
        if cfg.is_builtin:
            root = str(builtin_root(**task.builtin))
            if rank.is_main:
                _LOG.info("no --data given: using the built-in generated set in %s", root)
        training = train_loader(
            cfg.train_data or root,
            cfg.resolutions,
            cfg.batch_size,
            normalize=cfg.normalize,
            seed=cfg.seed,
            max_steps=cfg.steps_per_epoch,
            **settings_of(cfg, task.train_settings),
            **common,
        )
        validation = val_loader(
            cfg.val_data or root,
            cfg.resolutions,
            cfg.batch_size,
            normalize=cfg.normalize,
            # Random labels teach nothing: one batch shows that validation runs.
            num_images=cfg.batch_size * rank.world_size,
            **settings_of(cfg, task.val_settings),
            **common,
        )
    if training.class_names != validation.class_names and cfg.loader != "synthetic":
        odd = sorted(set(training.class_names) ^ set(validation.class_names))
        raise ValueError(
            f"train/ and val/ of {cfg.images} must have the same classes, in the same "
            f"order, but {len(odd)} are in one only: {odd[:3]}"
        )
    if cfg.task == "classification":
        warn_of_numbers(cfg.train_data or root, training.class_names)
    if rank.is_main:
        _say_what_is_odd(cfg, training, validation)
    return training, validation


def _say_what_is_odd(cfg: TrainConfig, training: Loader, validation: Loader) -> None:
    """Images that are named and not read, or are trained and validated on."""
    if cfg.loader == "synthetic":
        if named := [name for name in (cfg.data, cfg.train_data, cfg.val_data) if name]:
            _LOG.info(
                "loader synthetic does not read %s: images are random, of %d classes",
                " and ".join(named),
                len(training.class_names),
            )
        return
    ours, others = (_places(loader.plan.index) for loader in (training, validation))
    if both := sorted(ours & others):
        _LOG.warning(
            "training and validation read the same images, so that the accuracy is that of images "
            "seen in training: %s%s",
            both[0],
            f" and {len(both) - 1} more" if both[1:] else "",
        )


def _places(index: ImageIndex) -> set[str]:
    """The archives of a split, or its folder, wherever links lead."""
    return {os.path.realpath(place) for place in index.files or (index.root,)}


def _open_folder(run: Run) -> None:
    """Creates the run folder and its log, and says what is about to happen."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.toml").write_text(run.cfg.to_toml())
    except OSError as error:
        raise ValueError(f"output folder {run.folder} cannot be written: {error}") from error
    checkpoint.clean(run.folder)
    _check_space(run)
    steps = None if run.at.restarted else run.steps_done
    draw_epochs = task_of(run.cfg).draw_epochs
    run.log = RunLog(run.folder, run.cfg.resolutions, run.at.epoch, steps, draw_epochs)
    norms = sum(p.numel() for norm in run.model.batch_norms() for p in norm.parameters())
    facts = {
        **run.facts,
        "world_size": run.rank.world_size,
        "total_batch": run.rank.world_size * run.cfg.batch_size,
        "device": str(run.rank.device),
        "kernels": run.cfg.kernels,
        "config_hash": config_hash(run.cfg),
        "train_images": run.train_loader.num_images,
        "val_images": run.val_loader.num_images,
        "truncated_images": sum(
            len(loader.plan.index.copies or ()) for loader in (run.train_loader, run.val_loader)
        ),
        "classes": len(run.train_loader.class_names),
        "workers": default_workers() if run.cfg.workers is None else run.cfg.workers,
        "train_set": run.data_set["train"],
        "val_set": run.data_set["val"],
        "steps_per_epoch": run.steps_per_epoch,
        "parameters_shared": _count(run.model) - norms,
        "parameters_batch_norm": norms,
        "parameters_frozen": sum(p.numel() for p in run.model.parameters() if not p.requires_grad),
        **run.origin,
    }
    run.log.write("start", step=run.steps_done, **facts, config=dataclasses.asdict(run.cfg))
    for name, value in facts.items():
        _LOG.info("%-22s %s", name, f"{value:,}" if isinstance(value, int) else value)
    if run.steps_done:
        within = f" and {run.at.step} of {run.steps_per_epoch} steps" if run.at.step else ""
        _LOG.info("resumed after epoch %d of %d%s", run.at.epoch, run.cfg.epochs, within)
        if run.at.epoch == run.cfg.epochs:
            _LOG.info("nothing is left to do")


def _check_space(run: Run) -> None:
    """Refuses a disk that does not hold the run's checkpoints."""
    tensors = [*run.model.state_dict().values()] * (2 if run.ema else 1)
    tensors += [buffer for state in run.optimizer.state.values() for buffer in state.values()]
    size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    size += sum(tensor.nbytes for tensor in run.model.buffers()) * run.rank.world_size
    # Those kept, the best one twice (as safetensors too), and the one that is being written;
    # less what earlier starts of the run have written.
    files = [*run.folder.glob("last*.pt"), *run.folder.glob("model_best.*")]
    needed = (run.cfg.keep + 3) * size - sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        raise ValueError(
            f"output folder {run.folder} must have room for {run.cfg.keep + 3} checkpoints, "
            f"{needed / 2**30:.2f} GiB more, {free / 2**30:.2f} are free"
        )


def _count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
