"""Pictures of classes over an image: colours, and legends that fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from rsfast.files import overlays


def test_colours_of_classes_differ() -> None:
    colours = overlays.palette(40)
    assert len(np.unique(colours, axis=0)) == 40
    assert np.array_equal(colours[:5], overlays.palette(5))


@pytest.mark.parametrize("panels", [1, 4])
@pytest.mark.parametrize(
    "name", ["car", "person;individual;someone;somebody;mortal;soul", r"sky $\frac{$"]
)
def test_legends_lie_within_the_picture_whatever_classes_are_called(
    name: str, panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    write = overlays.write
    monkeypatch.setattr(overlays, "write", lambda f, p: (drawn.append(f), write(f, p)))
    mask = (np.arange(20 * 36) % 20).reshape(20, 36).astype(np.uint8)
    image = np.full((20, 36, 3), 100, dtype=np.uint8)
    names = [f"{number} {name}" for number in range(19)]
    predictions = {f"{number} px": mask.astype(np.int64) % 19 for number in range(panels)}
    overlays.draw_overlays(tmp_path / "o.png", image, mask, predictions, names, 19)
    (figure,) = drawn
    (legend,) = figure.legends
    frame, box = figure.bbox, legend.get_window_extent()
    assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
    assert len(legend.get_texts()) == 19  # the 18 commonest, and what is not counted
