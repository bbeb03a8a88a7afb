"""`python -m rsfast.evaluate CHECKPOINT`: accuracy at every resolution, trained or not."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rsfast import figures
from rsfast.config.flags import (
    add_common_flags,
    common_settings,
    parse_resolutions,
    refuse_flags_of_others,
    refuse_unknown,
)
from rsfast.data.builtin import builtin_root
from rsfast.data.plan import VAL_CROPS
from rsfast.data.sources import check_sources
from rsfast.files.folders import make_writable
from rsfast.files.orientation import EXIF_MODES
from rsfast.files.pictures import LEVEL_MODES
from rsfast.files.tables import write_rows
from rsfast.kernels import choose_backend
from rsfast.models import RSNet
from rsfast.runtime import distributed
from rsfast.runtime.distributed import Rank
from rsfast.tasks import task_of
from rsfast.tasks.overlays import write_predictions
from rsfast.training import checkpoint
from rsfast.training.evaluation import Evaluation, Row
from rsfast.training.scoring import Settings, dtype_of, evaluate, val_batches

__all__ = [
    "Evaluation",
    "Row",
    "Settings",
    "evaluate",
    "main",
]

BETWEEN = ("interpolate", "nearest", "calibrate")
_PICTURES = 8  # of predictions/


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 bad input, 1 evaluation failed, 130 interrupted."""
    args = _parse(argv)
    logging.basicConfig(level="WARNING" if distributed.is_first() else "ERROR")  # once is enough
    try:
        _evaluate(args)
    except (ValueError, ImportError) as error:
        code, said = 2, f"error: {error}"
    except (RuntimeError, OSError) as error:
        code, said = 1, f"error: {error}"
    except KeyboardInterrupt:
        code, said = 130, "interrupted; nothing is written"
    else:
        distributed.leave()
        return 0
    print(f"rsfast.evaluate: {said}", file=sys.stderr)
    distributed.abandon(code)
    return code


def _evaluate(args: argparse.Namespace) -> None:
    rank = distributed.join(args.device)
    resolutions = itertools.chain.from_iterable(map(parse_resolutions, args.resolutions))
    model, alpha = checkpoint.load_model(
        args.checkpoint, args.trained_resolutions, args.arch, args.weights
    )
    if args.ignore_label is not None:
        model.ignore_label = args.ignore_label
    folder = Path(args.output or args.checkpoint.parent / "evaluation")
    distributed.agree(rank, lambda: make_writable(folder))
    needs_training = args.between == "calibrate" and args.train_data is None
    _check(args, model.task)
    named = args.data, args.train_data, args.val_data, args.val_list
    check_sources(*named, both_splits=needs_training)
    with distributed.first_rank_first(rank):
        data = args.data or (None if args.val_data else str(builtin_root(**task_of(model).builtin)))
    settings = Settings(
        data=data,
        resolutions=tuple(resolutions),
        between=args.between,
        val_crop=args.val_crop or model.val_crop,
        exif=args.exif or model.exif,
        levels=args.levels or model.levels,
        calibration_batches=args.calibration_batches,
        **common_settings(args),
    )
    backend = choose_backend(args.kernels, rank.device)
    model.to(rank.device).use_backend(backend)
    if rank.is_main:
        print(f"on {rank.device} with {backend} kernels")
    found = evaluate(model, alpha, settings, rank)
    if rank.is_main:
        print(f"{model.arch}, trained at {', '.join(map(str, model.resolutions))}")
        print(found.table(task_of(model).figures))
        _write(found, folder, lambda: _write_more(found, args, model, alpha, settings, rank))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rsfast.evaluate",
        description="Accuracy of a network at every trained resolution, of their ensemble, and "
        "at any other resolution.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="of rsfast (model_best.pt, last.pt) or of the authors' code")
    wanted = "besides the trained ones: 176, or 64:448:16 for a range with both ends"
    add("--resolutions", nargs="+", default=[], metavar="R", help=wanted)
    add("--between", choices=BETWEEN, default="interpolate", help="batch norm of the others")
    add_common_flags(parser)
    add("--val-crop", choices=VAL_CROPS, help="by default as in training")
    add("--exif", choices=EXIF_MODES, help="by default as in training")
    add("--levels", choices=LEVEL_MODES, help="by default as in training")
    add("--calibration-batches", type=int, default=20, help="training batches to calibrate on")
    add(
        "--trained-resolutions",
        type=int,
        nargs="+",
        help="of an authors' checkpoint not at 224..96",
    )
    ignored = "of masks, for segmentation: pixels that do not count; by default as in training"
    add("--ignore-label", type=int, metavar="VALUE", help=ignored)
    pictures = f"images to draw with their predictions, for segmentation (default {_PICTURES})"
    add("--predictions", type=int, metavar="N", help=pictures)
    of_images = "write per_image.csv, too: the place of each image's class among all, from 1; for "
    of_images += "segmentation the pixels of each image and class, and those that are right"
    add("--per-image", action="store_true", help=of_images)
    add(
        "--output",
        help="folder for accuracy.csv and accuracy.png; by default evaluation/ beside the "
        "checkpoint",
    )
    args, unknown = parser.parse_known_args(argv)
    refuse_unknown(parser, unknown)
    return args


def _check(args: argparse.Namespace, task: str) -> None:
    """Refuses flags that mean nothing for what the network is for, and numbers out of range."""
    refuse_flags_of_others(args, task)
    for name, highest in (("ignore_label", 255), ("predictions", 9999)):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= highest:
            raise ValueError(f"--{name.replace('_', '-')} must be in [0, {highest}], got {value}")


def _write(found: Evaluation, folder: Path, more: Callable[[], list[str]]) -> None:
    """accuracy.csv and accuracy.png, and what else is asked for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "accuracy.csv", (row.columns() for row in found.rows))
        figures.draw(folder)
        names = ["accuracy.csv", "accuracy.png", *more()]
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be written: {error}") from error
    print(f"written: {', '.join(str(folder / name) for name in names)}")


def _write_more(
    found: Evaluation,
    args: argparse.Namespace,
    model: RSNet,
    alpha: Tensor,
    settings: Settings,
    rank: Rank,
) -> list[str]:
    """What is asked for or only one task has; returns the names in the folder."""
    folder = Path(args.output or args.checkpoint.parent / "evaluation")
    task, written = task_of(model), []
    if args.per_image:
        write_rows(folder / "per_image.csv", found.tabulate(task.image_rows))
        written.append("per_image.csv")
    if task.class_rows is not None:
        write_rows(folder / "per_class.csv", found.tabulate(task.class_rows))
        written.append("per_class.csv")
    pictures = _PICTURES if args.predictions is None else args.predictions
    if model.task == "classification" or not pictures:
        return written
    alone = dataclasses.replace(rank, index=0, world_size=1)
    loader = val_batches(model, model.resolutions, settings, alone, limit=pictures)
    weights = torch.softmax(alpha, dim=0).to(rank.device)
    write_predictions(model, weights, loader, dtype_of(settings, rank), folder / "predictions")
    return [*written, "predictions"]


if __name__ == "__main__":
    sys.exit(main())
