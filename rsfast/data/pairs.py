"""Images and their masks: the layout of a data set of segmentation, and which pairs can be used.

`root/train` and `root/val` hold images, in sub-folders or not, and `root/trainannot` and
`root/valannot` a mask for each, a PNG file of the same path and stem.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rsfast.data.folder import Listing, index_files, listing_of, warn_of_notes
from rsfast.data.formats import EXTENSIONS
from rsfast.data.index import ImageIndex, check_command, printable
from rsfast.data.mask_survey import Survey, survey_masks
from rsfast.data.masks import IGNORE_LABEL, MAX_CLASSES, digest_of
from rsfast.data.patterns import is_pattern
from rsfast.data.splits import existing, masks_folder
from rsfast.data.turning import turned
from rsfast.data.val_list import read_classes
from rsfast.data.walking import files_below, walk_below
from rsfast.files.orientation import EXIF_MODES

__all__ = [
    "Labelling",
    "NoClassesError",
    "Pairing",
    "Pairs",
    "check_label",
    "images_below",
    "labelling_of",
    "labelling_of_numbers",
    "list_images",
    "open_pairs",
    "paired",
    "problem_of",
]

_LOG = logging.getLogger(__name__)
_MASK = ".png"
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")


class Labelling(NamedTuple):
    """What numbers in masks mean: positions in class_names, or the label of ignored pixels."""

    class_names: tuple[str, ...]
    ignore_label: int


class NoClassesError(ValueError):
    """Neither a list of names nor the training masks tell the classes."""


class Pairing(NamedTuple):
    """Which masks belong to which images.

    Attributes:
        masks: of each image, the path of its mask relative to the masks' folder; empty for none.
        problems: of each image, why it has no mask; empty where it has one.
        unused: files of the masks' folder that are of no image.
    """

    masks: list[str]
    problems: list[str]
    unused: list[str]


@dataclass(frozen=True, slots=True)
class Pairs:
    """The images of one split that can be used, and their masks.

    Attributes:
        images: with the names of the classes; their own labels are 0 and mean nothing.
        masks: of the same images in the same order.
    """

    images: ImageIndex
    masks: ImageIndex

    @property
    def digest(self) -> str:
        """A name for the images and for the pixels of their masks."""
        return digest_of(self.images, self.masks)

    def take(self, positions: np.ndarray) -> Pairs:
        """Some of the pairs, with all classes."""
        return Pairs(self.images.take(positions), self.masks.take(positions))


def open_pairs(
    data: str | Path,
    split: str,
    *,
    ignore_label: int = IGNORE_LABEL,
    num_classes: int | None = None,
    strict: bool = False,
    tolerate_truncated: bool = False,
    exif: str = "ignore",
) -> Pairs:
    """The images and masks of a split of a data set of segmentation.

    Every mask that is new or has changed is decoded. Left out, with a warning that names the first
    ones, are bad images, as in classification, and images without a mask that can be used.

    Args:
        data: folder of the data set.
        split: "train" or "val".
        ignore_label: of the pixels that do not count, from 0 to 255.
        num_classes: K; None for the lines of `classes.txt`, or else for all labels up to the
            largest one in the training masks, but `ignore_label` and 255.
        strict: take a bad image or pair for an error.
        tolerate_truncated: as in :func:`rsfast.data.index_folder`.
        exif: "ignore" the orientation that EXIF has, or "honour" it, and turn images so. Masks have
            none and are never turned: they must fit the images as these are shown.

    Raises:
        ValueError: naming the folder or file and what is wrong with it.
    """
    if exif not in EXIF_MODES:
        raise ValueError(f"exif must be one of {EXIF_MODES}, got {exif!r}")
    if is_pattern(data):
        raise ValueError(f"segmentation needs a folder with train and trainannot, got {data}")
    root = existing(Path(data).absolute(), split)
    for folder, content in ((root, "images"), (masks_folder(root), "a mask for each image")):
        if not folder.is_dir():
            raise ValueError(
                f"data folder {folder} does not exist; segmentation needs it with {content}"
            )
    labelling = labelling_of(root, ignore_label, num_classes)
    listing = list_images(root)
    warn_of_notes(listing)
    images = index_files(
        root,
        listing.paths,
        np.zeros(len(listing.paths), dtype=np.int64),
        labelling.class_names,
        strict=strict,
        tolerate_truncated=tolerate_truncated,
    )
    images = turned(images) if exif == "honour" else images
    pairing = paired(root, images.paths)
    survey = _survey(masks_folder(root), pairing)
    row_of_image = _rows(survey, pairing)
    problems = [
        problem_of(survey, row, size, labelling) if row >= 0 else problem
        for row, size, problem in zip(
            row_of_image, images.sizes.tolist(), pairing.problems, strict=True
        )
    ]
    _report(images, problems, strict, _check_command(images.known_as, ignore_label))
    good = np.flatnonzero([not problem for problem in problems])
    rows = np.array(row_of_image)[good]
    kept = images.take(good)
    return Pairs(
        kept,
        dataclasses.replace(
            kept,
            root=masks_folder(root),
            paths=tuple(survey.paths[row] for row in rows),
            sizes=survey.sizes[rows],
            exif="ignore",
            copies=None,
            place=root,
            contents=survey.contents[rows],
        ),
    )


def images_below(root: Path) -> list[str]:
    """Paths of the images in a split's folder and below, relative to it, sorted.

    Raises:
        ValueError: as :func:`list_images`.
    """
    return list_images(root).paths


def list_images(root: Path) -> Listing:
    """The images in a split's folder and below, sorted, other files, and what is passed over.

    Raises:
        ValueError: if there is no image, or a folder cannot be read.
    """
    try:
        found = walk_below(root, EXTENSIONS)
    except OSError as error:
        raise ValueError(f"folder {error.filename} must be readable: {error.strerror}") from error
    files = sorted(os.path.join(one.path, name) for one in found.folders for name in one.files)
    images = [path for path in files if path.lower().endswith(EXTENSIONS)]
    if not images:
        raise ValueError(
            f"data folder {root} must hold images ({' '.join(EXTENSIONS)}), found none"
        )
    others = [path for path in files if not path.lower().endswith(EXTENSIONS)]
    listing = listing_of(root, images, (root.name,))
    return dataclasses.replace(listing, others=others, notes=found.notes)


def paired(root: Path, images: Sequence[str]) -> Pairing:
    """Finds the mask of each image by its path without the extension."""
    folder = masks_folder(root)
    files = files_below(folder) if folder.is_dir() else []
    mask_of = {_stem(path): path for path in files if path.lower().endswith(_MASK)}
    other_of = {_stem(path): path for path in files if not path.lower().endswith(_MASK)}
    masks, problems = [], []
    taken: dict[str, str] = {}
    for image in images:
        stem, mask, problem = _stem(image), "", ""
        if stem not in mask_of:
            problem = f"no mask {folder.name}/{printable(stem)}{_MASK}"
            if other := other_of.get(stem):
                problem += f" ({printable(os.path.basename(other))} is none: masks must be PNG"
                problem += ", JPEG loses labels)" if other.lower().endswith(_LOSSY) else ")"
        elif stem in taken:
            problem = f"its mask is that of {printable(taken[stem])}, too: rename one of the images"
        else:
            taken[stem], mask = image, mask_of[stem]
        masks.append(mask)
        problems.append(problem)
    used = {*masks, *(other_of.get(_stem(i)) for i in images if _stem(i) not in mask_of)}
    unused = [p for p in files if p not in used and p.lower().endswith(EXTENSIONS)]
    return Pairing(masks, problems, unused)


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _survey(folder: Path, pairing: Pairing) -> Survey:
    return survey_masks(folder, [mask for mask in pairing.masks if mask])


def _rows(survey: Survey, pairing: Pairing) -> list[int]:
    """Of each image's mask in the survey; -1 without one."""
    row_of = {path: row for row, path in enumerate(survey.paths)}
    return [row_of.get(mask, -1) for mask in pairing.masks]


