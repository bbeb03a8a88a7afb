"""`python -m rsfast.analyze RUN`: what a trained network does at its resolutions, and why.

Each question of the paper gets a CSV file and a picture of it in one folder:

- shares.csv (Table 1): images, or pixels of a segmentation, wrong at one resolution and right at
  another
- alpha.csv: shares of the resolutions in the ensemble, epoch by epoch
- batch_norm.csv (Figure 6): batch-norm parameters by layer and resolution
- features.csv (Figure 3; classification only): distribution of the pooled features, images prepared
  as in training and as in testing
- dense.csv (Figures 1 and 4): accuracy and multiply-adds at many resolutions
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsfast import figures
from rsfast.config.flags import (
    add_common_flags,
    common_settings,
    parse_resolutions,
    refuse_flags_of_others,
    refuse_unknown,
)
from rsfast.data import Batch, Loader, train_loader, val_loader
from rsfast.data.builtin import builtin_root
from rsfast.data.sources import check_sources
from rsfast.files.folders import make_writable
from rsfast.files.tables import read_rows, write_rows
from rsfast.files.unpickle import load_dict
from rsfast.kernels import choose_backend
from rsfast.models import RSNet
from rsfast.models.deploy import pooled_features as features_of
from rsfast.runtime import distributed
from rsfast.tasks import task_of
from rsfast.training import checkpoint
from rsfast.training.evaluation import Evaluation
from rsfast.training.scoring import Settings, evaluate

__all__ = [
    "alpha_over_epochs",
    "batch_norm_means",
    "dense_resolutions",
    "feature_histogram",
    "main",
    "pooled_features",
    "share_rows",
    "wrong_and_right",
]

_BINS = 60
_FEATURE_IMAGES = 1000
_QUANTILE = 0.999  # of the features; a few larger ones would squeeze the histogram


def wrong_and_right(hits: Mapping[int, NDArray[np.bool_]], method: str) -> list[dict[str, Any]]:
    """Rows of Table 1: the share of all images wrong at one resolution and right at another.

    Args:
        hits: of each resolution, which images were right; [n], or [S, n] of S seeds.
        method: what the rows are of.
    """
    right = np.stack(list(hits.values())).reshape(len(hits), -1)
    shares = [100.0 * (~row & right).mean(axis=1) for row in right]
    return share_rows(torch.from_numpy(np.stack(shares)), list(hits), method)


def share_rows(shares: Tensor, resolutions: Sequence[int], method: str) -> list[dict[str, Any]]:
    """Rows of Table 1.

    Args:
        shares: [R, R] percentages that are wrong at one resolution (row) and right at another.
        resolutions: in pixels.
        method: what the rows are of.
    """
    return [
        {"method": method, "wrong_at": wrong, "right_at": right, "share": share}
        for wrong, row in zip(resolutions, shares.tolist(), strict=True)
        for right, share in zip(resolutions, row, strict=True)
        if wrong != right
    ]


def alpha_over_epochs(summary: Path) -> list[dict[str, Any]]:
    """Rows of epoch, resolution and share, out of a run's summary.csv."""
    return [
        {"epoch": row["epoch"], "resolution": name.removeprefix("alpha_"), "share": value}
        for row in read_rows(summary)
        for name, value in row.items()
        if name.startswith("alpha_")
    ]


def batch_norm_means(model: RSNet) -> list[dict[str, Any]]:
    """Rows of layer and resolution: channel means of gamma, beta, running mean and variance."""
    names = {module: name for name, module in model.named_modules()}
    sets = model.resolutions if model.bn == "private" else ("all",)
    return [
        {
            "layer": names[norm],
            "resolution": resolution,
            "gamma": norm.weight[bank].mean().item(),
            "beta": norm.bias[bank].mean().item(),
            "running_mean": norm.running_mean[bank].mean().item(),
            "running_var": norm.running_var[bank].mean().item(),
        }
        for norm in model.batch_norms()
        for bank, resolution in enumerate(sets)
    ]


