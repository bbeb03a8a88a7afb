"""`torchrun -m rsfast.train`: the training loop. The file to read first.

`rsfast.run.build` does everything that happens once; what happens at every step and at the end of
every epoch stands here.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from rsfast import distributed
from rsfast.config import TrainConfig, parse_args
from rsfast.data import prefetch
from rsfast.engine import PRECISIONS
from rsfast.optim import set_lr
from rsfast.run import Run, build, save
from rsfast.validation import Accuracy, validate

__all__ = ["main", "train"]

_LOG = logging.getLogger("rsfast")


def train(cfg: TrainConfig) -> Accuracy | None:
    """Trains as the settings say.

    Returns:
        The accuracy after the last epoch; None if a resumed run had no epoch left.

    Raises:
        ValueError: naming the setting, the rule and the value.
        FloatingPointError: if too many steps in a row had to be left out.
    """
    rank = distributed.join(cfg.device)
    try:
        return train_epochs(build(cfg, rank))
    finally:
        distributed.leave()


def train_epochs(run: Run) -> Accuracy | None:
    """All epochs that are left; returns the accuracy after the last one."""
    accuracy = None
    try:
        for epoch in range(run.first_epoch, run.cfg.epochs):
            losses = train_epoch(run, epoch)
            accuracy = finish_epoch(run, epoch, losses)
    finally:
        if run.profile:
            run.profile.close()
        if run.log:
            run.log.close()
    return accuracy


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """One pass over the data; returns the mean losses in nats."""
    run.model.train()
    run.train_loader.epoch = epoch
    mean = _Mean()
    images_per_step = run.cfg.batch_size * run.rank.world_size
    bar = _progress_bar(run, epoch, images_per_step)
    clock, logged = time.perf_counter(), 0
    for done, batch in enumerate(prefetch(run.train_loader, run.rank.device), start=1):
        step = epoch * run.steps_per_epoch + done - 1
        if run.profile:
            run.profile.before(step)
        set_lr(run.optimizer, run.lr(step))
        run.meter.add(run.step(batch))  # tensors stay on the device
        if run.ema:
            run.ema.update_parameters(run.model)
        bar.update(images_per_step)
        if done % run.cfg.log_every == 0 or done == run.steps_per_epoch:
            losses = run.meter.read()  # the only host synchronisation
            images_per_s = (done - logged) * images_per_step / (time.perf_counter() - clock)
            bar.set_postfix_str(f"loss {losses['loss']:.3f}")
            report(run, step, losses, images_per_s)
            mean.add(losses, done - logged)
            clock, logged = time.perf_counter(), done
    bar.close()
    return mean.read()


def report(run: Run, step: int, losses: dict[str, float], images_per_s: float) -> None:
    """Writes a log line, and stops the run if too many steps in a row were left out."""
    skipped, in_a_row = run.step.guard.read()
    if run.log:
        epoch = step // run.steps_per_epoch + 1
        rates = {"lr": run.lr(step), "images_per_s": round(images_per_s, 1)}
        run.log.step(step + 1, epoch=epoch, **losses, skipped=skipped, **rates)
        if skipped:
            _LOG.warning(
                "step %d: %d steps since the last line were left out, %d in a row: their loss or "
                "gradients were not finite",
                step + 1,
                skipped,
                in_a_row,
            )
    if in_a_row >= run.cfg.max_skipped:
        last = run.folder / "last.pt"
        saved = f"the last good checkpoint is {last}" if last.exists() else "nothing is saved yet"
        raise FloatingPointError(
            f"the loss or its gradients were not finite at {in_a_row} steps in a row up to step "
            f"{step + 1}; {saved}; a lower --lr or some --warmup-epochs may help"
        )


def finish_epoch(run: Run, epoch: int, losses: dict[str, float]) -> Accuracy:
    """Validates, saves and logs."""
    model = run.averaged_model
    distributed.average_bn_statistics(model)
    weights = run.loss.ensemble_weights
    dtype = PRECISIONS[run.cfg.precision or "fp32"]
    accuracy = validate(model, weights, run.val_loader, dtype)
    is_best = accuracy.score > run.best
    run.best = max(run.best, accuracy.score)
    if run.log:
        step = (epoch + 1) * run.steps_per_epoch
        row: dict[str, float] = {"epoch": epoch + 1, "lr": run.lr(step - 1), **losses}
        for r, (top1, top5) in zip(run.cfg.resolutions, accuracy.levels, strict=True):
            row |= {f"top1_{r}": top1, f"top5_{r}": top5}
        row |= {"top1_ensemble": accuracy.ensemble[0], "top5_ensemble": accuracy.ensemble[1]}
        for r, weight in zip(run.cfg.resolutions, weights.tolist(), strict=True):
            row[f"alpha_{r}"] = weight
        # Logged first: a resumed run drops what is newer than its checkpoint, and misses nothing.
        run.log.epoch(step, row)
        save(run, epoch + 1, is_best)
        _print_epoch(run, epoch, losses["loss"], accuracy, is_best)
    return accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 bad input, 1 training failed, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    cfg = parse_args(argv)
    try:
        train(cfg)
    except (ValueError, ImportError) as error:
        print(f"rsfast.train: error: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, RuntimeError) as error:
        print(f"rsfast.train: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rsfast.train: interrupted; --resume auto continues", file=sys.stderr)
        return 130
    return 0


class _Mean:
    """Mean of log lines, each as heavy as it has steps; lines without a finite step count not."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weight = 0

    def add(self, values: dict[str, float], weight: int) -> None:
        finite = math.isfinite(values["loss"])
        self._weight += weight if finite else 0
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + (value * weight if finite else 0.0)

    def read(self) -> dict[str, float]:
        return {n: v / self._weight if self._weight else math.nan for n, v in self._sums.items()}


def _progress_bar(run: Run, epoch: int, images_per_step: int) -> tqdm:
    return tqdm(
        total=run.steps_per_epoch * images_per_step,
        desc=f"epoch {epoch + 1}/{run.cfg.epochs}",
        unit="img",
        unit_scale=True,
        disable=run.log is None,
        leave=False,
    )


def _print_epoch(run: Run, epoch: int, loss: float, accuracy: Accuracy, is_best: bool) -> None:
    levels = zip(run.cfg.resolutions, accuracy.levels, strict=True)
    top1 = "  ".join(f"{r}: {values[0]:.1f}" for r, values in levels)
    print(
        f"epoch {epoch + 1}/{run.cfg.epochs}  loss {loss:.3f}  top-1 {top1}  "
        f"ensemble: {accuracy.ensemble[0]:.1f}{'  (best)' if is_best else ''}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
