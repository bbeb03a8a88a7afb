"""The check of a split of segmentation: its images as in classification, its masks, and the pairs.

An image without a mask that can be used is bad, because training leaves it out; the finding is of
the image, since that is what `exclude` and the warnings of a run name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rsfast.data.check import KINDS, Finding, Report, check_split
from rsfast.data.folder import sizes_of
from rsfast.data.index import printable
from rsfast.data.mask_survey import Survey, survey_masks
from rsfast.data.masks import MAX_CLASSES
from rsfast.data.pairs import (
    Labelling,
    NoClassesError,
    images_below,
    labelling_of,
    labelling_of_numbers,
    paired,
    problem_of,
)
from rsfast.data.splits import Split
from rsfast.files.orientation import orientation

__all__ = ["PairReport", "check_pairs", "class_table"]


# Masks have no EXIF and are never turned.
_FITS_STORED = (
    "EXIF turns it, and its mask fits it as it is stored: do not train with --exif honour"
)
_FITS_TURNED = "its mask fits it only as EXIF turns it: left out without --exif honour"


class PairReport(NamedTuple):
    """What a check of a split of segmentation has found.

    Attributes:
        report: as of classification, about images and masks.
        labelling: what numbers in masks mean.
        pixels: [256] int64 pixels of each label in the masks that can be used.
        masks: [256] int64 masks that have such pixels.
        unclear: why the classes are not known; empty where they are.
    """

    report: Report
    labelling: Labelling
    pixels: np.ndarray
    masks: np.ndarray
    unclear: str


def check_pairs(split: Split, *, ignore_label: int, workers: int | None = None) -> PairReport:
    """Decodes the images and masks of one split that are new or have changed.

    Args:
        split: with masks.
        ignore_label: of the pixels that do not count, from 0 to 255.
        workers: processes that decode images; None for one per CPU this process may use.

    Raises:
        ValueError: if there is no image, classes.txt is wrong, or workers is below 1.
    """
    assert split.masks is not None
    unclear = ""
    try:
        labelling = labelling_of(split.root, ignore_label)
    except NoClassesError as error:  # there is more to say about the masks
        labelling, unclear = labelling_of_numbers(MAX_CLASSES, ignore_label), str(error)
    report = check_split(split, workers=workers)
    images = images_below(split.root)
    pairing = paired(split.root, images)
    survey = survey_masks(split.masks, [mask for mask in pairing.masks if mask])
    left_out = {one.path for one in report.findings if one.kind in ("bad", "excluded")}
    row_of = {mask: row for row, mask in enumerate(survey.paths)}
    found, good = [], []
    for image, size, mask, problem in zip(
        images,
        sizes_of(split.root, images).tolist(),
        pairing.masks,
        pairing.problems,
        strict=True,
    ):
        if image in left_out:
            continue
        judged: tuple[str, str] | None = ("bad", problem)
        if not problem:
            judged = _judged(split.root / image, survey, row_of[mask], size, labelling)
        if judged is not None:
            found.append(Finding(judged[0], image, judged[1]))
        if judged is None or judged[0] != "bad":
            good.append(row_of[mask])
    folder = os.path.relpath(split.masks, split.root)
    unused = "no image has its path without the extension"
    found += [Finding("unused", os.path.join(folder, path), unused) for path in pairing.unused]
    findings = sorted([*report.findings, *found], key=lambda one: KINDS.index(one.kind))
    is_good = report.is_good and not unclear and not any(one.kind == "bad" for one in found)
    return PairReport(
        dataclasses.replace(report, findings=findings, is_good=is_good),
        labelling,
        survey.counts[good].sum(axis=0, dtype=np.int64),
        (survey.counts[good] > 0).sum(axis=0),
        unclear,
    )


def class_table(reports: Mapping[str, PairReport]) -> list[str]:
    """Lines for people: of each class its share of the pixels that count, and its masks.

    Args:
        reports: of the splits, by name.
    """
    labelling = next(iter(reports.values())).labelling
    if unclear := {one.unclear for one in reports.values() if one.unclear}:
        return sorted(unclear)
    names, ignored = labelling
    rows = [["class", "", *(part for name in reports for part in (f"{name} %", "masks"))]]
    for label, title in enumerate(names):
        if label != ignored:
            rows.append([str(label), printable(title)])
            for one in reports.values():
                counted = np.delete(one.pixels, ignored).sum()
                share = 100 * one.pixels[label] / max(1, counted)
                rows[-1] += [f"{share:.2f}", str(one.masks[label])]
    rows.append([str(ignored), "ignored, of all pixels"])
    for one in reports.values():
        share = 100 * one.pixels[ignored] / max(1, one.pixels.sum())
        rows[-1] += [f"{share:.2f}", str(one.masks[ignored])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            part.ljust(width) if number == 1 else part.rjust(width)
            for number, (part, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _judged(
    file: Path, survey: Survey, row: int, size: Sequence[int], labelling: Labelling
) -> tuple[str, str] | None:
    """Kind of finding and reason; None where image and mask fit."""
    problem = problem_of(survey, row, size, labelling)
    turn = _turn(file)
    if turn == 1:
        return ("bad", problem) if problem else None
    if problem:
        lies = turn >= 5 and not problem_of(survey, row, size[::-1], labelling)
        return ("odd", _FITS_TURNED) if lies else ("bad", problem)
    return "odd", _FITS_STORED


def _turn(file: Path) -> int:
    """EXIF's orientation; 1 where nothing can be read, which the check of images says."""
    try:
        with Image.open(file) as image:
            return orientation(image)
    except Exception:  # Pillow's readers raise nearly anything on a damaged header
        return 1
