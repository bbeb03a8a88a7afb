"""Ridge regression finds what is linear."""

from __future__ import annotations

import numpy as np
import pytest

from bench.rivals import ridge


def test_classes_that_differ_in_their_means_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    pixels = 0.1 * rng.random((120, 12))
    pixels[np.arange(120), labels] += 0.5
    onehot = np.eye(3)[labels]
    train, test = (pixels[:80], onehot[:80]), (pixels[80:], onehot[80:])
    assert ridge.accuracy(train, test, 1.0) == 100.0
    # Weights of zero leave the mean: the largest class of the training images.
    largest = onehot[:80].mean(axis=0).argmax()
    guessed = 100.0 * float(np.mean(labels[80:] == largest))
    assert guessed == pytest.approx(ridge.accuracy(train, test, 1e30))