def labelling_of(root: Path, ignore_label: int, num_classes: int | None = None) -> Labelling:
    """The classes of a data set.

    Args:
        root: folder of one of its splits, absolute.
        ignore_label, num_classes: as in :func:`open_pairs`.

    Raises:
        ValueError: naming the folder or file and what is wrong with it; a NoClassesError where
            there is nothing to tell them by.
    """
    check_label(ignore_label)
    _check_number(num_classes)
    train = existing(root.parent, "train")
    names = read_classes(train) or read_classes(root)
    if names and num_classes not in (None, len(names)):
        raise ValueError(
            f"classes.txt of {root.parent} must name {num_classes} classes, one per line, got "
            f"{len(names)}"
        )
    if len(names) > MAX_CLASSES:
        raise ValueError(
            f"classes.txt of {root.parent} must name at most {MAX_CLASSES} classes, got "
            f"{len(names)}"
        )
    if names:
        return Labelling(names, ignore_label)
    return labelling_of_numbers(num_classes or _count_classes(train, ignore_label), ignore_label)


def labelling_of_numbers(num_classes: int, ignore_label: int) -> Labelling:
    """Classes that are called by their numbers.

    Raises:
        ValueError: unless there may be so many, and such an ignored label.
    """
    check_label(ignore_label)
    _check_number(num_classes)
    return Labelling(tuple(map(str, range(num_classes))), ignore_label)