@torch.no_grad()
def pooled_features(net: nn.Module, batches: Iterable[Batch]) -> NDArray[np.float32]:
    """[n, C]: what the classifier sees of the images, which have one level."""
    return torch.cat([features_of(net, b.images.level(0)).float().cpu() for b in batches]).numpy()


def feature_histogram(
    features: Mapping[str, NDArray[np.float32]], resolution: int
) -> list[dict[str, Any]]:
    """Rows of a density on common bins, with the mean and the share of zeros.

    Args:
        features: [n, C] by preprocessing.
        resolution: of the rows.
    """
    top = max(float(np.quantile(values, _QUANTILE)) for values in features.values())
    edges = np.linspace(0.0, top or 1.0, _BINS + 1)
    rows = []
    for preprocessing, values in features.items():
        counts, _ = np.histogram(values, edges)
        densities = counts / values.size / np.diff(edges)
        rows += [
            {
                "resolution": resolution,
                "preprocessing": preprocessing,
                "low": low,
                "high": high,
                "density": density,
                "mean": float(values.mean()),
                "zeros": float((values == 0).mean()),
            }
            for low, high, density in zip(edges, edges[1:], densities, strict=False)
        ]
    return rows


def _features(
    model: RSNet, training: dict[str, Any], settings: Settings, images: int, device: torch.device
) -> list[dict[str, Any]]:
    """The same training images, prepared in both ways."""
    common: dict[str, Any] = {
        **settings.loading,
        "normalize": (model.input_mean, model.input_std),
        "picked_from": model.picked_from or model.resolutions[0],
        "device": device,
        "limit": images,
    }
    rows = []
    for resolution in model.resolutions:
        net = model.at(resolution)
        loaders: dict[str, Loader] = {
            "train": train_loader(
                settings.train_root,
                (resolution,),
                settings.batch_size,
                seed=training["seed"],
                flip=training["flip"],
                crop_area=tuple(training["crop_area"]),
                **common,
            ),
            "test": val_loader(
                settings.train_root,
                (resolution,),
                settings.batch_size,
                crop=settings.val_crop,
                split="train",
                **common,
            ),
        }
        # An epoch of training ends with images from its beginning, to fill the last batch.
        features = {
            name: pooled_features(net, loader)[: loader.num_images]
            for name, loader in loaders.items()
        }
        rows += feature_histogram(features, resolution)
    return rows


