"""Flags of the commands that run a trained network over images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rsfast.data import BACKENDS
from rsfast.data.patterns import quote_hint
from rsfast.data.sources import add_data_flags
from rsfast.engine import PRECISIONS
from rsfast.kernels import BACKENDS as KERNEL_BACKENDS

__all__ = [
    "DECODING",
    "WEIGHTS",
    "add_common_flags",
    "common_settings",
    "parse_resolutions",
    "refuse_flags_of_others",
    "refuse_unknown",
]

DECODING = ("workers", "hw_decoder_load", "dont_use_mmap", "tolerate_truncated")
# Flags that mean nothing for a task.
_OF_OTHERS = {
    "classification": ("ignore_label", "predictions"),
    "segmentation": ("val_crop", "levels", "train_data", "val_data", "val_list", "feature_images"),
}
WEIGHTS = ("averaged", "plain")  # of a run with --ema-decay


def parse_resolutions(text: str) -> list[int]:
    """ "160" is one resolution, "64:448:16" all from 64 to 448, both included, in steps of 16.

    Raises:
        ValueError: if the text is neither.
    """
    parts = text.split(":")
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"resolutions must look like 160 or 64:448:16, got {text!r}")
    numbers = [int(part) for part in parts]
    if len(numbers) == 1:
        found = numbers
    else:
        step = numbers[2] if len(numbers) == 3 else 1
        found = list(range(numbers[0], numbers[1] + 1, step)) if step else []
    if not found or min(found) < 1:
        raise ValueError(
            f"resolutions must name at least one positive number, the lower end first, got {text!r}"
        )
    return found


def refuse_unknown(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Exits if there are arguments that no flag takes, as of a pattern without quotes."""
    if arguments:
        parser.error(f"unrecognized arguments: {' '.join(arguments)}{quote_hint(arguments)}")


def refuse_flags_of_others(args: argparse.Namespace, task: str) -> None:
    """Refuses flags that mean nothing for what a network is for.

    Raises:
        ValueError: if one is given.
    """
    for name in _OF_OTHERS[task]:
        if getattr(args, name, None) is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} means nothing for a network of {task}: leave it away")


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """What every command that runs a network over images takes."""
    add = parser.add_argument
    add(
        "--arch",
        help="what the checkpoint is of; needed for MODULE:FUNCTION, whose code is then run",
    )
    add(
        "--weights",
        choices=WEIGHTS,
        help="of a run with --ema-decay: the averages, or what they are averages of; by default "
        "the averages where there are some",
    )
    about = "folder with val/ and, where it is needed, train/; the built-in set if none"
    add_data_flags(parser, about)
    add("--loader", choices=[b for b in BACKENDS if b != "synthetic"], default="dali")
    add("--batch-size", type=int, default=64, help="images per process (default 64)")
    add("--workers", type=int, help="as in rsfast.train")
    add("--hw-decoder-load", type=float, metavar="SHARE", help="as in rsfast.train")
    add("--dont-use-mmap", action="store_true", help="as in rsfast.train")
    tolerated = "use images that are cut off, as rsfast.train does with this flag"
    add("--tolerate-truncated", action="store_true", help=tolerated)
    add("--precision", choices=list(PRECISIONS), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--kernels",
        choices=("auto", *(b for b in KERNEL_BACKENDS if b != "cuda")),  # which is for training
        default="auto",
        help="for the trained resolutions: fused Triton kernels or plain PyTorch; auto (default) "
        "takes triton on a GPU",
    )


def common_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the common flags say for :class:`rsfast.training.scoring.Settings`."""
    names = ("loader", "batch_size", "precision", "train_data", "val_data", "val_list", *DECODING)
    return {name: getattr(args, name) for name in names}
