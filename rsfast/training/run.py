"""A training run: every side effect of start-up, and what is saved and restored."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rsfast.config import TrainConfig, checkpoint_interval, profiled_steps
from rsfast.data import Loader, train_loader, val_loader
from rsfast.data.builtin import builtin_root
from rsfast.engine import PRECISIONS, TrainStep
from rsfast.engine.metrics import LossMeter
from rsfast.engine.optim import build_optimizer, lr_at
from rsfast.kernels import MAX_LEVELS, choose_backend, without_extension
from rsfast.losses import MultiResolutionDistillation
from rsfast.models import RSNet, create_model
from rsfast.runtime import environment
from rsfast.runtime.distributed import Rank, agree, first_rank_first, same_everywhere
from rsfast.runtime.interrupt import Vote
from rsfast.runtime.nvtx import ProfileWindow, enable_ranges, name_layers
from rsfast.training import checkpoint
from rsfast.training.resume import Progress, config_hash, digest, find_checkpoint, restore
from rsfast.training.runlog import RunLog

__all__ = ["Run", "build", "run_folder"]

_LOG = logging.getLogger("rsfast")
_PADDED_CHANNELS = 4
_RECIPE_BATCH = 256  # that the learning rates of the recipes belong to


@dataclass(kw_only=True)
class Run:
    """Everything that lives as long as a training run.

    Attributes:
        cfg: resolved settings.
        rank: this process.
        folder: of the run.
        step: one training step.
        ema: averaged weights, if asked for.
        profile: which steps a profiler records, if any.
        log: writer of the run's files, on rank 0.
        at: where the run is.
        best: score of the best epoch so far.
        meter: losses since the last log line.
        vote: what all ranks agree on after a step.
        checkpoint_interval: steps and seconds between checkpoints; 0 for none.
        facts: what it runs on, on rank 0.
        data_set: names for the images of both splits.
        saved: when the last checkpoint was written or the run began, in seconds of
            `time.monotonic`.
    """

    cfg: TrainConfig
    rank: Rank
    folder: Path
    train_loader: Loader
    val_loader: Loader
    model: RSNet
    loss: MultiResolutionDistillation
    optimizer: torch.optim.Optimizer
    step: TrainStep
    ema: AveragedModel | None
    profile: ProfileWindow | None = None
    log: RunLog | None = None
    at: Progress = field(default_factory=Progress)
    best: tuple[float, float] = (-1.0, -1.0)
    meter: LossMeter = field(init=False)
    vote: Vote = field(init=False)
    checkpoint_interval: tuple[int, float] = field(init=False)
    facts: dict[str, Any] = field(init=False)
    data_set: dict[str, str] = field(init=False)
    saved: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        self.meter = LossMeter(self.rank.device)
        self.vote = Vote(self.rank.host_group)
        self.checkpoint_interval = checkpoint_interval(self.cfg.checkpoint_every)
        self.facts = environment.describe(self.rank.device) if self.rank.is_main else {}
        loaders = {"train": self.train_loader, "val": self.val_loader}
        self.data_set = {name: digest(loader.plan.index) for name, loader in loaders.items()}

    @property
    def steps_per_epoch(self) -> int:
        """The same on all ranks."""
        return len(self.train_loader)

    @property
    def steps_done(self) -> int:
        """Since the beginning of the run."""
        return self.at.epoch * self.steps_per_epoch + self.at.step

    @property
    def averaged_model(self) -> RSNet:
        """The network to validate: the averaged one where there is one."""
        averaged = self.ema.module if self.ema else self.model
        assert isinstance(averaged, RSNet)
        return averaged

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        warmup = round(self.cfg.warmup_epochs * self.steps_per_epoch)
        total = self.cfg.epochs * self.steps_per_epoch
        highest = self.cfg.lr
        if self.cfg.scale_lr:
            highest *= self.rank.world_size * self.cfg.batch_size / _RECIPE_BATCH
        return lr_at(step, total, highest, warmup)


def run_folder(cfg: TrainConfig) -> Path:
    """Where a run with these settings writes."""
    return Path(cfg.output or f"runs/{cfg.arch}")


def build(cfg: TrainConfig, rank: Rank) -> Run:
    """Makes a run out of its settings, continued from a checkpoint if they say so.

    Raises:
        ValueError: naming the setting, the rule and the value.
    """
    cfg = _resolve(cfg, rank)
    folder = run_folder(cfg)
    resume_from = agree(rank, lambda: find_checkpoint(cfg, folder))
    _prepare_process(cfg)
    loaders = _loaders(cfg, rank)
    if rank.device.type == "cuda":
        # What autocast would cast to, and the channels that tensor cores take.
        dtype = PRECISIONS[cfg.precision or "fp32"] or torch.float32
        for loader in loaders:
            loader.feed(dtype, _PADDED_CHANNELS, without_extension(cfg.kernels))
    num_classes = len(loaders[0].class_names)
    model = create_model(cfg.arch, cfg.resolutions, num_classes, cfg.bn, backend=cfg.kernels)
    model.to(rank.device)
    model.sync_batch_norm(cfg.sync_bn and rank.world_size > 1)
    model.input_mean, model.input_std = loaders[0].mean, loaders[0].std
    model.val_crop, model.class_names = cfg.val_crop, loaders[0].class_names
    loss = MultiResolutionDistillation(
        len(cfg.resolutions),
        cfg.distill,
        cfg.label_smoothing,
        copies=cfg.copies,
        backend=without_extension(cfg.kernels),
    )
    loss.to(rank.device)
    optimizer = build_optimizer(
        model,
        loss,
        lr=cfg.lr,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
        nesterov=cfg.nesterov,
        decay=cfg.decay,
        kind=cfg.optimizer,
    )
    ema = None
    if cfg.ema_decay:
        average = get_ema_multi_avg_fn(cfg.ema_decay)
        ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
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
        ema=ema,
        profile=profile,
    )
    if not same_everywhere(rank, run.data_set):
        raise ValueError(
            f"data folder {cfg.data} must show all processes the same images, and does not: run "
            f"python -m rsfast.data check on every machine, or share one RSFAST_CACHE"
        )
    if resume_from:
        restore(run, resume_from)
    agree(rank, lambda: _open_folder(run))
    return run


def _resolve(cfg: TrainConfig, rank: Rank) -> TrainConfig:
    """Fills in the settings whose default depends on the machine."""
    precision = cfg.precision or ("bf16" if rank.device.type == "cuda" else "fp32")
    output = str(run_folder(cfg))
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
        "strict": cfg.strict,
        "device": rank.device,
    }
    with first_rank_first(rank):
        root = cfg.data
        if root is None and cfg.loader != "synthetic":
            root = str(builtin_root())
            if rank.is_main:
                _LOG.info("no --data given: using the built-in generated set in %s", root)
        training = train_loader(
            root,
            cfg.resolutions,
            cfg.batch_size,
            copies=cfg.copies,
            crop=cfg.crop,
            flip=cfg.flip,
            normalize=cfg.normalize,
            seed=cfg.seed,
            crop_area=(cfg.crop_area[0], cfg.crop_area[1]),
            max_steps=cfg.steps_per_epoch,
            **common,
        )
        validation = val_loader(
            root,
            cfg.resolutions,
            cfg.batch_size,
            normalize=cfg.normalize,
            crop=cfg.val_crop,
            # Random labels teach nothing: one batch shows that validation runs.
            num_images=cfg.batch_size * rank.world_size,
            **common,
        )
    if training.class_names != validation.class_names and cfg.loader != "synthetic":
        odd = sorted(set(training.class_names) ^ set(validation.class_names))
        raise ValueError(
            f"train/ and val/ of {root} must have the same classes, "
            f"but {len(odd)} are in one only: {odd[:3]}"
        )
    return training, validation


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
    run.log = RunLog(run.folder, run.cfg.resolutions, run.at.epoch, steps)
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
        "classes": len(run.train_loader.class_names),
        "train_set": run.data_set["train"],
        "val_set": run.data_set["val"],
        "steps_per_epoch": run.steps_per_epoch,
        "parameters_shared": _count(run.model) - norms,
        "parameters_batch_norm": norms,
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
