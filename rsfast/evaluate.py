"""`python -m rsfast.evaluate CHECKPOINT`: accuracy at every resolution, trained or not."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
from rsfast.data import ImageIndex, Loader, prefetch, train_loader, val_loader
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
from rsfast.tasks.classification import Accuracy, TopK
from rsfast.training import checkpoint
from rsfast.training.validation import validate

__all__ = [
    "Evaluation",
    "Row",
    "Settings",
    "evaluate",
    "main",
]

BETWEEN = ("interpolate", "nearest", "calibrate")
_RESOLUTIONS_PER_PASS = 6  # one decode serves so many; bounds the memory for resized images


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        resolution: in pixels, or "ensemble".
        trained: whether the resolution has a batch-norm bank of its own.
        batch_norm: where its batch-norm bank comes from.
        multiply_adds: of convolutions and classifier, for one image.
        parameters: that this row needs (all of the network for the ensemble).
        top1, top5: in percent.
    """

    resolution: int | str
    trained: bool
    batch_norm: str
    multiply_adds: int
    parameters: int
    top1: float
    top5: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy of a network, in all and image by image.

    Attributes:
        rows: one per resolution, descending, then the ensemble.
        places: [len(rows), n] the place of each image's label among the classes, from 1.
        index: the n images.
    """

    rows: list[Row]
    places: Tensor
    index: ImageIndex


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
    dtype = PRECISIONS[settings.precision] if settings.precision else _default_dtype(rank)
    weights = torch.softmax(alpha, dim=0).to(rank.device)
    with distributed.first_rank_first(rank):
        loader = _val_batches(model, model.resolutions, settings, rank)
    accuracy = validate(model, weights, prefetch(loader, rank.device), dtype, loader.num_images)
    found = list(zip(_trained_rows(model, accuracy), accuracy.places, strict=False))
    all_levels = sum(row.multiply_adds for row, _ in found)
    extra = sorted(set(settings.resolutions) - set(model.resolutions), reverse=True)
    for start in range(0, len(extra), _RESOLUTIONS_PER_PASS):
        group = extra[start : start + _RESOLUTIONS_PER_PASS]
        found += _untrained_rows(model, group, settings, rank, dtype)
    found.sort(key=lambda pair: int(pair[0].resolution), reverse=True)
    ensemble = Row("ensemble", True, "all banks", all_levels, _count(model), *accuracy.ensemble)
    rows, places = zip(*found, (ensemble, accuracy.places[-1]), strict=True)
    return Evaluation(list(rows), torch.stack(places), loader.plan.index)


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
    folder = Path(args.output or args.checkpoint.parent / "evaluation")
    distributed.agree(rank, lambda: make_writable(folder))
    needs_training = args.between == "calibrate" and args.train_data is None
    named = args.data, args.train_data, args.val_data, args.val_list
    check_sources(*named, both_splits=needs_training)
    with distributed.first_rank_first(rank):
        data = args.data or (None if args.val_data else str(builtin_root()))
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
        title = f"{model.arch}, trained at {', '.join(map(str, model.resolutions))}"
        _write(found, title, folder, args.per_image)


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


def _default_dtype(rank: Rank) -> torch.dtype | None:
    return torch.bfloat16 if rank.device.type == "cuda" else None


def _val_batches(
    model: RSNet, resolutions: Sequence[int], settings: Settings, rank: Rank
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
        Row(r, True, origin, multiply_adds(net, r), _count(net), top1, top5)
        for (r, net), (top1, top5) in zip(singles.items(), accuracy.levels, strict=True)
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
    counts = TopK(len(nets), rank.device, loader.num_images)
    for batch in prefetch(loader, rank.device):
        levels = zip(nets, batch.images.levels(), strict=True)
        with torch.autocast(rank.device.type, dtype, enabled=dtype is not None):
            logits = torch.stack([net(level) for net, level in levels])
        counts.add(logits.float(), batch.labels, batch.indices)
    accuracies, _ = counts.read()
    rows = [
        Row(
            resolution,
            False,
            _origin(model, resolution, settings.between),
            multiply_adds(net, resolution),
            _count(net),
            *values,
        )
        for resolution, net, values in zip(resolutions, nets, accuracies, strict=True)
    ]
    return list(zip(rows, counts.places(), strict=True))


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
        **settings.loading,
    )
    return (batch.images.level(0) for batch in loader)


def _origin(model: RSNet, resolution: int, between: str) -> str:
    if between == "calibrate":
        return "calibrated"
    if model.bn == "shared":
        return "shared bank"
    mixture = bn_mixture(model.resolutions, resolution, between)
    if len(mixture) == 1:
        return f"bank of {model.resolutions[mixture[0][0]]}"
    return " + ".join(f"{share:.2f} x {model.resolutions[bank]}" for bank, share in mixture)


def _count(net: torch.nn.Module) -> int:
    return sum(param.numel() for param in net.parameters())


def _write(found: Evaluation, title: str, folder: Path, per_image: bool) -> None:
    """The table on screen, accuracy.csv and accuracy.png, and per_image.csv if asked for."""
    header = f"{'resolution':>10}  {'batch norm':<24}{'MAdds (M)':>10}{'params (M)':>12}"
    header += f"{'top-1':>8}{'top-5':>8}"
    print(title, header, "-" * len(header), sep="\n")
    for row in found.rows:
        print(
            f"{row.resolution:>10}  {row.batch_norm:<24}{row.multiply_adds / 1e6:>10.1f}"
            f"{row.parameters / 1e6:>12.2f}{row.top1:>8.2f}{row.top5:>8.2f}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "accuracy.csv", (asdict(row) for row in found.rows))
        figures.draw(folder)
        if per_image:
            _write_images(found, folder / "per_image.csv")
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be written: {error}") from error
    names = ["accuracy.csv", "accuracy.png", *(["per_image.csv"] if per_image else [])]
    print(f"written: {', '.join(str(folder / name) for name in names)}")


def _write_images(found: Evaluation, path: Path) -> None:
    """A line for each image: path, label, and the place of its label in each row."""
    names = ["image", "label", *(str(row.resolution) for row in found.rows)]
    columns = [found.index.paths, found.index.labels.tolist(), *found.places.tolist()]
    lines = zip(*columns, strict=True)
    write_rows(path, (dict(zip(names, line, strict=True)) for line in lines))


if __name__ == "__main__":
    sys.exit(main())
