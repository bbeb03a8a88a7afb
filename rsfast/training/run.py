"""A training run: everything that lives as long as it does, and where it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rsfast.config import TrainConfig, checkpoint_interval
from rsfast.data import Loader
from rsfast.engine import TrainStep
from rsfast.engine.ema import AveragedModel
from rsfast.engine.metrics import EpochMean, LossMeter, StepClock
from rsfast.engine.optim import lr_at
from rsfast.losses import LossTerms, MultiResolutionDistillation
from rsfast.models import RSNet
from rsfast.runtime.distributed import Rank
from rsfast.runtime.interrupt import Vote
from rsfast.runtime.nvtx import ProfileWindow
from rsfast.training.runlog import RunLog

__all__ = ["Progress", "Run"]

_RECIPE_BATCH = 256  # that the learning rates of the recipes belong to


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        epoch: under way, from 0.
        step: steps of it that are done.
        logged: steps of it that are in the log.
        validating: all its steps are done and batch-norm statistics are averaged over the ranks.
        mean: of its log lines.
        restarted: a part of it was done before, with other batches.
    """

    epoch: int = 0
    step: int = 0
    logged: int = 0
    validating: bool = False
    mean: EpochMean = field(default_factory=EpochMean)
    restarted: bool = False


@dataclass(kw_only=True)
class Run:
    """Everything that lives as long as a training run.

    Attributes:
        cfg: resolved settings.
        rank: this process.
        folder: of the run.
        step: one training step.
        ema: averaged weights, if asked for.
        facts: what it runs on, on rank 0.
        data_set: names for the images of both splits.
        profile: which steps a profiler records, if any.
        origin: what it began from, other than random weights.
        log: writer of the run's files, on rank 0.
        at: where the run is.
        best: score of the best epoch so far; () is less than any.
        meter: losses since the last log line.
        clock: speed since then.
        vote: what all ranks agree on after a step.
        checkpoint_interval: steps and seconds between checkpoints; 0 for none.
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
    ema: AveragedModel[RSNet] | None
    facts: dict[str, Any]
    data_set: dict[str, str]
    profile: ProfileWindow | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    log: RunLog | None = None
    at: Progress = field(default_factory=Progress)
    best: tuple[float, ...] = ()
    meter: LossMeter = field(init=False)
    clock: StepClock = field(init=False)
    vote: Vote = field(init=False)
    checkpoint_interval: tuple[int, float] = field(init=False)
    saved: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        self.meter = LossMeter(LossTerms._fields, self.rank.device)
        self.clock = StepClock(self.rank.device)
        # Hosts count in well under a step, up to some dozens of them.
        self.vote = Vote(self.rank.host_group, every=max(1, self.rank.world_size // 8))
        self.checkpoint_interval = checkpoint_interval(self.cfg.checkpoint_every)

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
        return self.ema.module if self.ema else self.model

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        warmup = round(self.cfg.warmup_epochs * self.steps_per_epoch)
        total = self.cfg.epochs * self.steps_per_epoch
        highest = self.cfg.lr
        if self.cfg.scale_lr:
            highest *= self.rank.world_size * self.cfg.batch_size / _RECIPE_BATCH
        milestones = [epoch * self.steps_per_epoch for epoch in self.cfg.milestones]
        shape: Any = {"schedule": self.cfg.schedule, "milestones": milestones}
        return lr_at(step, total, highest, warmup, **shape, gamma=self.cfg.gamma)
