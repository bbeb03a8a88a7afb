"""Named normalisations of RGB values."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["NORMALIZATIONS", "normalization"]

# mean and standard deviation of RGB values in [0, 1]
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def normalization(
    normalize: str | tuple[Sequence[float], Sequence[float]],
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation, of a name or as they are.

    Raises:
        ValueError: if there is no such name.
    """
    if not isinstance(normalize, str):
        return normalize
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {list(NORMALIZATIONS)}, got {normalize!r}")
    return NORMALIZATIONS[normalize]
