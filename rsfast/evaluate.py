"""`python -m rsfast.evaluate CHECKPOINT`: accuracy at every resolution, trained or not."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsfast import figures
from rsfast.config.flags import (
    DECODING,
    add_common_flags,
    common_settings,
    parse_resolutions,
    refuse_unknown,
)
from rsfast.data import Loader, prefetch, train_loader, val_loader
from rsfast.data.builtin import builtin_root
from rsfast.data.labels import warn_of_numbers
from rsfast.data.plan import VAL_CROPS
from rsfast.data.sources import check_sources
from rsfast.engine import PRECISIONS
from rsfast.files.folders import make_writable
from rsfast.files.orientation import EXIF_MODES
from rsfast.files.pictures import LEVEL_MODES
from rsfast.files.tables import write_rows
from rsfast.kernels import choose_backend
from rsfast.models import RSNet
from rsfast.models.deploy import calibrate, multiply_adds
from rsfast.pyramid.convert import bn_mixture
from rsfast.runtime import distributed
from rsfast.runtime.distributed import Rank
from rsfast.tasks import Accuracy, task_of
from rsfast.tasks.overlays import write_predictions
from rsfast.training import checkpoint
from rsfast.training.evaluation import Evaluation, Row
from rsfast.training.validation import validate

__all__ = [
    "Evaluation",
    "Row",
    "Settings",
    "evaluate",
    "main",
]

BETWEEN = ("interpolate", "nearest", "calibrate")
_PICTURES = 8  # of predictions/
_RESOLUTIONS_PER_PASS = 6  # one decode serves so many; bounds the memory for resized images


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to evaluate, and on which data."""

    data: str | None
    resolutions: tuple[int, ...]
    between: str
    loader: str
    batch_size: int
    workers: int | None
    hw_decoder_load: float | None
    dont_use_mmap: bool
    val_crop: str
    exif: str
    precision: str | None
    calibration_batches: int
    train_data: str | None = None
    val_data: str | None = None
    val_list: str | None = None
    tolerate_truncated: bool = False
    levels: str = "resize"

    @property
    def train_root(self) -> str | None:
        """Where the training images are."""
        return self.train_data or self.data

    @property
    def loading(self) -> dict[str, Any]:
        """What every loader is told."""
        return {
            "backend": self.loader,
            "exif": self.exif,
            "levels": self.levels,
            **{name: getattr(self, name) for name in DECODING},
        }


def evaluate(model: RSNet, alpha: Tensor, settings: Settings, rank: Rank) -> Evaluation:
    """Accuracy at the trained resolutions, of their ensemble, and at the others asked for.

    Args:
        model: on the rank's device.
        alpha: [R] raw ensemble scores.
        settings: what to evaluate.
        rank: this process; images are shared out over all of them.

    Raises:
        ValueError: if the data set has other classes than the network.
    """
    dtype = _dtype(settings, rank)
    weights = torch.softmax(alpha, dim=0).to(rank.device)
    with distributed.first_rank_first(rank):
        loader = _val_batches(model, model.resolutions, settings, rank)
    accuracy = validate(model, weights, prefetch(loader, rank.device), dtype, loader.num_images)
    found = list(zip(_trained_rows(model, accuracy), accuracy.details, strict=False))
    all_levels = sum(row.multiply_adds for row, _ in found)
    extra = sorted(set(settings.resolutions) - set(model.resolutions), reverse=True)
    for start in range(0, len(extra), _RESOLUTIONS_PER_PASS):
        group = extra[start : start + _RESOLUTIONS_PER_PASS]
        found += _untrained_rows(model, group, settings, rank, dtype)
    found.sort(key=lambda pair: int(pair[0].resolution), reverse=True)
    worth = _figures(model, accuracy.ensemble)
    ensemble = Row("ensemble", True, "all banks", all_levels, _count(model), worth)
    rows, details = zip(*found, (ensemble, accuracy.details[-1]), strict=True)
    return Evaluation(list(rows), torch.stack(details), loader.plan.index)


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
    _refuse_other_task(args, model.task)
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
    places = "write per_image.csv, too: the place of each image's class among all, from 1"
    add("--per-image", action="store_true", help=places)
    add(
        "--output",
        help="folder for accuracy.csv and accuracy.png; by default evaluation/ beside the "
        "checkpoint",
    )
    args, unknown = parser.parse_known_args(argv)
    refuse_unknown(parser, unknown)
    return args


def _refuse_other_task(args: argparse.Namespace, task: str) -> None:
    """Flags that mean nothing for what the network is for."""
    of_others = {
        "classification": ("ignore_label", "predictions"),
        "segmentation": ("val_crop", "per_image", "train_data", "val_data", "val_list"),
    }
    for name in of_others[task]:
        value = getattr(args, name)
        if value is not None and value is not False:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} means nothing for a network of {task}: leave it away")
    for name, highest in (("ignore_label", 255), ("predictions", 9999)):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= highest:
            raise ValueError(f"--{name.replace('_', '-')} must be in [0, {highest}], got {value}")


def _dtype(settings: Settings, rank: Rank) -> torch.dtype | None:
    if settings.precision:
        return PRECISIONS[settings.precision]
    return torch.bfloat16 if rank.device.type == "cuda" else None


