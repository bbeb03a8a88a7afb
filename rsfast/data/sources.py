"""Where the images of a command are: its flags, and the rules that these follow together."""

from __future__ import annotations

import argparse

from rsfast.data.patterns import check_archives, is_pattern

__all__ = ["add_data_flags", "add_val_flags", "check_sources"]


def add_data_flags(parser: argparse.ArgumentParser, about_data: str) -> None:
    """The flags that name images, spelled as in rsfast.train.

    Args:
        parser: to add them to.
        about_data: the help of --data.
    """
    add = parser.add_argument
    add("--data", metavar="DIR", help=about_data)
    add(
        "--train-data",
        metavar="PATTERN",
        help="training images in place of data's: shards or Parquet files, such as "
        '"/data/train-{0000..1023}.tar"',
    )
    add_val_flags(parser)


def add_val_flags(parser: argparse.ArgumentParser) -> None:
    """Those of them that name validation images, besides --data."""
    add = parser.add_argument
    add("--val-data", metavar="PATTERN", help="validation images in place of data's, likewise")
    add(
        "--val-list",
        metavar="FILE",
        help='labels of a data/val without class folders: lines of "file label", or a label per '
        "sorted file",
    )


def check_sources(
    data: str | None,
    train_data: str | None,
    val_data: str | None,
    val_list: str | None,
    *,
    both_splits: bool,
) -> None:
    """Refuses names of images that do not go together.

    Args:
        data, train_data, val_data, val_list: as the flags have them.
        both_splits: whether training images are wanted, too; otherwise `data` may be a pattern of
            archives, which are then the validation images.

    Raises:
        ValueError: naming the setting, the rule and the value.
    """
    for pattern in (train_data, val_data):
        if pattern is not None:
            check_archives(pattern)
    is_one_missing = data is None and (train_data is None) != (val_data is None)
    if is_one_missing and (both_splits or val_data is None):
        raise ValueError(
            "train_data and val_data must be given together, or one of them with data for the "
            f"other: add --{'train' if train_data is None else 'val'}-data PATTERN or --data DIR, "
            f"got {train_data or val_data} alone"
        )
    if both_splits and data is not None and is_pattern(data):
        raise ValueError(
            f"data must be a folder with train/ and val/, got the pattern {data}, whose images "
            f"would be those of both: name each by --train-data and --val-data"
        )
    if val_list is not None and (data is None or val_data is not None):
        raise ValueError(
            f"val_list holds the labels of data/val, so it needs data and no val_data, "
            f"got {val_list}"
        )
