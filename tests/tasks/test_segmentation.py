"""Scores of segmentation, against counts made by hand and pixel by pixel."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import torchrun
from rsfast import Pyramid
from rsfast.tasks import segmentation
from rsfast.tasks.segmentation import (
    Accuracy,
    Confusion,
    Scores,
    class_counts,
    class_rows,
    figures_of,
    figures_of_classes,
    image_rows,
    predicted_classes,
)

CPU = torch.device("cpu")
IGNORED = 255
NOTHING = torch.empty(0), torch.empty(0), torch.empty(0)  # that is not a figure


def index_of(*paths: str) -> Any:
    return SimpleNamespace(paths=paths, class_names=("road", "sky"))


def batch_of(*masks: Tensor) -> Any:
    return SimpleNamespace(masks=masks, indices=torch.arange(len(masks)))


def test_figures_are_those_of_a_matrix_made_by_hand() -> None:
    matrix = torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    pixel, mean, miou = figures_of(matrix)
    assert pixel == pytest.approx(100 * 7 / 10)
    assert mean == pytest.approx(100 * (3 / 4 + 4 / 6) / 2)
    assert miou == pytest.approx(100 * (3 / 6 + 4 / 7) / 2)


def test_a_class_that_is_only_predicted_has_an_iou_of_zero_and_no_accuracy() -> None:
    matrix = torch.tensor([[3, 1], [0, 0]])
    pixels, accuracies, ious = figures_of_classes(class_counts(matrix))
    assert (pixels, accuracies, ious) == ([4, 0], [75.0, None], [75.0, 0.0])
    assert figures_of(matrix) == (75.0, 75.0, 37.5)


def test_counts_are_those_of_numpy_with_ignored_pixels_and_absent_classes() -> None:
    rng = np.random.default_rng(0)
    num_classes, expected = 5, np.zeros((2, 5, 5), dtype=np.int64)
    counts = Confusion(2, num_classes, IGNORED, CPU)
    for height, width in ((7, 3), (1, 1), (4, 9)):
        mask = rng.choice([0, 1, 3, IGNORED], (height, width)).astype(np.uint8)  # no 2, no 4
        predicted = rng.choice([0, 1, 2, 3], (2, height, width))
        counts.add(torch.from_numpy(predicted), torch.from_numpy(mask))
        for row in range(2):
            for place in np.argwhere(mask != IGNORED):
                y, x = map(int, place)
                expected[row, mask[y, x], predicted[row, y, x]] += 1
    matrices, images = counts.read()
    assert images == 3
    assert np.array_equal(matrices.numpy(), expected)
    assert figures_of_classes(class_counts(matrices[0]))[2][4] is None, (
        "neither labelled nor predicted"
    )


def test_an_ignored_label_may_be_that_of_a_class() -> None:
    counts = Confusion(1, 2, 0, CPU)
    counts.add(torch.tensor([[[0, 1, 1]]]), torch.tensor([[0, 1, 0]], dtype=torch.uint8))
    assert counts.read()[0].tolist() == [[[0, 0], [0, 1]]]


def test_levels_and_ensemble_are_scored_at_each_image_s_own_size() -> None:
    torch.manual_seed(0)
    levels = [torch.randn(2, 3, size, size) for size in (8, 5)]
    weights = torch.tensor([0.7, 0.3])
    masks = [torch.randint(0, 3, (9, 14)).byte(), torch.randint(0, 3, (6, 4)).byte()]
    scores = Scores(2, 3, IGNORED, CPU, weights)
    scores.add(Pyramid.pack(levels), batch_of(*masks))
    found = scores.read()
    expected = Confusion(3, 3, IGNORED, CPU)
    for number, mask in enumerate(masks):
        maps = [
            F.interpolate(level[number, None], size=mask.shape, mode="bilinear")[0]
            for level in levels
        ]
        ensemble = 0.7 * maps[0] + 0.3 * maps[1]
        expected.add(torch.stack([m.argmax(0) for m in (*maps, ensemble)]), mask)
    assert torch.equal(found.matrices, expected.read()[0])
    assert found.num_images == 2
    assert [*found.levels, found.ensemble] == [figures_of(m) for m in found.matrices]
    alone = Scores(2, 3, IGNORED, CPU)
    alone.add(levels, batch_of(*masks))
    assert (alone.read().levels, alone.read().ensemble) == (found.levels, None)


def test_classes_are_the_same_however_many_are_resized_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    levels = [torch.randn(11, 6, 6).round().bfloat16(), torch.randn(11, 3, 3).round().bfloat16()]
    weights = torch.tensor([0.5, 0.5])
    whole = predicted_classes(levels, (13, 7), weights)
    exact = [F.interpolate(m[None].float(), size=(13, 7), mode="bilinear")[0] for m in levels]
    assert torch.equal(whole[:2], torch.stack([m.argmax(0) for m in exact]))
    for values in (1, 3 * 3 * 13 * 7, 3 * 10 * 13 * 7):
        monkeypatch.setattr(segmentation, "_MOST_VALUES", values)
        assert torch.equal(predicted_classes(levels, (13, 7), weights), whole)


def test_masks_without_a_pixel_that_counts_or_with_other_classes_are_refused() -> None:
    counts = Confusion(1, 3, IGNORED, CPU)
    counts.add(torch.zeros(1, 2, 2).long(), torch.full((2, 2), IGNORED).byte())
    with pytest.raises(ValueError, match="all those of the 1 validation images are 255, which is"):
        counts.read()
    counts.add(torch.zeros(1, 1, 3).long(), torch.tensor([[1, 3, 200]]).byte())
    with pytest.raises(ValueError, match="below 3 or the ignored 255, and 2 pixels .* hold others"):
        counts.read()


def test_the_best_epoch_has_the_highest_mean_iou_at_the_largest_resolution() -> None:
    def score(*levels: tuple[float, float, float]) -> tuple[float, float]:
        return Accuracy(list(levels), (0.0, 0.0, 0.0), 1, *NOTHING).score

    assert score((70.0, 60.0, 51.0), (1.0, 1.0, 1.0)) > score(
        (90.0, 90.0, 50.0), (90.0, 90.0, 90.0)
    )
    assert score((70.0, 60.0, 50.0), (70.0, 60.0, 50.0)) > score(
        (70.0, 60.0, 50.04), (70.0, 60.0, 40.0)
    )


def test_columns_and_line_name_resolutions_and_ensemble() -> None:
    levels = [(70.0, 60.0, 50.0), (69.0, 59.0, 49.0)]
    accuracy = Accuracy(levels, (71.0, 61.0, 51.25), 9, *NOTHING)
    columns = accuracy.columns((64, 32))
    assert columns["miou_64"] == 50.0
    assert columns["pixel_32"] == 69.0
    assert columns["mean_ensemble"] == 61.0
    assert len(columns) == 9
    assert accuracy.line((64, 32)) == "mean IoU 64: 50.0  32: 49.0  ensemble: 51.2"


def test_the_table_of_classes_is_empty_where_a_class_has_no_figure() -> None:
    matrices = torch.tensor([[[[3, 1], [0, 0]]], [[[4, 0], [0, 0]]]])  # of one image
    rows = class_rows(index_of("a.png"), [64, "ensemble"], class_counts(matrices))
    assert rows[0]["class"] == "road"
    assert [rows[0][name] for name in ("pixels", "iou_64", "accuracy_64")] == [4, 75.0, 75.0]
    sky = {"class": "sky", "pixels": 0, "iou_64": 0.0, "iou_ensemble": ""}
    assert rows[1] == {**sky, "accuracy_64": "", "accuracy_ensemble": ""}
    assert list(rows[0])[:4] == ["class", "pixels", "iou_64", "iou_ensemble"]


SHARED_OUT = """
import torch
from types import SimpleNamespace
from rsfast.runtime import distributed
from rsfast.tasks.segmentation import Scores

