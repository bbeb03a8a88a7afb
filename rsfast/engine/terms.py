"""What the engine asks of a loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, Self

from torch import Tensor

__all__ = ["Terms"]


class Terms(Protocol):
    """The terms of a loss: a named tuple of scalars, and what to run the backward of."""

    @property
    def total(self) -> Tensor:
        """The loss to minimise."""
        ...

    def __iter__(self) -> Iterator[Tensor]: ...

    @classmethod
    def _make(cls, iterable: Iterable[Tensor], /) -> Self: ...
