"""Optimiser and schedule under their public name; :mod:`rsfast.engine.optim` is the code."""

from rsfast.engine.optim import OPTIMIZERS, SCHEDULES, build_optimizer, lr_at, set_lr

__all__ = ["OPTIMIZERS", "SCHEDULES", "build_optimizer", "lr_at", "set_lr"]