def _dense_rows(found: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Rows of every resolution, by where batch norm between the trained ones comes from."""
    return [
        {"between": between, **row.columns()}
        for between, evaluation in found.items()
        for row in evaluation.rows
        if row.resolution != "ensemble"
    ]


def dense_resolutions(resolutions: Sequence[int]) -> list[int]:
    """About twenty: from two thirds of the smallest to a seventh above the largest."""
    step = max(1, (resolutions[0] - resolutions[-1]) // 16)
    return list(range(resolutions[-1] * 2 // 3, resolutions[0] * 8 // 7 + 1, step))


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 it failed, 2 bad input, 130 interrupted."""
    args = _parse(argv)
    try:
        _analyze(args)
    except (ValueError, ImportError) as error:
        print(f"rsfast.analyze: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"rsfast.analyze: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rsfast.analyze: interrupted; nothing is kept of it", file=sys.stderr)
        return 130
    return 0


def _analyze(args: argparse.Namespace) -> None:
    feature_images = _FEATURE_IMAGES if args.feature_images is None else args.feature_images
    if feature_images < 1:
        raise ValueError(f"feature_images must be at least 1, got {feature_images}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("an analysis runs in one process: start it without torchrun")
    path: Path = args.run / "last.pt" if args.run.is_dir() else args.run
    folder: Path = args.output or path.parent / "analysis"
    rank = distributed.join(args.device)
    model, alpha = checkpoint.load_model(path, arch=args.arch, weights=args.weights)
    refuse_flags_of_others(args, model.task)
    model.to(rank.device).use_backend(choose_backend(args.kernels, rank.device))
    training = _training_settings(path)
    wanted = [r for text in args.resolutions for r in parse_resolutions(text)]
    settings = Settings(
        data=_data(args, training, task_of(model).builtin),
        resolutions=tuple(wanted or dense_resolutions(model.resolutions)),
        between="interpolate",
        val_crop=model.val_crop,
        exif=model.exif,
        levels=model.levels,
        calibration_batches=0,
        **common_settings(args),
    )
    make_writable(folder)
    found = {"interpolate": evaluate(model, alpha, settings, rank)}
    largest, smallest = model.resolutions[0], model.resolutions[-1]
    inside = tuple(r for r in settings.resolutions if smallest < r < largest)
    if model.bn == "private" and inside:
        nearest = dataclasses.replace(settings, between="nearest", resolutions=inside)
        found["nearest"] = evaluate(model, alpha, nearest, rank)
    write_rows(folder / "dense.csv", _dense_rows(found))
    write_rows(folder / "batch_norm.csv", batch_norm_means(model))
    if len(model.resolutions) > 1:
        shares = share_rows(found["interpolate"].shares, model.resolutions, str(model.arch))
        write_rows(folder / "shares.csv", shares)
        if (path.parent / "summary.csv").exists():
            write_rows(folder / "alpha.csv", alpha_over_epochs(path.parent / "summary.csv"))
    if model.task != "classification":
        print(
            f"features are what a classifier sees, and {path} is of {model.task}: no features.csv"
        )
    elif not training:
        print(f"{path} does not say how images were prepared in training: no features.csv")
    elif not any(isinstance(module, nn.Linear) for module in model.modules()):
        print(f"{model.arch} has no linear layer to look in front of: no features.csv")
    else:
        rows = _features(model, training, settings, feature_images, rank.device)
        write_rows(folder / "features.csv", rows)
    figures.draw(folder)
    print(f"written to {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


def _data(
    args: argparse.Namespace,
    training: Mapping[str, Any],
    builtin: Mapping[str, Any] = types.MappingProxyType({}),
) -> str | None:
    """The folder of the images; fills in the flags about others from the run's settings.

    A folder stands for all images, another flag for those that it names, and the rest are the
    run's. The built-in set, that of these arguments, is taken where the run was trained on it, or
    nothing is named at all.
    """
    was_given = any((args.data, args.train_data, args.val_data, args.val_list))
    if args.data is None:
        # Of the two that name validation images, one that is given goes before the run's other.
        left_out = {"val_data"} if args.val_list else {"val_list"} if args.val_data else set()
        for name in {"data", "train_data", "val_data", "val_list"} - left_out:
            setattr(args, name, getattr(args, name) or training.get(name))
    named = args.data, args.train_data, args.val_data, args.val_list
    if not was_given:
        args.tolerate_truncated |= bool(training.get("tolerate_truncated"))
    has_own = any(training.get(name) for name in ("data", "train_data", "val_data"))
    is_whole = args.data or (args.train_data and args.val_data)
    if not any(named) or (training and not (has_own or is_whole or args.val_list)):
        args.data = str(builtin_root(**builtin))
    check_sources(args.data, *named[1:], both_splits=bool(training))
    return args.data


def _training_settings(path: Path) -> dict[str, Any]:
    """Of a checkpoint that continues a run; none of weights alone or of the authors' code."""
    if path.suffix == ".safetensors":
        return {}
    settings = load_dict(path).get("config", {})
    return settings if isinstance(settings, dict) else {}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="rsfast.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder (its last.pt is taken), or a checkpoint")
    add(
        "--resolutions",
        nargs="+",
        default=[],
        metavar="R",
        help="of dense.csv: 176, or 64:448:16; by default about twenty around the trained ones",
    )
    add("--feature-images", type=int, help=f"training images (default {_FEATURE_IMAGES})")
    add_common_flags(parser)
    add("--output", type=Path, help="folder; RUN/analysis by default")
    args, unknown = parser.parse_known_args(argv)
    refuse_unknown(parser, unknown)
    return args


if __name__ == "__main__":
    sys.exit(main())
