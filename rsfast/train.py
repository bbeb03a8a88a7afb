"""`torchrun -m rsfast.train`: the training loop. The file to read first.

`rsfast.training.start.build` does everything that happens once; what happens at every step and at
the end of every epoch stands here.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rsfast.config import TrainConfig, parse_args
from rsfast.data import Batch, prefetch
from rsfast.engine import PRECISIONS
from rsfast.engine.optim import set_lr
from rsfast.files.progress import progress
from rsfast.runtime import distributed
from rsfast.runtime.interrupt import STOPPED, Interrupt, Stopped
from rsfast.tasks import Accuracy
from rsfast.training.folder import claimed
from rsfast.training.resume import save
from rsfast.training.run import Progress, Run
from rsfast.training.start import build
from rsfast.training.validation import validate_all

__all__ = ["main", "train"]

_LOG = logging.getLogger("rsfast")


def train(cfg: TrainConfig) -> Accuracy | None:
    """Trains as the settings say.

    Returns:
        The accuracy after the last epoch; None if a resumed run had no epoch left.

    Raises:
        ValueError: naming the setting, the rule and the value.
        FloatingPointError: if too many steps in a row had to be left out.
        Stopped: after SIGTERM or SIGUSR1, once the step is done and saved.
    """
    with Interrupt() as interrupt:
        rank = distributed.join(cfg.device)
        stopped = None
        try:
            with claimed(cfg.folder, rank):
                accuracy = train_epochs(build(cfg, rank), interrupt)
        except Stopped as reason:
            # Its traceback would hold the run, and so the step, until the group is left.
            stopped = reason.with_traceback(None)
        distributed.leave()
        if stopped is not None:
            raise stopped
        return accuracy


def train_epochs(run: Run, interrupt: Interrupt) -> Accuracy | None:
    """All epochs that are left; returns the accuracy after the last one."""
    accuracy = None
    interrupt.defer()
    try:
        while run.at.epoch < run.cfg.epochs:
            if not run.at.validating:
                train_epoch(run, interrupt)
            accuracy = finish_epoch(run, interrupt)
        run.vote.result()
    finally:
        if run.profile:
            run.profile.close()
        if run.log:
            run.log.close()
        run.step.close()
    return accuracy


def train_epoch(run: Run, interrupt: Interrupt) -> None:
    """One pass over the data, or what is left of it."""
    run.model.train()
    at, loader = run.at, run.train_loader
    loader.epoch, loader.first_step = at.epoch, at.step
    images_per_step = run.cfg.batch_size * run.rank.world_size
    run.clock.start()
    with _progress_bar(run, images_per_step) as bar:
        for batch in prefetch(loader, run.rank.device):
            step = run.steps_done
            if run.profile:
                run.profile.before(step)
            run.clock.step()
            set_lr(run.optimizer, run.lr(step))
            run.meter.add(run.step(batch))  # tensors stay on the device
            if run.ema:
                run.ema.update(run.model)
            at.step += 1
            bar.update(images_per_step)
            if at.step % run.cfg.log_every == 0 or at.step == run.steps_per_epoch:
                losses = run.meter.read()  # the only host synchronisation
                images_per_s = images_per_step * run.clock.read()
                bar.set_postfix_str(f"loss {losses['loss']:.3f}")
                at.mean.add(losses, at.step - at.logged)
                at.logged = at.step
                report(run, step, losses, images_per_s)
            save_if_due(run, interrupt)


def save_if_due(run: Run, interrupt: Interrupt) -> None:
    """Writes a checkpoint where all ranks agree that it is time, or that a signal asked for it."""
    steps, seconds = run.checkpoint_interval
    late = bool(seconds) and run.rank.is_main and time.monotonic() - run.saved >= seconds
    stop, late = run.vote(interrupt.requested, late)
    due = late or (bool(steps) and run.steps_done % steps == 0)
    if stop or (due and run.at.step < run.steps_per_epoch):
        save(run)
    if stop:
        raise Stopped(f"saved after step {run.steps_done}")


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


def finish_epoch(run: Run, interrupt: Interrupt) -> Accuracy:
    """Validates, saves and logs."""
    # The averaged one first: it is the one that counts.
    models, at = [*([run.ema.module] if run.ema else []), run.model], run.at
    if not at.validating:
        for model in models:
            distributed.average_bn_statistics(model)
        at.validating = True
    weights = run.loss.ensemble_weights
    dtype = PRECISIONS[run.cfg.precision or "fp32"]
    accuracy, *plain = validate_all(models, weights, _stoppable(run, interrupt), dtype)
    is_best = accuracy.score > run.best
    run.best = max(run.best, accuracy.score)
    losses, step = at.mean.read(), run.steps_done
    run.at = Progress(at.epoch + 1)
    if run.log:
        row: dict[str, float] = {"epoch": run.at.epoch, "lr": run.lr(step - 1), **losses}
        row |= accuracy.columns(run.cfg.resolutions)
        for other in plain:
            row |= {f"plain_{k}": v for k, v in other.columns(run.cfg.resolutions).items()}
        for r, weight in zip(run.cfg.resolutions, weights.tolist(), strict=True):
            row[f"alpha_{r}"] = weight
        # Logged first: a resumed run drops what is newer than its checkpoint, and misses nothing.
        run.log.epoch(step, row)
        line = f"epoch {run.at.epoch}/{run.cfg.epochs}  loss {losses['loss']:.3f}"
        best = "  (best)" if is_best else ""
        print(f"{line}  {accuracy.line(run.cfg.resolutions)}{best}", flush=True)
        for other in plain:
            print(f"  without averaging: {other.line(run.cfg.resolutions)}", flush=True)
    save(run, is_best=is_best)
    return accuracy


def _stoppable(run: Run, interrupt: Interrupt) -> Iterator[Batch]:
    """Validation batches; a signal ends the run between two of them."""
    # Ranks may differ by a batch, and only those that all have can be voted on.
    shared = math.ceil(run.val_loader.num_images // run.rank.world_size / run.cfg.batch_size)
    for number, batch in enumerate(prefetch(run.val_loader, run.rank.device)):
        yield batch
        if number < shared and run.vote(interrupt.requested, False)[0]:
            save(run)
            raise Stopped(f"saved after step {run.steps_done}, in its validation")


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Exit codes: 0 done, 1 training failed, 2 bad input, 75 stopped by SIGTERM or SIGUSR1 (saved,
    once there was a step to save), 130 interrupted from the keyboard.
    """
    level = logging.INFO if distributed.is_first() else logging.ERROR  # once is enough
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    code = _train(parse_args(argv))
    if code:
        distributed.abandon(code)
    return code


def _train(cfg: TrainConfig) -> int:
    """Trains; says what went wrong, and returns the exit code."""
    try:
        train(cfg)
    except (ValueError, ImportError) as error:
        print(f"rsfast.train: error: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, RuntimeError, OSError) as error:
        print(f"rsfast.train: error: {error}", file=sys.stderr)
        return 1
    except Stopped as reason:
        if distributed.is_first():
            print(f"rsfast.train: stopped, {reason}; {_what_next(cfg)}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"rsfast.train: interrupted; {_what_next(cfg)}", file=sys.stderr)
        return 130
    return 0


def _what_next(cfg: TrainConfig) -> str:
    last = cfg.folder / "last.pt"
    return f"--resume auto continues from {last}" if last.exists() else "nothing is saved yet"


def _progress_bar(run: Run, images_per_step: int) -> Any:
    return progress(
        lines="asked",
        total=run.steps_per_epoch * images_per_step,
        initial=run.at.step * images_per_step,
        desc=f"epoch {run.at.epoch + 1}/{run.cfg.epochs}",
        unit="img",
        unit_scale=True,
        disable=run.log is None,
        leave=False,
    )


if __name__ == "__main__":
    sys.exit(main())