def _val_batches(
    model: RSNet, resolutions: Sequence[int], settings: Settings, rank: Rank, limit: int = 0
) -> Loader:
    loader = val_loader(
        settings.val_data or settings.data,
        resolutions,
        settings.batch_size,
        normalize=(model.input_mean, model.input_std),
        crop=settings.val_crop,
        picked_from=model.picked_from or model.resolutions[0],
        labels=settings.val_list,
        rank=rank.index,
        world_size=rank.world_size,
        device=rank.device,
        limit=limit,
        **_of_masks(model),
        **settings.loading,
    )
    names, known = loader.class_names, model.class_names
    if len(names) != model.num_classes or (known and names != known):
        wanted = f" ({', '.join(known[:3])}, ...)" if known else ""
        raise ValueError(
            f"data folder {settings.val_data or settings.data} must have the {model.num_classes} "
            f"classes of the checkpoint{wanted}, got {len(names)} ({', '.join(names[:3])}, ...)"
        )
    warn_of_numbers(settings.val_data or settings.data, () if known else names)
    return loader


def _trained_rows(model: RSNet, accuracy: Accuracy) -> list[Row]:
    singles = {r: model.at(r) for r in model.resolutions}
    origin = "own bank" if model.bn == "private" else "shared bank"
    return [
        Row(r, True, origin, multiply_adds(net, r), _count(net), _figures(model, values))
        for (r, net), values in zip(singles.items(), accuracy.levels, strict=True)
    ]


@torch.no_grad()
def _untrained_rows(
    model: RSNet,
    resolutions: Sequence[int],
    settings: Settings,
    rank: Rank,
    dtype: torch.dtype | None,
) -> list[tuple[Row, Tensor]]:
    between = "nearest" if settings.between == "nearest" else "interpolate"
    nets = [model.at(r, between) for r in resolutions]
    if settings.between == "calibrate":
        for net, resolution in zip(nets, resolutions, strict=True):
            calibrate(net, _calibration_images(model, resolution, settings, rank))
    loader = _val_batches(model, resolutions, settings, rank)
    scores = task_of(model).scores_of(model, len(nets), rank.device, num_images=loader.num_images)
    for batch in prefetch(loader, rank.device):
        levels = zip(nets, batch.images.levels(), strict=True)
        with torch.autocast(rank.device.type, dtype, enabled=dtype is not None):
            logits = [net(level) for net, level in levels]
        scores.add(logits, batch)
    accuracy = scores.read()
    rows = [
        Row(
            resolution,
            False,
            _origin(model, resolution, settings.between),
            multiply_adds(net, resolution),
            _count(net),
            _figures(model, values),
        )
        for resolution, net, values in zip(resolutions, nets, accuracy.levels, strict=True)
    ]
    return list(zip(rows, accuracy.details, strict=True))


def _calibration_images(
    model: RSNet, resolution: int, settings: Settings, rank: Rank
) -> Iterator[Tensor]:
    """The same training images on every rank, so that all ranks end with one network."""
    if settings.train_root is None:
        raise ValueError("--between calibrate needs training images: add --data or --train-data")
    loader = train_loader(
        settings.train_root,
        (resolution,),
        settings.batch_size,
        device=rank.device,
        normalize=(model.input_mean, model.input_std),
        picked_from=model.picked_from or model.resolutions[0],
        max_steps=settings.calibration_batches,
        **_of_masks(model),
        **settings.loading,
    )
    return (batch.images.level(0) for batch in loader)


def _of_masks(model: RSNet) -> dict[str, Any]:
    """What a loader has to know of segmentation."""
    if model.task == "classification":
        return {}
    names = ("task", "ignore_label", "num_classes")
    return {name: getattr(model, name) for name in names}


def _origin(model: RSNet, resolution: int, between: str) -> str:
    if between == "calibrate":
        return "calibrated"
    if model.bn == "shared":
        return "shared bank"
    mixture = bn_mixture(model.resolutions, resolution, between)
    if len(mixture) == 1:
        return f"bank of {model.resolutions[mixture[0][0]]}"
    return " + ".join(f"{share:.2f} x {model.resolutions[bank]}" for bank, share in mixture)


def _figures(model: RSNet, values: Sequence[float]) -> dict[str, float]:
    return dict(zip(task_of(model).figures, values, strict=True))


def _count(net: torch.nn.Module) -> int:
    return sum(param.numel() for param in net.parameters())


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
    """What only one task has; returns the names in the folder."""
    folder = Path(args.output or args.checkpoint.parent / "evaluation")
    if args.per_image:
        found.write_images(folder / "per_image.csv")
        return ["per_image.csv"]
    if model.task == "classification":
        return []
    found.write_classes(folder / "per_class.csv")
    pictures = args.predictions if args.predictions is not None else _PICTURES
    if not pictures:
        return ["per_class.csv"]
    alone = dataclasses.replace(rank, index=0, world_size=1)
    loader = _val_batches(model, model.resolutions, settings, alone, limit=pictures)
    weights = torch.softmax(alpha, dim=0).to(rank.device)
    write_predictions(model, weights, loader, _dtype(settings, rank), folder / "predictions")
    return ["per_class.csv", "predictions"]


if __name__ == "__main__":
    sys.exit(main())