def _check_number(num_classes: int | None) -> None:
    if num_classes is not None and not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes must be in [1, {MAX_CLASSES}], got {num_classes}")


def check_label(ignore_label: int) -> None:
    """Refuses what no pixel of a mask can be.

    Raises:
        ValueError: unless it is in [0, 256).
    """
    if not 0 <= ignore_label <= 255:
        raise ValueError(f"ignore_label must be in [0, 256), got {ignore_label}")


def _count_classes(train: Path, ignore_label: int) -> int:
    """One more than the largest label of the training masks that may be a class."""
    folder = masks_folder(train)
    if not (train.is_dir() and folder.is_dir()):
        raise NoClassesError(
            f"classes of {train.parent} must be named in {train.parent / 'classes.txt'}, one per "
            f"line, or have training masks in {folder}, found neither"
        )
    pairing = paired(train, images_below(train))
    labels = np.flatnonzero(_survey(folder, pairing).counts.any(axis=0))
    labels = labels[(labels != ignore_label) & (labels < MAX_CLASSES)]
    if not labels.size:
        raise NoClassesError(
            f"masks in {folder} must hold a class besides the ignored label {ignore_label}, found "
            f"none in {sum(map(bool, pairing.masks))} masks; to see why: "
            f"{_check_command(train, ignore_label)}"
        )
    return int(labels[-1]) + 1


def problem_of(survey: Survey, row: int, size: Sequence[int], labelling: Labelling) -> str:
    """Why a mask cannot be used with an image of this height and width; empty if it can."""
    if survey.problems[row]:
        return f"its mask: {survey.problems[row]}"
    height, width = survey.sizes[row].tolist()
    if (height, width) != tuple(size):
        return f"its mask has {width} x {height} pixels, and the image {size[1]} x {size[0]}"
    count, ignored = len(labelling.class_names), labelling.ignore_label
    labels = np.flatnonzero(survey.counts[row])
    beyond = labels[(labels >= count) & (labels != ignored)]
    if beyond.size:
        label = int(beyond[0])
        return (
            f"its mask has label {label}, which must be below {count}, the number of classes, or "
            f"{ignored}, the label of ignored pixels (--ignore-label takes another)"
        )
    return ""


def _check_command(root: Path, ignore_label: int) -> str:
    """What to type for the list of the bad images and masks of a split."""
    ignored = "" if ignore_label == IGNORE_LABEL else f" --ignore-label {ignore_label}"
    return check_command(root) + ignored


def _report(images: ImageIndex, problems: Sequence[str], strict: bool, command: str) -> None:
    """Warns of the images that are left out for their masks."""
    root = images.root
    told = [
        f"{printable(path)} ({problem})"
        for path, problem in zip(images.paths, problems, strict=True)
        if problem
    ]
    if not told:
        return
    if strict:
        raise ValueError(
            f"data folder {root} must have a mask that can be used for each image when strict, "
            f"found {len(told)} without, the first is {told[0]}; to list them: {command}"
        )
    if len(told) == len(images):
        raise ValueError(
            f"data folder {root} must have a mask that can be used for one image, found none; the "
            f"first is {told[0]}; to list them: {command}"
        )
    more = ", ..." if len(told) > 3 else ""
    _LOG.warning(
        "%d of %d images in %s are left out for their masks (to list them: %s): %s%s",
        len(told),
        len(images),
        root,
        command,
        ", ".join(told[:3]),
        more,
    )
