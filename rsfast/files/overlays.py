"""Pictures of classes laid over an image, with the names of the colours."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rsfast.files.plots import new_figure, write

__all__ = ["draw_overlays", "palette"]

_PANEL_INCHES = 2.6  # width of one picture
_OPACITY = 0.6  # of a class's colour over the image
_NOT_COUNTED = (64, 64, 64)
_MOST_NAMED = 18  # classes of a legend, those with the most pixels
_LONGEST_NAME = 30  # characters of a legend
_ENTRY_INCHES, _CHARACTER_INCHES = 0.5, 0.065  # of a legend, at 8 pt
_TURN = 0.618034  # of the circle of hues, from class to class


def palette(num_classes: int) -> NDArray[np.uint8]:
    """[K, 3] RGB: the colour of a class depends on its number alone.

    Twenty of matplotlib's, strong ones first, then hues that go round the circle.
    """
    table = [to_rgb(matplotlib.colormaps["tab20"](number)) for number in range(20)]
    colours = [*table[::2], *table[1::2]]
    for number in range(len(colours), num_classes):
        value = (1.0, 0.75, 0.5)[number % 3]
        colours.append(colorsys.hsv_to_rgb(number * _TURN % 1.0, 0.75, value))
    return np.rint(255 * np.array(colours[:num_classes])).astype(np.uint8).reshape(-1, 3)


def draw_overlays(
    path: Path,
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    predictions: Mapping[str, NDArray[np.int64]],
    class_names: Sequence[str],
    ignore_label: int,
) -> None:
    """Draws an image, its ground truth and predictions side by side, with a legend.

    Args:
        path: of the PNG.
        image: [H, W, 3] RGB.
        mask: [H, W] classes, or `ignore_label`, which is drawn in dark grey.
        predictions: [H, W] classes, by title.
        class_names: K names.
        ignore_label: of pixels that do not count.
    """
    colours = palette(len(class_names))
    counted = mask != ignore_label
    truth = _laid_over(image, np.where(counted, mask, 0).astype(np.int64), colours)
    truth[~counted] = _NOT_COUNTED
    panels = [("image", image), ("ground truth", truth)]
    for title, classes in predictions.items():
        right = 100.0 * float((classes == mask)[counted].mean()) if counted.any() else float("nan")
        panels.append((f"{title}, {right:.1f} % right", _laid_over(image, classes, colours)))
    entries = _legend([mask[counted], *predictions.values()], colours, class_names)
    if not counted.all():
        entries.append(_entry(_NOT_COUNTED, "not counted"))
    longest = max(len(str(entry.get_label())) for entry in entries) if entries else 0
    widest = _ENTRY_INCHES + _CHARACTER_INCHES * longest
    columns = max(1, min(len(entries), int(_PANEL_INCHES * len(panels) / widest)))
    lines = -(-len(entries) // columns)
    height = _PANEL_INCHES * min(2.0, max(0.4, image.shape[0] / image.shape[1]))
    size = (_PANEL_INCHES * len(panels), height + 0.4 + 0.25 * lines)
    figure, all_axes = new_figure(len(panels), size)
    for axes, (title, picture) in zip(all_axes, panels, strict=True):
        axes.imshow(picture, interpolation="antialiased")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.legend(
        handles=entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    write(figure, path)


def _laid_over(
    image: NDArray[np.uint8], classes: NDArray[np.int64], colours: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The classes' colours over the image's brightness."""
    grey = image.mean(axis=2, keepdims=True)
    mixed = _OPACITY * colours[classes] + (1 - _OPACITY) * grey
    return np.rint(mixed).astype(np.uint8)


def _legend(
    maps: Sequence[NDArray[np.integer]], colours: NDArray[np.uint8], class_names: Sequence[str]
) -> list[Patch]:
    """The classes that are to be seen, in the order of their numbers."""
    seen_in = [np.bincount(found.ravel(), minlength=len(class_names)) for found in maps]
    shares = np.sum(seen_in, axis=0)
    seen = [number for number in np.argsort(shares)[::-1] if shares[number]][:_MOST_NAMED]
    return [_entry(colours[number].tolist(), class_names[number]) for number in sorted(seen)]


def _entry(colour: Sequence[int], label: str) -> Patch:
    red, green, blue = (value / 255 for value in colour)
    shown = label if len(label) <= _LONGEST_NAME else f"{label[: _LONGEST_NAME - 3]}..."
    # A dollar would begin a formula.
    return Patch(color=(red, green, blue), label=shown.replace("$", r"\$"))