rank = distributed.join("cpu")
generator = torch.Generator().manual_seed(0)
masks = [torch.randint(0, 4, (5, 6), generator=generator).byte() for _ in range(5)]
logits = torch.randn(5, 4, 3, 3, generator=generator)
weights = torch.ones(1)

def matrices(numbers, read):
    scores = Scores(1, 4, 3, rank.device, weights, num_images=5)
    for n in numbers:
        indices = torch.tensor([n])
        scores.add([logits[n, None]], SimpleNamespace(masks=(masks[n],), indices=indices))
    return read(scores)

ours = matrices(range(rank.index, 5, 2), lambda scores: scores.read())
alone, images, crossings = matrices(
    range(5),
    lambda scores: [getattr(scores._counts, n) for n in ("_counts", "_of_images", "_crossings")],
)
alone = alone[:, :4]
assert torch.equal(ours.matrices, alone), (ours.matrices, alone)
assert torch.equal(ours.images, images.transpose(0, 1)), (ours.images, images)
assert torch.equal(ours.shares, 100 * crossings[:1, :1].double() / alone[0].sum())
assert ours.num_images == 5
nothing = Scores(1, 4, 3, rank.device)
try:
    nothing.read()
except ValueError as error:
    print(f"refused on rank {rank.index}")
distributed.leave()
"""


def test_what_is_known_of_each_image_is_counted_by_hand() -> None:
    masks = torch.tensor([[0, 1, 1, IGNORED], [0, 0, 0, 0]]).byte().view(2, 1, 4)
    counts = Confusion(2, 2, IGNORED, CPU, num_images=3)
    counts.add(torch.tensor([[[0, 0, 1, 1]], [[1, 1, 1, 0]]]), masks[0], 2)
    counts.add(torch.tensor([[[0, 0, 0, 1]], [[0, 0, 0, 0]]]), masks[1], 0)
    images, crossings = counts.images()
    # Pixels, predictions and both, of road and sky.
    assert images[:, 2].tolist() == [[[1, 2, 1], [2, 1, 1]], [[1, 0, 0], [2, 3, 2]]]
    assert images[:, 0].tolist() == [[[4, 3, 3], [0, 1, 0]], [[4, 4, 4], [0, 0, 0]]]
    assert not images[:, 1].any()
    assert torch.equal(images.sum(1), class_counts(counts.read()[0]))
    assert crossings.tolist() == [[0, 2], [1, 0]]
    rows = list(image_rows(index_of("a", "b", "c"), [64, "ensemble"], images))
    names = ("image", "resolution", "class", "pixels", "predicted", "right")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("a", 64, "road", 4, 3, 3),
        ("a", 64, "sky", 0, 1, 0),
        ("a", "ensemble", "road", 4, 4, 4),
        ("c", 64, "road", 1, 2, 1),
        ("c", 64, "sky", 2, 1, 1),
        ("c", "ensemble", "road", 1, 0, 0),
        ("c", "ensemble", "sky", 2, 3, 2),
    ]


def test_an_ignored_label_that_is_a_class_s_is_neither_right_nor_wrong() -> None:
    counts = Confusion(2, 2, 0, CPU, num_images=1)
    mask = torch.tensor([[0, 1, 0]], dtype=torch.uint8)
    counts.add(torch.tensor([[[0, 1, 1]], [[1, 0, 0]]]), mask)
    images, crossings = counts.images()
    assert images[:, 0].tolist() == [[[0, 0, 0], [1, 1, 1]], [[0, 1, 0], [1, 0, 0]]]
    assert crossings.tolist() == [[0, 0], [1, 0]]


def test_several_ranks_count_every_image_once(tmp_path: Path) -> None:
    (tmp_path / "shared_out.py").write_text(SHARED_OUT)
    said = torchrun("shared_out.py", folder=tmp_path)
    assert "refused on rank 0" in said
    assert "refused on rank 1" in said


def test_a_network_that_is_right_everywhere_has_a_hundred_percent() -> None:
    mask = torch.tensor([[0, 1], [2, IGNORED]]).byte()
    logits = F.one_hot(mask.long().clamp(max=2), 3).permute(2, 0, 1).float()
    scores = Scores(1, 3, IGNORED, CPU)
    scores.add([logits[None]], batch_of(mask))
    assert all(math.isclose(value, 100.0) for value in scores.read().levels[0])
