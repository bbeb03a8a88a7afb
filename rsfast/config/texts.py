"""What settings say that are written as texts of several numbers."""

from __future__ import annotations

from rsfast.config.rules import cut, is_count
from rsfast.data.augment import Augment

__all__ = ["checkpoint_interval", "operations_of", "profiled_steps"]


def profiled_steps(text: str) -> tuple[int, int]:
    """The A and B of "A:B".

    Raises:
        ValueError: if the text is something else.
    """
    first, colon, last = text.partition(":")
    if not (colon and is_count(first) and is_count(last) and int(first) < int(last)):
        raise ValueError(
            f"profile must look like 100:110, the second above the first, got {cut(text)!r}"
        )
    return int(first), int(last)


def checkpoint_interval(text: str | None) -> tuple[int, float]:
    """The steps and seconds of "500" or "10m"; 0 for what it is not.

    Raises:
        ValueError: if the text is something else.
    """
    if text is None:
        return 0, 0.0
    number = text.removesuffix("m")
    if not is_count(number) or int(number) < 1:
        raise ValueError(
            f"checkpoint_every must look like 500 (steps) or 10m (minutes), got {cut(text)!r}"
        )
    return (int(number), 0.0) if number == text else (0, 60.0 * int(number))


def operations_of(text: str | None) -> tuple[int, int] | None:
    """The N and M of "N:M", operations of RandAugment and their magnitude.

    Raises:
        ValueError: if the text is something else, or a number out of range.
    """
    if text is None:
        return None
    number, colon, magnitude = text.partition(":")
    if not (colon and is_count(number) and is_count(magnitude)):
        raise ValueError(f"rand_augment must look like 2:9, got {cut(text)!r}")
    return Augment(rand_augment=(int(number), int(magnitude))).rand_augment
