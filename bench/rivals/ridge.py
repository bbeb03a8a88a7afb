"""A floor for accuracies: ridge regression on thumbnails.

    python -m bench.rivals.ridge --data DIR

What a network must beat to have learnt more than colours and coarse shapes. The regularisation is
chosen on a fifth of the training images; validation images are looked at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rsfast.data import val_loader

__all__ = ["accuracy", "main"]

_STRENGTHS = tuple(10.0**power for power in range(0, 6))

Matrix = NDArray[np.float64]


def accuracy(train: tuple[Matrix, Matrix], test: tuple[Matrix, Matrix], strength: float) -> float:
    """Share of test images whose class gets the highest score, in percent.

    Args:
        train, test: [n, d] pixels and [n, K] one-hot labels.
        strength: of the regularisation, on centred pixels in [0, 1].
    """
    mean, offset = train[0].mean(axis=0), train[1].mean(axis=0)
    x = train[0] - mean
    gram = x.T @ x + strength * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (train[1] - offset))
    scores = (test[0] - mean) @ weights + offset
    return 100.0 * float(np.mean(scores.argmax(axis=1) == test[1].argmax(axis=1)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.rivals.ridge", description=__doc__)
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--size", type=int, default=16, help="of the thumbnails, in pixels (16)")
    parser.add_argument("--loader", choices=("dali", "pil"), default="dali")
    args = parser.parse_args(argv)
    train, val = (_pixels(args.data, split, args.size, args.loader) for split in ("train", "val"))
    order = np.random.default_rng(0).permutation(len(train[0]))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    parts = [(train[0][part], train[1][part]) for part in (rest, held)]
    best = max(_STRENGTHS, key=lambda strength: accuracy(*parts, strength))
    found = accuracy(train, val, best)
    print(f"ridge regression on {args.size} x {args.size} thumbnails: {found:.1f} %")
    return 0


def _pixels(root: str, split: str, size: int, loader: str) -> tuple[Matrix, Matrix]:
    """[n, size * size * 3] in [0, 1] and [n, K]."""
    batches = list(
        val_loader(root, (size,), 256, backend=loader, split=split, crop="none", normalize="none")
    )
    pixels = np.concatenate([b.images.level(0).flatten(1).double().numpy() for b in batches])
    labels = np.concatenate([b.labels.numpy() for b in batches])
    return pixels, np.eye(int(labels.max()) + 1)[labels]


if __name__ == "__main__":
    raise SystemExit(main())
